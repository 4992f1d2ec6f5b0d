"""Faked hosts: the real detection takes them for machines, also when their tools misbehave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

import flagscale_hw
from flagscale_hw import CHIPS, DetectError, InputError, cli, peak
from flagscale_hw.host import Host
from flagscale_hw.testing import FAKED, Faults, fake_host, faked_host, write_host

PATIENCE_S = 60.0


def test_every_chip_but_the_mac_is_detected_from_files_and_tools():
    assert set(CHIPS) - set(FAKED) == {"mps"}
    assert fake_host("mps", 1).chip == "mps"


@pytest.mark.parametrize("chip", [chip for chip in FAKED if chip != "cpu"])
def test_a_faked_host_is_whole(chip):
    machine = fake_host(chip, 8)
    assert (machine.chip, machine.problems, machine.others) == (chip, (), ())
    assert [device.index for device in machine.devices] == list(range(8))
    for device in machine.devices:
        assert device.chip == chip
        assert device.name
        assert device.memory_total_bytes > 8 << 30
        assert device.pci_bus
    assert len({device.pci_bus for device in machine.devices}) == 8
    assert machine.vendors[0].source == "tool"
    assert (machine.num_cpus, machine.memory_bytes, machine.hostname) == (64, 512 << 30, "fake")
    json.dumps(machine.to_dict())


def test_the_faked_card_is_one_with_figures():
    assert peak(fake_host("nvidia", 1).devices[0].name, "bf16").flops_per_s == 989e12


def test_a_host_without_accelerators():
    assert fake_host("cpu").devices == ()
    assert fake_host("cpu").cpu_name == "Fake CPU"


@pytest.mark.parametrize(
    ("chip", "count"), [("cpu", 1), ("nvidia", 0), ("nvidia", -1), ("ascend", 65), ("mps", 2)]
)
def test_hosts_that_make_no_sense(chip, count):
    with pytest.raises(InputError, match=r"give 0 for `cpu`|a Mac has 1"):
        fake_host(chip, count)


def test_an_unknown_chip():
    with pytest.raises(DetectError, match="chip 'tpu': not known"):
        fake_host("tpu", 1)
    with pytest.raises(DetectError, match="chip 'mps': cannot be faked"), faked_host("mps", 1):
        pass


def test_the_block_is_seen_by_this_process_and_its_children(monkeypatch):
    monkeypatch.delenv("FLAGSCALE_HW_ROOT", raising=False)
    with faked_host("ascend", 2) as host:
        assert flagscale_hw.detect(timeout_s=PATIENCE_S).devices == fake_host("ascend", 2).devices
        code = "import flagscale_hw; print(flagscale_hw.detect(timeout_s=60).chip)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "ascend\n"
    assert "FLAGSCALE_HW_ROOT" not in os.environ
    assert not host.root.exists()
    monkeypatch.setenv("FLAGSCALE_HW_ROOT", "/before")
    with faked_host("cpu"):
        assert os.environ["FLAGSCALE_HW_ROOT"] != "/before"
    assert os.environ["FLAGSCALE_HW_ROOT"] == "/before"


def look(tmp_path, chip, faults, timeout_s=PATIENCE_S):
    write_host(tmp_path, chip, 4, faults=faults)
    return flagscale_hw.detect(Host(tmp_path, {"PATH": os.defpath}), timeout_s=timeout_s)


@pytest.mark.parametrize("chip", ["nvidia", "ascend", "hygon", "enflame"])
def test_a_tool_that_hangs_costs_its_deadline_and_leaves_the_bus(tmp_path, chip):
    started = time.monotonic()
    machine = look(tmp_path, chip, Faults(hang=True), timeout_s=1.0)
    assert time.monotonic() - started < 30  # it would be a day
    assert len(machine.devices) == 4
    assert {device.memory_total_bytes for device in machine.devices} == {None}
    assert any("no answer within" in problem.text for problem in machine.problems)


@pytest.mark.parametrize("chip", [chip for chip in FAKED if chip not in ("cpu", "tsingmicro")])
def test_garbage_is_never_a_number(tmp_path, chip):
    machine = look(tmp_path, chip, Faults(garbage=True))
    assert len(machine.devices) == 4
    for device in machine.devices:
        assert device.memory_used_bytes in (None, 0)
        assert device.temperature_c in (None, 30.0)  # what amdgpu's files say
    assert machine.problems


def test_a_slow_tool_is_waited_for(tmp_path):
    assert look(tmp_path, "ascend", Faults(slow_s=0.3)).devices[0].name == "910B2"


def test_a_tool_that_fails_is_quoted(tmp_path):
    machine = look(tmp_path, "ascend", Faults(garbage=True, exit_code=6))
    assert any("npu-smi" in problem.text for problem in machine.problems)


def test_the_verb_runs_a_command_there(capfd):
    code = "import flagscale_hw, sys; print(flagscale_hw.detect(timeout_s=60).chip); sys.exit(7)"
    assert cli.main(["fake", "metax", "--count", "2", "--", sys.executable, "-c", code]) == 7
    assert capfd.readouterr().out == "metax\n"


def test_the_verb_without_a_command_prints_the_table(capfd):
    assert cli.main(["--timeout", "60", "fake", "thead", "--count", "2"]) == 0
    said = capfd.readouterr().out
    assert "PPU-ZW810E" in said
    assert said.splitlines()[-1] == "2 x thead: torch device cuda, collectives nccl"


def test_the_verb_keeps_the_files(tmp_path, capfd):
    place = tmp_path / "host"
    assert cli.main(["fake", "enflame", "--count", "1", "--out", str(place), "--", "true"]) == 0
    assert (place / "usr/bin/efsmi").is_file()
    assert cli.main(["--timeout", "60", "replay", str(place)]) == 0
    assert "1 x enflame" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fake", "tpu"], "error: chip 'tpu': cannot be faked"),
        (["fake", "cpu", "--count", "3"], "error: fake host 'cpu' with 3 devices"),
        (["replay", "/nowhere/at/all"], "error: /nowhere/at/all: no recorded host"),
        (["fake", "cpu", "--count", "0", "--", "/nowhere/program"], "error: /nowhere/program: No such file"),
    ],
)
def test_mistakes_are_one_line(words, said, capfd):
    assert cli.main(words) in (2, 3)
    captured = capfd.readouterr()
    assert captured.err.startswith(said)
    assert "Traceback" not in captured.err


def test_programs_wait_for_the_scripts_of_a_busy_machine(monkeypatch, capfd):
    """A script that only prints cannot hang; one that is to be late is cut off as a real tool is."""
    monkeypatch.delenv("FLAGSCALE_HW_TIMEOUT", raising=False)
    assert Host().timeout_s == 3
    with faked_host("nvidia", 2) as host:
        assert host.timeout_s == 60
    with faked_host("nvidia", 2, faults=Faults(hang=True)) as host:
        assert host.timeout_s == 3
    say = [sys.executable, "-c", "from flagscale_hw.host import this_host; print(this_host().timeout_s)"]
    assert cli.main(["fake", "metax", "--", *say]) == 0
    assert cli.main(["fake", "metax", "--slow", "1", "--", *say]) == 0
    monkeypatch.setenv("FLAGSCALE_HW_TIMEOUT", "7")
    assert cli.main(["fake", "metax", "--", *say]) == 0
    assert capfd.readouterr().out.split() == ["60.0", "3.0", "7.0"]
    assert os.environ["FLAGSCALE_HW_TIMEOUT"] == "7"
