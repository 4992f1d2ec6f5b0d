"""Chips that torch knows by a vendor's plug-in: trained on stand-ins for the vendors' modules.

The host is a faked one, as detection sees it, and so are plug-in, hook and collectives, which let the CPU do
the work (`standins/`). What is real: plan, launch, torchrun, worker, torch and Megatron, and the order in
which they come.
"""

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from flagscale_config import load
from flagscale_hw.testing import fake_host, faked_host
from flagscale_train import Findings, InvalidInput, plan

STANDINS = Path(__file__).with_name("standins")
MEGATRON_LM_FL = STANDINS / "megatron_lm_fl"
CHIPS = {
    "ascend": ("npu", "hccl", "ASCEND_RT_VISIBLE_DEVICES"),
    "mthreads": ("musa", "mccl", "MUSA_VISIBLE_DEVICES"),
}
FEW = [
    "train.model.train_iters=2",
    "train.model.eval_iters=0",
    "+train.system.bf16=false",
    "+experiment.envs.TORCH_COMPILE_DISABLE=1",
    "+experiment.envs.TORCH_DEVICE_BACKEND_AUTOLOAD=0",
]


def modules_for(chip):
    """Return the folders of the stand-ins that a host with a chip has."""
    return [STANDINS / "vendors", STANDINS / "vendors" / chip, MEGATRON_LM_FL]


def environment(folder, first):
    """Return the environment of a process that looks for modules in the folders `first` before others."""
    paths = [*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "FLAGSCALE_STATE_DIR": str(folder / "state"),
        "STANDIN_JOURNAL": str(folder / "journal.jsonl"),
    }


def run(folder, experiment, *words, first=()):
    argv = [sys.executable, "-m", "flagscale_train.cli", "run", experiment, *words]
    env = environment(folder, first)
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600, check=False)


def events_of(folder, kind):
    lines = (folder / "exp" / "runs" / "latest" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.megatron
@pytest.mark.every_megatron
@pytest.mark.parametrize("chip", CHIPS)
def test_a_worker_trains_on_a_chip_that_torch_learns_of(chip, tmp_path, experiment_file):
    device, collectives, variable = CHIPS[chip]
    with faked_host(chip, 4):
        done = run(tmp_path, experiment_file, *FEW, first=modules_for(chip))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert [step["iteration"] for step in events_of(tmp_path, "step")] == [1, 2]
    (start,) = events_of(tmp_path, "start")
    assert start["collectives"] == collectives
    journal = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    plugin, hook = journal
    assert (plugin["what"], hook["what"]) == (f"torch.{device}", f"torch.cuda means {device}")
    assert plugin["visible"] == "0", f"{variable} selects one of four"
    assert not plugin["megatron"], "before Megatron"
    assert not hook["megatron"], "before Megatron"


@pytest.mark.megatron
@pytest.mark.every_megatron
def test_on_a_cpu_the_platform_of_megatron_lm_fl_names_the_cpu(tmp_path):
    words = "cpu.install(); from megatron.plugin.platform import get_platform as p; print(p().device_name())"
    argv = [sys.executable, "-c", f"from flagscale_train.worker import cpu; {words}"]
    env = environment(tmp_path, [MEGATRON_LM_FL])
    out = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600, check=True).stdout
    assert out.splitlines()[-1] == "cpu"


def test_what_a_chip_needs_is_named_before_anything_starts(tmp_path, experiment_file):
    with faked_host("ascend", 2):
        done = run(tmp_path, experiment_file)
    assert done.returncode == 2
    assert "torch_npu, which makes torch know it, is not installed: pip install torch-npu" in done.stderr
    assert "Megatron-LM-FL has: put its source tree on PYTHONPATH" in done.stderr
    assert not (tmp_path / "exp" / "runs").exists()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((), "torch_musa, which makes torch know it, is not installed: take Moore Threads' wheel"),
        (("torch_musa",), "megatron-core has no platform for Moore Threads"),
        (("torch_musa", "megatron.plugin.platform"), None),
        (None, None),
    ],
)
def test_a_plan_asks_for_what_is_missing_and_no_more(found, said, experiment_file):
    findings = Findings(vendor_modules=None if found is None else frozenset(found))
    experiment = load(experiment_file, [], task="train")
    if said is None:
        assert plan(experiment, fake_host("mthreads", 1), findings=findings).facts["chip"] == "mthreads"
        return
    with pytest.raises(InvalidInput, match=said):
        plan(experiment, fake_host("mthreads", 1), findings=findings)


SETTINGS = {
    "FLAGSCALE_PLATFORM": "npu",
    "FLAGSCALE_PLUGIN": "vendors_plugin",
    "FLAGSCALE_CUDA_HOOK": "vendors_hook",
    "MG_FL_PREFER": "npu",
}
REFUSALS = {
    "no plug-in": ({"plugin": False}, "vendors_plugin: ModuleNotFoundError: .*: install it for torch"),
    "no device": ({"devices": 0}, "torch.npu: vendors_plugin finds no device"),
    "another platform": ({"platform": "cuda"}, "selects the platform cuda, and the chip's is npu"),
    "no hook": ({"hook": False}, "vendors_hook: ModuleNotFoundError"),
    "a hook without effect": ({"cuda": False}, "torch.cuda, by which Megatron speaks to devices, does not"),
    "nothing": ({}, None),
}


@pytest.mark.megatron
@pytest.mark.parametrize("name", REFUSALS)
def test_a_worker_says_what_is_wrong_with_a_chip(name, tmp_path, monkeypatch):
    import torch

    from flagscale_train.worker import vendor
    from flagscale_train.worker.refusal import Refusal
    from flagscale_train.worker.settings import Settings

    given, said = REFUSALS[name]
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch, "npu", None, raising=False)
        answers = f"is_available=lambda: {given.get('devices', 1) > 0}"
        texts = {
            "vendors_plugin": f"import torch, types\ntorch.npu = types.SimpleNamespace({answers})",
            "vendors_hook": f"import torch\ntorch.cuda.is_available = lambda: {given.get('cuda', True)}",
        }
        for module, text in texts.items():
            if given.get(module.removeprefix("vendors_"), True):
                (tmp_path / f"{module}.py").write_text(text)
            patch.delitem(sys.modules, module, raising=False)
        platform = ModuleType("megatron.plugin.platform")
        platform.get_platform = lambda: SimpleNamespace(device_name=lambda: given.get("platform", "npu"))
        plugin = ModuleType("megatron.plugin")
        plugin.__spec__ = ModuleSpec("megatron.plugin", None)
        patch.setitem(sys.modules, "megatron.plugin", plugin)
        patch.setitem(sys.modules, "megatron.plugin.platform", platform)
        settings = Settings.from_environment(SETTINGS)
        if said is None:
            vendor.load(settings)
            return
        with pytest.raises(Refusal, match=said):
            vendor.load(settings)
