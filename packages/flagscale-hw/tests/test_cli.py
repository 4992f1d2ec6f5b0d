"""The command: what it prints, and what it exits with."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

import flagscale_hw
from flagscale_hw import cli
from flagscale_hw.doctor import CODES
from flagscale_hw.testing import fake_host, faked_host


@pytest.fixture
def machine(monkeypatch):
    found = fake_host("nvidia", 2)
    monkeypatch.setattr("flagscale_hw.detection.detect", lambda **_: found)
    return found


def test_the_table(machine, capsys):
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fake: Fake CPU, 64 CPUs, 512.0 GiB"
    assert " ".join(lines[3].split()) == (
        "0 nvidia NVIDIA H100 80GB HBM3 0.0 / 80.0 GiB 0% 30 C 70 / 700 W - 0 0000:01:00.0"
    )
    assert lines[-1] == "2 x nvidia: torch device cuda, collectives nccl"


def test_json(machine, capsys):
    assert cli.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "flagscale-hw/1"
    assert [device["uuid"] for device in said["devices"]] == [device.uuid for device in machine.devices]


@pytest.mark.parametrize(("required", "code"), [([], 0), (["2"], 0), (["3"], 3)])
def test_a_script_can_require_devices(machine, capsys, required, code):
    assert cli.main(["--json", "--require", *required]) == code
    said = capsys.readouterr()
    assert json.loads(said.out)["primary"] == "nvidia"  # what is here is told all the same
    short = "error: --require 3: 2 of 2 devices of this machine can be used: flagscale-hw doctor says why\n"
    assert said.err == (short if code else "")


def test_a_bad_card_does_not_count(monkeypatch, capsys):
    found = fake_host("nvidia", 2)
    bad = replace(found, devices=(found.devices[0], replace(found.devices[1], health="bad")))
    monkeypatch.setattr("flagscale_hw.detection.detect", lambda **_: bad)
    assert cli.main(["--require"]) == 0
    assert cli.main(["--require", "2"]) == 3
    assert "1 of 2 devices" in capsys.readouterr().err


def test_one_vendor_of_several(capsys):
    with faked_host("ascend", 2):
        assert cli.main(["--timeout", "60", "--vendor", "nvidia,ascend", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["primary"] == "ascend"
        assert cli.main(["--vendor", "nvidia", "--require"]) == 3
        assert "no accelerator" in capsys.readouterr().out
    assert cli.main(["--vendor", "nvidai"]) == 2
    assert "error: vendor nvidai: not known: known are nvidia, " in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--vendor", "nvidia", "doctor"], ["--require", "2", "topo"]])
def test_an_option_that_would_be_ignored_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("words", [["env", "--devices", "1,0"], ["env"]])
def test_env_is_for_the_shell(machine, capsys, words):
    assert cli.main(words) == 0
    chosen = "1,0" if len(words) > 1 else "0,1"
    assert (
        capsys.readouterr().out
        == f"export CUDA_DEVICE_ORDER=PCI_BUS_ID\nexport CUDA_VISIBLE_DEVICES={chosen}\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["env", "--devices", "7"], "error: device 7: this process has 0 to 1\n"),
        (
            ["env", "--devices", "x"],
            "error: device 'x': neither a number nor the UUID of a device of this process\n",
        ),
        (["env", "--devices", "1,1"], "error: devices 1,1: one is named twice: name each device once\n"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(machine, capsys, words, said):
    assert cli.main(words) == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [["nosuch"], ["--timeout", "0"], ["--timeout", "x"], ["--nosuch"]])
def test_words_that_are_not_known(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2


def test_a_bug_is_code_1_and_a_traceback_only_on_request(monkeypatch, capsys):
    def broken(**_):
        raise RuntimeError("oops")

    monkeypatch.setattr("flagscale_hw.detection.detect", broken)
    assert cli.main([]) == 1
    said = capsys.readouterr().err
    assert "a bug in flagscale-hw" in said
    assert "Traceback" not in said
    assert cli.main(["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flagscale_hw.detection.detect", interrupted)
    assert cli.main([]) == 130


def test_the_doctor(capsys):
    code = cli.main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == (0 if all(finding["is_good"] for finding in findings) else 3)
    assert {"launcher", "index of runs"} <= {finding["subject"] for finding in findings}
    assert {finding["code"] for finding in findings} <= set(CODES)
    assert all(finding["hint"] for finding in findings if not finding["is_good"])


def test_the_doctor_finds_an_index_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", "/proc/nowhere")
    assert cli.main(["doctor"]) == 3
    assert (
        "FAIL HW303 index of runs: /proc/nowhere/runs cannot be written: set FLAGSCALE_STATE_DIR"
        in capsys.readouterr().out
    )


def command(*words: str, **options: object) -> subprocess.Popen[str]:
    words = (sys.executable, "-m", "flagscale_hw", *words)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_leaves_is_no_error():
    with command("--json") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--json",), 0),
        (("env", "--devices", "99"), 2),
        (("--no-such-option",), 2),
        (("--help",), 0),
        (("--require", "99"), 3),
        (("fake", "enflame", "--garbage", "--", sys.executable, "-m", "flagscale_hw", "doctor"), 3),
        (("fake", "enflame", "--garbage", "--", sys.executable, "-m", "flagscale_hw", "doctor", "--json"), 3),
    ],
)
def test_a_reader_of_output_and_errors_that_leaves_changes_no_exit_code(words, code):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as out:
        command = (sys.executable, "-m", "flagscale_hw", *words)
        env = {**os.environ, "PYTHONUNBUFFERED": ""}  # where it is set, nothing is left for the exit
        assert (
            subprocess.run(command, stdout=out, stderr=out, env=env, timeout=120, check=False).returncode
            == code
        )


@pytest.mark.parametrize(
    ("redirect", "code", "text"), [(">&-", 0, ""), ("<&-", 0, ""), (">/dev/full", 4, "No space left")]
)
def test_odd_outputs_are_no_bug(redirect, code, text):
    line = f'"{sys.executable}" -m flagscale_hw --json {redirect}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert text in done.stderr
    assert "bug" not in done.stderr


def test_help_is_quick():
    """By the processor's time, for on a busy machine the clock tells of the others."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with command("--help") as process:
            assert "usage: flagscale-hw" in process.stdout.read()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.6


def test_the_version():
    with command("--version") as process:
        assert process.stdout.read() == f"flagscale-hw {flagscale_hw.__version__}\n"
