"""A tool that hangs costs the timeout and leaves nothing; one that fails in any other way raises nothing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from flagscale_hw import cli, detect
from flagscale_hw.asking import Asker, read_messages
from flagscale_hw.backends import nvml
from flagscale_hw.doctor import examine
from flagscale_hw.host import Answer, Host

CAPTURES = Path(__file__).parent / "captures"

TOOLS = {
    "nvidia": "nvidia-smi",
    "ascend": "npu-smi",
    "cambricon": "cnmon",
    "mthreads": "mthreads-gmi",
    "metax": "mx-smi",
    "iluvatar": "ixsmi",
    "kunlunxin": "xpu-smi",
    "hygon": "hy-smi",
    "tsingmicro": "tsm_smi",
    "enflame": "efsmi",
    "thead": "ppu-smi",
    "gaudi": "hl-smi",
}

# A tool with a child, a grandchild in a session of its own, and an orphan that nobody is the parent of.
STUCK = """trap '' TERM HUP
sleep 600 &
setsid sh -c 'sleep 601 & sleep 602' &
( setsid sleep 603 & )
echo started > {root}/started
sleep 604
"""


def _left(root):
    """Return the living processes that were started below this root."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                has_it = f"MARK={root}".encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if has_it and state not in "ZX":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("chip", sorted(TOOLS))
def test_a_tool_that_hangs_costs_the_timeout_once_and_leaves_nothing(tree, keeper, chip):
    tree.device(chip)
    tree.environ["MARK"] = str(tree.root)
    tree.tool(STUCK.format(root=tree.root), TOOLS[chip])
    started = time.monotonic()
    machine = tree.detect(timeout_s=1.5)
    assert (
        time.monotonic() - started < keeper.patience_s
    )  # several questions, one deadline; the machine may be busy
    assert machine.devices == ()
    assert "no answer within 1.5 s; it was killed" in machine.problems[0].text
    assert len(machine.problems) == 1 or (tree.root / "started").exists()
    keeper.until(lambda: _left(tree.root) == [])


def test_a_hang_at_the_second_card_keeps_the_first(tree):
    tree.device("metax")
    for number, place in enumerate(("7a", "7b", "7c")):
        tree.pci(f"0000:{place}:00.0", "0x9999", "0x030200", f"0x000{number}")
    lines = (CAPTURES / "metax-table.txt").read_text().splitlines()
    (tree.root / "part").write_text("\n".join(lines[:15]) + "\n")
    tree.tool(f"cat {tree.root}/part; sleep 600", "mx-smi")
    machine = tree.detect(timeout_s=2.0)
    first, second, third = machine.devices
    assert (first.index, first.name, first.health) == (4, "MetaX C550", "ok")
    assert (second.pci_bus, second.name, second.health) == ("0000:7b:00.0", None, "unresponsive")
    assert (third.pci_bus, third.health) == ("0000:7c:00.0", None)
    assert len({device.index for device in machine.devices}) == 3
    assert any("no answer within 2 s" in problem.text for problem in machine.problems)


def test_a_vendor_that_hangs_does_not_delay_the_others(tree):
    tree.device("metax")
    tree.device("enflame")
    tree.device("ascend")
    for tool in ("mx-smi", "npu-smi"):
        tree.tool("sleep 600", tool)
    tree.answers("efsmi", {"-q": (CAPTURES / "enflame-report.txt").read_text()})
    machine = tree.detect(timeout_s=3.0)
    assert [device.name for device in machine.devices] == ["L300"]
    slow = [vendor.elapsed_ms for vendor in machine.vendors if vendor.chip != "enflame"]
    assert sum(1 for problem in machine.problems if "no answer" in problem.text) == 2
    assert all(elapsed >= 2900 for elapsed in slow)


def test_all_questions_of_a_vendor_share_one_deadline(monkeypatch):
    given = []

    def run(self, argv, timeout_s):
        given.append(timeout_s)
        time.sleep(0.3)
        return Answer("", "", 0)

    monkeypatch.setattr(Host, "run", run)
    asker = Asker(Host(Path("/nowhere")), "metax", 100.0)
    asker.run(["one"])
    asker.run(["two"])
    assert given[0] <= 100.0
    assert given[1] <= given[0] - 0.3


@pytest.mark.parametrize("chip", sorted(TOOLS))
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", "no message"),
        ("echo 'driver not loaded' >&2; exit 6", "driver not loaded"),
        ("echo 'driver not loaded'; exit 0", "driver not loaded"),
        ("kill -SEGV $$", "ended by signal 11"),
        ("head -c 20000 /dev/urandom", ""),
    ],
)
def test_a_tool_that_fails_is_quoted(tree, chip, script, said):
    tree.device(chip)
    tree.tool(script, TOOLS[chip])
    machine = tree.detect()
    assert machine.devices == ()
    assert machine.problems
    assert any(said in problem.text for problem in machine.problems)
    assert {problem.where for problem in machine.problems} == {chip}


def test_a_tool_that_works_and_complains_is_believed_and_quoted(tree):
    tree.device("enflame")
    tree.write("answers/report", (CAPTURES / "enflame-report.txt").read_text())
    tree.tool(f"echo 'card 3 fell off the bus' >&2; cat {tree.root}/answers/report; exit 2", "efsmi")
    machine = tree.detect()
    assert [device.name for device in machine.devices] == ["L300"]
    assert [problem.text for problem in machine.problems] == ["efsmi: card 3 fell off the bus"]


def test_a_slow_tool_is_waited_for(tree):
    tree.device("enflame")
    tree.write("answers/report", (CAPTURES / "enflame-report.txt").read_text())
    tree.tool(f"sleep 1; cat {tree.root}/answers/report", "efsmi")
    assert [device.name for device in tree.detect().devices] == ["L300"]


def test_a_file_that_is_no_program_is_said(tree):
    tree.device("enflame")
    tree.tool("", "efsmi")
    (tree.root / "usr/bin/efsmi").write_bytes(b"\x7fELF\x01\x01\x01" + bytes(60))  # of another machine
    machine = tree.detect()
    assert "efsmi: Exec format error" in machine.problems[0].text


def test_output_without_end_is_cut(tree):
    tree.device("enflame")
    tree.tool("yes 'DEV ID 1' | head -c 30000000", "efsmi")
    machine = tree.detect(timeout_s=60.0)
    assert len(machine.devices) == 1024


def test_a_backend_with_a_bug_hides_no_other(tree, monkeypatch):
    tree.device("metax")
    tree.device("enflame")
    tree.answers("efsmi", {"-q": (CAPTURES / "enflame-report.txt").read_text()})
    monkeypatch.setattr("flagscale_hw.backends.metax.look", lambda host, timeout_s: 1 / 0)
    machine = tree.detect()
    assert machine.chip == "enflame"
    (problem,) = [problem for problem in machine.problems if problem.where == "metax"]
    assert problem.text == "its backend broke: ZeroDivisionError: division by zero"


# The library route: real processes and, where there is no such library, the loader's own words.


def _library(*names):
    return Asker(Host(), "nvidia", 20.0).library("flagscale_hw.backends.nvml", "nvidia", "nvml", *names)


def test_a_library_that_is_not_there_is_said():
    found = _library("libno-such-thing.so.1")
    (problem,) = found.problems
    assert problem.text.startswith(
        "libno-such-thing.so.1 cannot be loaded: libno-such-thing.so.1: cannot open"
    )


def test_a_library_for_another_machine_is_said(tmp_path):
    header = b"\x7fELF\x01\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + (3).to_bytes(2, "little")
    (tmp_path / "libnvidia-ml.so.1").write_bytes(header + bytes(100))  # 32 bits
    (problem,) = _library(str(tmp_path / "libnvidia-ml.so.1")).problems
    assert "wrong ELF class" in problem.text


def test_a_library_that_is_none_of_nvidias_is_said():
    (problem,) = _library("libc.so.6").problems
    assert problem.text == "libc.so.6: nvmlInit_v2: the driver is too old for it"


HELPER = """
import json, os, sys, time
print("the library greets", flush=True)
print(json.dumps({{"device": {{"index": 0, "chip": "nvidia", "name": "A"}}}}), flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("time.sleep(600)", "its library: no answer within 2 s; it was killed"),
        ("os.abort()", "its library: ended by signal 6"),
        ("sys.stderr.write('oh dear'); sys.exit(3)", "its library: oh dear"),
        ("print('{}')", "its library:"),
    ],
)
def test_a_library_that_dies_keeps_what_it_said(tmp_path, monkeypatch, then, said):
    (tmp_path / "flagscale_hw").mkdir()
    (tmp_path / "flagscale_hw/helper_of_a_test.py").write_text(HELPER.format(then=then))
    host = Host()
    run = lambda module, timeout_s, *arguments: host.run(  # noqa: E731
        [sys.executable, str(tmp_path / "flagscale_hw/helper_of_a_test.py")], timeout_s
    )
    monkeypatch.setattr(Host, "run_module", lambda self, *arguments: run(*arguments))
    found = Asker(host, "nvidia", 2.0).library("any")
    assert [device.name for device in found.devices] == ["A"]
    assert any(said in problem.text for problem in found.problems)


def test_messages_that_are_none_are_ignored():
    found, is_done = read_messages('[1]\nnull\n{"other": 1}\n{"done": true}\nnoise {')
    assert (found.devices, found.problems, is_done) == ((), (), True)


def test_nvml_under_another_prefix():
    class Library:
        hgmlErrorString = staticmethod(lambda code: b"gone")  # noqa: N815
        hgmlInit_v2 = staticmethod(lambda: 9)  # noqa: N815

    (message,) = nvml.describe(Library(), "thead", "hgml", "libhgml.so")
    assert message == {"problem": {"where": "thead", "text": "libhgml.so: hgmlInit_v2: gone"}}


def test_the_environment_says_how_long_a_tool_may_take(tree):
    tree.device("enflame")
    tree.environ["FLAGSCALE_HW_TIMEOUT"] = "0.5"
    tree.tool("sleep 600", "efsmi")
    host = Host(root=tree.root, environ=tree.environ)
    (problem,) = detect(host).problems
    assert "no answer within 0.5 s" in problem.text
    assert "give it longer (FLAGSCALE_HW_TIMEOUT=60)" in problem.hint
    (finding,) = [one for one in examine(host) if one.code == "HW104"]
    assert not finding.is_good
    tree.environ["FLAGSCALE_HW_TIMEOUT"] = "60"
    tree.answers("efsmi", {"-q": (CAPTURES / "enflame-report.txt").read_text()})
    assert [device.name for device in detect(host).devices] == ["L300"]


@pytest.mark.parametrize("wrong", ["soon", "0", "-1", "nan", "601"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(wrong, monkeypatch, capsys):
    monkeypatch.setenv("FLAGSCALE_HW_TIMEOUT", wrong)
    assert cli.main([]) == 2
    assert f"FLAGSCALE_HW_TIMEOUT: {wrong!r}: give seconds, above 0" in capsys.readouterr().err
