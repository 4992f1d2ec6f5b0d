"""What the tests of flagscale-hw share: runs that are always ended, and a view of /proc of their own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flagscale_hw import Plan, Process, Run, RunStatus, launch

# Generous on purpose: a busy machine must not turn a test red. What has to be quick has a limit of its own.
PATIENCE_S = 60.0

TREE = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
for depth in range(3):
    if os.fork():
        break
    os.setsid()
else:
    if os.fork() == 0:  # an orphan in a session of its own, as a daemon makes itself one
        os.setsid()
        if os.fork():
            os._exit(0)
start = open("/proc/self/stat").read().rpartition(")")[2].split()[19]
with open(f"writing.{os.getpid()}", "w") as out:
    out.write(start)
os.rename(f"writing.{os.getpid()}", f"member.{os.getpid()}")
time.sleep(600)
"""
"""A chain of processes, each in its own session, all deaf to SIGTERM, with an orphan at the end."""
TREE_SIZE = 5


def until(claim: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
    """Wait until a claim is true; fail when it does not become so."""
    deadline = time.monotonic() + limit_s
    while not claim():
        assert time.monotonic() < deadline, f"not true within {limit_s:g} s"
        time.sleep(0.02)


def start_time(pid: int) -> int | None:
    """Return the start time of a living process, None for a dead one and for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def carrying(text: str) -> list[int]:
    """Return the living processes that have a text in their environment or their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            for file in ("environ", "cmdline"):
                try:
                    has_it = text.encode() in (entry / file).read_bytes()
                except OSError:
                    has_it = False
                if has_it and start_time(int(entry.name)) is not None:
                    found.append(int(entry.name))
    return found


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-u", "-c", code)


def shell(code: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", code)


def tree_of(run_dir: Path, size: int = TREE_SIZE) -> list[tuple[int, int]]:
    """Wait for the whole tree and return pid and start time of its members."""
    until(lambda: len(list(run_dir.glob("member.*"))) == size)
    return [(int(path.suffix[1:]), int(path.read_text())) for path in run_dir.glob("member.*")]


def survivors(members: list[tuple[int, int]]) -> list[int]:
    return [pid for pid, started in members if start_time(pid) == started]


def run_id(run: Run) -> str:
    return str(json.loads((run.dir / "supervisor.json").read_text())["run_id"])


def pid_of(run: Run, role: str) -> int:
    """Return the pid of the `supervisor` or the `guardian`."""
    return int(json.loads((run.dir / "supervisor.json").read_text())[role]["pid"])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@dataclass
class Keeper:
    """Launches plans and ends whatever is still there after the test."""

    folder: Path
    runs: list[Run] = field(default_factory=list)

    # Tests are imported one by one, with no package around them: what they share comes as attributes.
    patience_s = PATIENCE_S
    until = staticmethod(until)
    start_time = staticmethod(start_time)
    parent = staticmethod(parent)
    carrying = staticmethod(carrying)
    survivors = staticmethod(survivors)
    tree_of = staticmethod(tree_of)
    tree_code = TREE
    python = staticmethod(python)
    shell = staticmethod(shell)
    run_id = staticmethod(run_id)
    pid_of = staticmethod(pid_of)
    kill = staticmethod(kill)

    def plan(self, *commands: tuple[str, ...], env: dict[str, str] | None = None, **rest: object) -> Plan:
        names = "abcdefgh"
        processes = tuple(
            Process(name=name, argv=argv, env=env or {}) for name, argv in zip(names, commands, strict=False)
        )
        return Plan(**{"kind": "test", "name": "a test", "processes": processes, **rest})

    def launch(self, plan: Plan, *, detach: bool = True) -> Run:
        run = launch(plan, self.folder / f"run{len(self.runs)}", detach=detach)
        self.runs.append(run)
        return run

    def start(self, *commands: tuple[str, ...], **rest: object) -> Run:
        return self.launch(self.plan(*commands, **rest))

    def finish(self, *commands: tuple[str, ...], **rest: object) -> RunStatus:
        status = self.start(*commands, **rest).wait(PATIENCE_S)
        assert status.is_over
        return status

    def start_tree(self, **rest: object) -> tuple[Run, list[tuple[int, int]]]:
        run = self.start(python(TREE), **rest)
        members = tree_of(run.dir)
        until(lambda: run.status().state != "starting")  # so that pids are on record
        assert run.status().state == "running", run.status()
        return run, members

    def end(self) -> None:
        for run in self.runs:
            if (run.dir / "supervisor.json").exists():
                run.stop(grace_s=0.0)
                assert carrying(run_id(run)) == []


@pytest.fixture(autouse=True)
def _own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    keeping = Keeper(tmp_path)
    yield keeping
    keeping.end()
