"""A real host, recorded by `flagscale-hw record --redact`: two H200 of one NVSwitch in a virtual machine.

`recorded/h200-x2.golden.json` is what the host itself said when it was there, asked through NVIDIA's library,
and what its own `nvidia-smi topo -m` drew; the recording answers through nvidia-smi and must say the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flagscale_hw import cli

RECORDED = Path(__file__).parent / "recorded"
GOLDEN = json.loads((RECORDED / "h200-x2.golden.json").read_text())


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Run the command with the recorded host in the place of this one, and return its output."""
    kept = json.loads((RECORDED / "h200-x2.json").read_text())
    for path, text in kept["files"].items():
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o755 if path.startswith("usr/bin/") else 0o644)
    for path, target in kept["links"].items():
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
    monkeypatch.setenv("FLAGSCALE_HW_ROOT", str(tmp_path))
    for name in [name for name in os.environ if name.endswith("_VISIBLE_DEVICES")]:
        monkeypatch.delenv(name)

    def run(*words: str) -> str:
        assert cli.main(["--timeout", "60", *words]) == 0
        return capsys.readouterr().out

    return run


def test_it_is_detected_as_it_was_live(say):
    document = json.loads(say("--json"))
    assert document["problems"] == []
    assert {key: document["host"][key] for key in GOLDEN["host"]} == GOLDEN["host"]
    found = [
        {
            **{key: device[key] for key in golden if key in device},
            "memory_used_mib": device["usage"]["memory_used_mib"],
            "power_limit_w": device["usage"]["power_limit_w"],
        }
        for device, golden in zip(document["devices"], GOLDEN["devices"], strict=True)
    ]
    assert found == GOLDEN["devices"]
    assert document["topology"] == GOLDEN["topology"]


def test_its_links_are_those_of_the_switch_and_not_of_the_bus(say):
    assert json.loads(say("topo", "--json")) == GOLDEN["topology"]
    assert "NV18" in say("topo")


def test_doctor_finds_nothing_in_the_way(say):
    said = [line for line in say("doctor").splitlines() if " HW1" in line]
    assert said == GOLDEN["doctor"]


def test_its_devices_can_be_selected(say):
    assert say("env").splitlines() == GOLDEN["env"]
    assert say("env", "--devices", "1").splitlines()[-1] == "export CUDA_VISIBLE_DEVICES=1"


def test_nothing_in_it_tells_whose_host_it_was():
    text = (RECORDED / "h200-x2.json").read_text() + (RECORDED / "h200-x2.golden.json").read_text()
    from flagscale_hw.recording import _SECRET

    assert _SECRET.findall(text) == []
    assert '"hostname"' not in text
