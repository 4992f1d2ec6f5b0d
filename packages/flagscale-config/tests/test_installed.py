"""What an installed package must have: version, types, names, data, and a quick start."""

import importlib
import importlib.metadata
import subprocess
import sys
from importlib.resources import files

import pytest

import flagscale_config


def test_the_version_is_the_packages():
    try:
        installed = importlib.metadata.version("flagscale-config")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree
    assert flagscale_config.__version__ == installed


def test_types_and_data_are_shipped():
    package = files("flagscale_config")
    assert package.joinpath("py.typed").is_file()
    for name in ("megatron", "vllm", "sglang", "llama_cpp", "transformers", "flagscale-megatron"):
        assert package.joinpath("data", f"{name}.json").is_file()


def test_every_public_name_exists():
    for name in flagscale_config.__all__:
        assert getattr(flagscale_config, name) is not None
    assert set(flagscale_config.__all__) <= set(dir(flagscale_config))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flagscale_config.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module", ["arithmetic", "cli", "command", "compose", "errors", "experiment", "loader"]
)
def test_modules_say_what_they_offer(module):
    loaded = importlib.import_module(f"flagscale_config.{module}")
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_importing_loads_nothing_heavy():
    code = "import sys, flagscale_config, flagscale_config.cli, flagscale_config.command; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"pydantic", "hydra", "omegaconf", "yaml", "torch", "numpy"}


def test_loading_needs_no_framework(tiny):
    code = "import sys, flagscale_config; flagscale_config.load('conf/tiny.yaml'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert not set(done.stdout.split()) & {"torch", "numpy", "megatron", "transformers", "vllm"}
