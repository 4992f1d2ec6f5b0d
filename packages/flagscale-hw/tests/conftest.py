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

from flagscale_hw import Machine, Plan, Process, Run, RunStatus, detect, launch
from flagscale_hw.detection import presence, sightings
from flagscale_hw.host import Host

# Generous on purpose: a busy machine must not turn a test red. What has to be quick has a limit of its own.
PATIENCE_S = 300.0

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


NODES = {
    "nvidia": "nvidia0",
    "ascend": "davinci0",
    "cambricon": "cambricon_dev0",
    "mthreads": "mtgpu.0",
    "metax": "mxcd",
    "iluvatar": "iluvatar0",
    "kunlunxin": "xpuctrl",
    "hygon": "mkfd",
    "tsingmicro": "accel_drv_mgr",
    "enflame": "gcu0",
    "thead": "alixpu_ppu0",
    "gaudi": "hl0",
}
"""Device nodes that only one driver makes."""


class Tree:
    """A host below a folder: a few files and tools that are shell scripts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ: dict[str, str] = {"PATH": "/usr/bin:/bin"}
        self.write(
            "proc/cpuinfo", "processor : 0\nmodel name : Test  CPU 9000\nprocessor : 1\nmodel name : x\n"
        )
        self.write("proc/meminfo", "MemTotal:       16384 kB\nMemFree: 1 kB\n")
        self.write("etc/hostname", "testhost\n")

    def write(self, path: str, text: str) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def pci(self, address: str, vendor: str, kind: str, device: str = "", driver: str = "") -> None:
        folder = f"sys/bus/pci/devices/{address}"
        self.write(f"{folder}/vendor", vendor + "\n")
        self.write(f"{folder}/class", kind + "\n")
        if device:
            self.write(f"{folder}/device", device + "\n")
        if driver:
            (self.root / folder / "driver").symlink_to(f"/nowhere/{driver}")

    def device(self, chip: str) -> None:
        """Make a device node by which the chip is recognised."""
        self.write(f"dev/{NODES[chip]}", "")

    def tool(self, script: str, name: str = "nvidia-smi") -> None:
        self.write(f"usr/bin/{name}", "#!/bin/sh\n" + script)
        (self.root / f"usr/bin/{name}").chmod(0o755)

    def prints(self, *lines: str, code: int = 0, name: str = "nvidia-smi") -> None:
        text = "\n".join(lines)
        self.tool(f"cat <<'END'\n{text}\nEND\nexit {code}\n", name)

    def answers(self, name: str, answers: dict[str, str]) -> None:
        """Make a tool that prints one text for each beginning of its arguments, and fails for others."""
        cases = ""
        for number, (arguments, text) in enumerate(answers.items()):
            self.write(f"answers/{name}.{number}", text)
            cases += f"{arguments!r}*) cat {self.root}/answers/{name}.{number};;\n"
        self.tool(f'case "$*" in\n{cases}*) echo "unknown option: $*" >&2; exit 9;;\nesac\n', name)

    def detect(self, timeout_s: float = 20.0) -> Machine:
        return detect(Host(root=self.root, environ=self.environ), timeout_s=timeout_s)

    def presence(self) -> list[str]:
        return presence(Host(root=self.root, environ=self.environ))

    def seen(self) -> dict[str, str]:
        found = sightings(Host(root=self.root, environ=self.environ))
        return {sighting.backend.chip: sighting.presence for sighting in found if sighting.presence != "none"}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "root")
