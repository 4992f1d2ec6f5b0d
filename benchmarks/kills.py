"""Does anything outlive a service of which one part is killed? `kill -9` of each part in turn.

    python benchmarks/kills.py [--trials 100] [--engine vllm --python PYTHON] [--json FILE]

Each trial starts a service by `flagscale_serve.run`, kills one part with SIGKILL at a moment that differs,
and looks whether within 10 s all its processes are gone and its port is free. The parts: the supervisor, the
guardian, the engine, and a process of the engine's own. The engine is the stand-in of the tests, so that a
trial takes a second; it has the manners of a bad one: its own process left its session and ignores SIGTERM.
With `--engine vllm` it is a real vLLM with a tiny model, which PYTHON has, and its own process is the core.
No instance is started again (`max_restarts` 0). Bound: 100 of 100. Exits 1 when anything was left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import flagscale_hw as hw
import flagscale_serve as serve

TESTS = Path(__file__).parents[1] / "packages/flagscale-serve/tests"
LIMIT_S = 10.0
PARTS = ("supervisor", "guardian", "engine", "the engine's own")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--engine", choices=("stand-in", "vllm"), default="stand-in")
    parser.add_argument("--python", metavar="PYTHON", help="interpreter that has vLLM, for --engine vllm")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if (given.engine == "vllm") != (given.python is not None):
        parser.error("--engine vllm and --python PYTHON go together")
    with tempfile.TemporaryDirectory(prefix="flagscale-kills-") as name:
        os.environ["FLAGSCALE_STATE_DIR"] = f"{name}/state"
        place = RealPlace(Path(name), given.python) if given.python else Place(Path(name))
        found = [place.trial(number) for number in range(given.trials)]
    clean = [one for one in found if not one["left"]]
    print(f"{len(clean)} of {len(found)} trials left no process and no port after {LIMIT_S:g} s")
    for part in PARTS:
        times = sorted(one["gone_s"] for one in clean if one["part"] == part)
        if times:
            print(f"  {part:<18} {len(times):4} trials, gone after at most {times[-1]:.2f} s")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if len(clean) == len(found) else 1


class Place:
    """A model without weights, and the stand-in for an engine."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}')
        (self.model / "tokenizer.json").write_text("{}")
        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        weights = len(header).to_bytes(8, "little") + header + bytes(4)
        (self.model / "model.safetensors").write_bytes(weights)
        python = folder / "python"
        python.write_text(f"#!{sys.executable}\n{(TESTS / 'fake_engine.py').read_text()}")
        python.chmod(0o755)
        self.python = str(python)
        self.pids = folder / "pids"
        os.environ |= {"FAKE_PIDS": str(self.pids), "FAKE_MODE": "family"}

    def own_of(self, engine: int) -> int:
        """Return the process that an engine has started."""
        (own,) = {int(pid) for pid in self.pids.read_text().split()} - {engine}
        self.pids.unlink()
        return own

    def trial(self, number: int) -> dict[str, object]:
        options = serve.Options(engine="vllm", python=self.python, max_restarts=0)
        run = serve.run(str(self.model), options=options)
        recorded = json.loads((run.dir / "supervisor.json").read_text())
        (engine,) = (process.pid for process in run.status().processes)
        parts = [recorded["supervisor"]["pid"], recorded["guardian"]["pid"], engine, self.own_of(engine)]
        pids = [*parts, *below(parts[1])]
        (port,) = run.status().ports.values()
        part = number % len(PARTS)
        time.sleep(random.Random(number).random() / 4)
        began = time.monotonic()
        os.kill(parts[part], signal.SIGKILL)
        if PARTS[part] == "the engine's own":
            run.stop(1.0)  # the engine may live without it, so the service goes on until it is stopped
        while (left := remains(pids, port)) and time.monotonic() - began < LIMIT_S:
            time.sleep(0.02)
        gone_s = time.monotonic() - began
        if left:
            print(f"trial {number}: {PARTS[part]} killed: left after {LIMIT_S:g} s: {', '.join(left)}")
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        hw.open_run(run.dir).status()
        return {"part": PARTS[part], "processes": len(set(pids)), "gone_s": gone_s, "left": left}


class RealPlace(Place):
    """A tiny model with random weights, and vLLM."""

    def __init__(self, folder: Path, python: str) -> None:
        self.python = python
        self.model = folder / "model"
        words = [python, TESTS / "engines/tiny_model.py", self.model, "x", "1"]
        subprocess.run(words, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    def own_of(self, engine: int) -> int:
        (core,) = (pid for pid in below(engine) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
        return core


def below(pid: int) -> set[int]:
    """Return every process that descends from one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def remains(pids: list[int], port: int) -> list[str]:
    found = [f"pid {pid}" for pid in pids if is_alive(pid)]
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            found.append(f"port {port}")
    return found


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


if __name__ == "__main__":
    sys.exit(main())
