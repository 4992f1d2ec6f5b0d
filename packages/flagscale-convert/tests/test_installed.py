"""What an installed package promises."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources

import flagscale_convert


def test_version():
    assert flagscale_convert.__version__.count(".") == 2
    try:
        installed = importlib.metadata.version("flagscale-convert")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree
    assert flagscale_convert.__version__ == installed


def test_typed():
    assert importlib.resources.files("flagscale_convert").joinpath("py.typed").is_file()


def test_every_public_name_is_there_and_is_the_thing():
    for name in flagscale_convert.__all__:
        assert getattr(flagscale_convert, name) is not None
    assert callable(flagscale_convert.convert)
    assert callable(flagscale_convert.verify)
    assert callable(flagscale_convert.inspect)


def test_every_module_says_what_it_exports():
    for entry in importlib.resources.files("flagscale_convert").iterdir():
        if entry.name.endswith(".py") and not entry.name.startswith("__"):
            module = importlib.import_module(f"flagscale_convert.{entry.name.removesuffix('.py')}")
            assert module.__all__, entry.name
            for name in module.__all__:
                assert hasattr(module, name), (entry.name, name)
