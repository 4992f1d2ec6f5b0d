"""`doctor --for`: what frameworks would select, compared with what is here. The frameworks are small
fakes.
"""

from __future__ import annotations

import json
import sys

import pytest

from flagscale_hw import cli
from flagscale_hw.doctor import CODES, examine
from flagscale_hw.host import Host
from flagscale_hw.selection import examine_selection
from flagscale_hw.testing import faked_host, write_host

TORCH = """
__version__ = "2.11.0"
class _Device:
    def __init__(self, here, count): self.here, self.count = here, count
    def is_available(self): return self.here
    def device_count(self): return self.count
cuda = _Device({cuda}, 8)
"""
NPU = "import torch\ntorch.npu = torch._Device(True, 8)\n"
DISTRIBUTED = "def is_backend_available(name): return name in {backends!r}\n"
VLLM = "class NPUPlatform:\n    device_type = {device!r}\ncurrent_platform = NPUPlatform()\n"
PLATFORM = """
class P:
    def platform_name(self): return {name!r}
def get_platform(): return P()
"""


class Frameworks:
    """A folder of fake frameworks, and an interpreter that imports from it."""

    def __init__(self, folder):
        self.folder = folder / "frameworks"
        self.folder.mkdir()
        self.python = str(folder / "python")
        script = f'#!/bin/sh\nPYTHONPATH={self.folder} exec {sys.executable} -S "$@"\n'
        (folder / "python").write_text(script)
        (folder / "python").chmod(0o755)

    def write(self, name, text=""):
        path = self.folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return self

    def torch(self, *, cuda=False, backends=("gloo",)):
        self.write("torch/__init__", TORCH.format(cuda=cuda))
        return self.write("torch/distributed", DISTRIBUTED.format(backends=backends))

    def ask(self, purpose, chip, **options):
        with faked_host(chip, 0 if chip == "cpu" else 2) as host:
            found = examine_selection(
                purpose,
                python=self.python,
                host=host,
                timeout_s=60,
                ask_timeout_s=options.pop("ask_timeout_s", 60),
            )
        assert all(finding.code in CODES for finding in found)
        assert all(finding.hint for finding in found if not finding.is_good)
        return {finding.code: finding for finding in found}


@pytest.fixture
def frameworks(tmp_path):
    return Frameworks(tmp_path)


def test_all_is_well_on_an_npu(frameworks):
    frameworks.torch(backends=("gloo", "hccl")).write("torch_npu", NPU)
    frameworks.write("megatron/plugin/__init__").write("megatron/__init__")
    frameworks.write("megatron/plugin/platform", PLATFORM.format(name="npu"))
    frameworks.write("megatron/core/package_info", '__version__ = "0.17.1"')
    frameworks.write("transformer_engine/__init__").write("transformer_engine/plugin")
    found = frameworks.ask("train", "ascend")
    assert [finding.code for finding in found.values() if not finding.is_good] == []
    assert "would select npu (8 devices)" in found["HW401"].text
    assert found["HW403"].text == "Megatron-LM-FL 0.17.1 would select the platform npu"
    assert "with FlagOS dispatch" in found["HW404"].text


def test_a_torch_without_the_vendors_module(frameworks):
    found = frameworks.torch().write("megatron/__init__").ask("train", "ascend")
    assert not found["HW401"].is_good
    assert "would select cpu" in found["HW401"].text
    assert "torch_npu: ModuleNotFoundError" in found["HW401"].text
    assert (
        "Huawei Ascend is here, which is npu in torch: install a torch with torch_npu" in found["HW401"].hint
    )
    assert not found["HW402"].is_good
    assert not found["HW403"].is_good
    assert "install Megatron-LM-FL" in found["HW403"].hint
    assert found["HW404"].is_good  # plain layers will do


def test_a_platform_that_takes_the_chip_for_another(frameworks):
    frameworks.torch(cuda=True, backends=("nccl",)).write("megatron/__init__").write(
        "megatron/plugin/__init__"
    )
    frameworks.write("megatron/plugin/platform", PLATFORM.format(name="cuda"))
    found = frameworks.ask("train", "metax")  # its torch imitates CUDA, so this is right
    assert found["HW401"].is_good
    assert found["HW403"].is_good
    found = frameworks.ask("train", "mthreads")
    assert not found["HW403"].is_good
    assert "would select the platform cuda" in found["HW403"].text


def test_nvidias_transformer_engine_on_another_chip(frameworks):
    frameworks.torch(cuda=True, backends=("nccl",)).write("megatron/__init__").write(
        "transformer_engine/__init__"
    )
    found = frameworks.ask("train", "metax")
    assert not found["HW404"].is_good
    assert "install TransformerEngine-FL" in found["HW404"].hint
    assert frameworks.ask("train", "nvidia")["HW404"].is_good


def test_what_vllm_would_select(frameworks):
    frameworks.torch().write("torch_npu", NPU)
    found = frameworks.ask("serve", "ascend")
    assert "vllm is not installed" in found["HW405"].text
    assert "pip install vllm-ascend" in found["HW405"].hint
    frameworks.write("vllm/__init__").write("vllm/platforms", VLLM.format(device="npu"))
    assert frameworks.ask("serve", "ascend")["HW405"].is_good
    frameworks.write("vllm/platforms", VLLM.format(device=""))
    found = frameworks.ask("serve", "ascend")
    assert not found["HW405"].is_good
    assert "would select nothing" in found["HW405"].text


def test_a_framework_that_hangs_keeps_the_answers_before_it(frameworks):
    frameworks.torch().write("torch_npu", NPU)
    frameworks.write("vllm/__init__").write("vllm/platforms", "import time\ntime.sleep(86400)\n")
    found = frameworks.ask("serve", "ascend", ask_timeout_s=5.0)
    assert found["HW401"].is_good
    assert not found["HW405"].is_good
    assert "no answer within 5 s; it was killed" in found["HW405"].text


def test_a_framework_that_crashes_is_quoted(frameworks):
    frameworks.write(
        "torch/__init__",
        "import os, sys\nsys.stderr.write('libcrash: bad\\n')\nsys.stderr.flush()\nos._exit(66)\n",
    )
    found = frameworks.ask("serve", "ascend")
    assert "ended with code 66: libcrash: bad" in found["HW401"].text
    frameworks.write("torch/__init__", "raise OSError('libascend_hal.so: cannot open')")
    assert "OSError: libascend_hal.so: cannot open" in frameworks.ask("serve", "ascend")["HW401"].text


def test_an_interpreter_that_is_not_there(tmp_path):
    with faked_host("cpu") as host:
        (found,) = examine_selection("train", python="/nowhere/python", host=host)
    assert (found.code, found.is_good) == ("HW406", False)


def test_the_verb(frameworks, capsys):
    frameworks.torch()
    with faked_host("ascend", 2):
        words = ["--timeout", "60", "doctor", "--for", "serve", "--python", frameworks.python, "--json"]
        assert cli.main(words) == 3
    codes = {finding["code"] for finding in json.loads(capsys.readouterr().out)}
    assert {"HW101", "HW401", "HW405"} <= codes


def examined(tmp_path, chip, environ):
    write_host(tmp_path, chip, 2)
    findings = examine(Host(tmp_path, {"PATH": "/usr/bin:/bin", **environ}), timeout_s=60)
    assert all(finding.code in CODES for finding in findings)
    return {finding.code: finding for finding in findings if not finding.is_good}


@pytest.mark.parametrize(
    ("chip", "environ", "code", "said"),
    [
        (
            "amd",
            {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"},
            "HW201",
            "counts within ROCR_VISIBLE",
        ),
        ("ascend", {"CUDA_VISIBLE_DEVICES": "0"}, "HW203", "this chip reads ASCEND_RT_VISIBLE_DEVICES"),
        (
            "ascend",
            {"TE_FL_PREFER": "vendor", "VLLM_FL_PREFER": "flagos"},
            "HW202",
            "TE_FL_PREFER=vendor, VLLM_FL",
        ),
        (
            "ascend",
            {"VLLM_FL_FLAGOS_WHITELIST": "mm", "VLLM_FL_FLAGOS_BLACKLIST": "pad"},
            "HW202",
            "both set",
        ),
        ("ascend", {"ASCEND_RT_VISIBLE_DEVICES": "-1"}, "HW106", "0 of 2 devices are usable"),
    ],
)
def test_the_doctor_on_variables(tmp_path, chip, environ, code, said):
    found = examined(tmp_path, chip, environ)
    assert said in found[code].text
    assert found[code].hint


def test_the_doctor_on_a_healthy_host(tmp_path):
    assert examined(tmp_path, "ascend", {"ASCEND_RT_VISIBLE_DEVICES": "0,1", "TE_FL_PREFER": "flagos"}) == {}


def test_the_doctor_on_a_driver_that_is_not_loaded(tmp_path):
    write_host(tmp_path, "ascend", 2)
    for node in (tmp_path / "dev").glob("davinci*"):
        node.unlink()
    found = examined_again(tmp_path)
    assert "no driver has them" in found["HW102"].text


def examined_again(tmp_path):
    return {
        finding.code: finding for finding in examine(Host(tmp_path, {}), timeout_s=60) if not finding.is_good
    }
