"""The package as others see it: names, types, and what an import costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import pkgutil
import subprocess
import sys

import pytest

import flagscale_hw


def test_every_public_name_is_there_and_documented():
    for name in flagscale_hw.__all__:
        assert getattr(flagscale_hw, name) is not None
    assert set(flagscale_hw.__all__) <= set(dir(flagscale_hw))
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        flagscale_hw.nosuch  # noqa: B018 - looked up to fail


def test_no_module_takes_the_place_of_a_function():
    for module in pkgutil.iter_modules(flagscale_hw.__path__):
        if module.name != "__main__":
            importlib.import_module(f"flagscale_hw.{module.name}")
        assert module.name not in flagscale_hw.__all__
    assert callable(flagscale_hw.detect)
    assert callable(flagscale_hw.testing.fake_host)


def test_every_module_says_what_is_public():
    for module in pkgutil.iter_modules(flagscale_hw.__path__):
        if module.name not in ("__about__", "__main__"):
            loaded = importlib.import_module(f"flagscale_hw.{module.name}")
            assert all(hasattr(loaded, name) for name in loaded.__all__), module.name


def test_types_are_shipped():
    assert importlib.resources.files("flagscale_hw").joinpath("py.typed").is_file()


def test_the_version_is_the_one_installed():
    try:
        installed = importlib.metadata.version("flagscale-hw")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree")
    assert flagscale_hw.__version__ == installed


def test_an_import_is_light():
    code = "import sys; old = set(sys.modules); import flagscale_hw; print(*sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:  # found only through the site folder
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {
        "flagscale_hw", "flagscale_hw.__about__", "importlib", "importlib._bootstrap", "__future__",
        "importlib._bootstrap_external", "warnings",
    }  # fmt: skip
