"""convert x chip: a small checkpoint goes there and back, bit by bit, on the chip's host.

Converting is work of the processor and reads no chip. The cell runs it all the same, with the faked host
and its selection of devices in force, so that an accelerator which somebody consults one day is seen here.
"""

import importlib.util
import os
from functools import cache
from pathlib import Path

import torch

from flagscale_convert import convert, make_plan, verify
from flagscale_hw import env
from flagscale_hw.testing import FAKED, faked_host

TESTS_OF_CONVERT = Path(__file__).parents[2] / "packages/flagscale-convert/tests/conftest.py"


@cache
def helpers():
    """The checkpoints that convert's own tests are made with."""
    spec = importlib.util.spec_from_file_location("convert_conftest", TESTS_OF_CONVERT)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_cell(chip, machine, tmp_path, monkeypatch, record_property):
    for name, value in env(machine.devices[:1]).items():
        monkeypatch.setenv(name, value)
    if chip not in FAKED:
        there_and_back(tmp_path)
    else:
        with faked_host(chip, len(machine.devices)):
            assert os.environ["FLAGSCALE_HW_ROOT"]
            there_and_back(tmp_path)
    record_property("note", "hf -> torch_dist -> hf, equal")


def there_and_back(folder):
    maker = helpers().Maker(folder)
    source = maker.hf(maker.Shape(family="qwen3", dtype=torch.bfloat16), shards=2)
    convert(make_plan(source, folder / "mc", to="torch_dist"))
    convert(make_plan(folder / "mc", folder / "back", to="hf"))
    maker.same(maker.load(source), maker.load(folder / "back"))
    assert verify(source, folder / "mc").is_equal
