"""What it costs to ask which chips a host has: against gpustack-runtime and a bare walk over the bus.

    python benchmarks/detect.py [--peer /path/to/python] [--wheel dist/flagscale_hw-*.whl]

The peer is the interpreter of an environment with gpustack-runtime 0.2.6; without one its column is empty.
Every figure is the best of many, taken in turn so that a busy machine hurts all alike; hosts are directory
trees, so that a machine with accelerators measures the same. Exits 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 7
CALLS = 15
# How long a first call takes is mostly how long Python takes to import its own library: shown, not bounded.
FIRST = "import and first call"
BOUNDS_MS = {"import": 20.0, "empty host": 10.0, "400 PCI devices": 20.0}
HUNG_BOUND_S = 3.0 + 1.0  # the timeout, and what a busy machine needs to start and to end a process
WHEEL_BOUND = 300_000

OURS = """
import json, sys, time
clock = time.perf_counter
start = clock()
import flagscale_hw
imported = clock() - start
from pathlib import Path  # as every program has it
start = clock()
from flagscale_hw.host import Host
flagscale_hw.detect(Host(Path(sys.argv[1]), {}))
first_call = clock() - start
def cost(root, calls=%d):
    taken = []
    for _ in range(calls):
        start = clock(); flagscale_hw.detect(Host(Path(root), {})); taken.append(clock() - start)
    return taken
figures = {"import": imported, "import and first call": imported + first_call}
figures |= {"empty host": min(cost(sys.argv[1])), "400 PCI devices": min(cost(sys.argv[2]))}
print(json.dumps(figures))
"""

# What every tool of this kind must at least do: list the bus and read each vendor.
BARE = """
import json, os, sys, time
clock = time.perf_counter
def walk(root):
    base = root + "/sys/bus/pci/devices"
    for name in os.listdir(base) if os.path.isdir(base) else ():
        with open(f"{base}/{name}/vendor") as file:
            file.read()
def cost(root):
    taken = []
    for _ in range(%d):
        start = clock(); walk(root); taken.append(clock() - start)
    return min(taken)
print(json.dumps({"empty host": cost(sys.argv[1]), "400 PCI devices": cost(sys.argv[2])}))
"""

# It has no notion of another root, so it looks at this machine, and remembers what it saw: one call counts.
PEER = """
import json, time
calls = %d
start = time.perf_counter()
from gpustack_runtime.detector import detect_devices
imported = time.perf_counter() - start
detect_devices(fast=False)
print(json.dumps({"import": imported, "import and first call": time.perf_counter() - start}))
"""


def ask(python: str, code: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [python, "-c", code % CALLS, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def best(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(sample[name] for sample in samples) for name in samples[0]}


def trees(folder: Path) -> tuple[str, str]:
    empty, full = folder / "empty", folder / "full"
    empty.mkdir()
    for number in range(400):
        place = full / f"sys/bus/pci/devices/0000:{number // 32:02x}:{number % 32:02x}.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text("0x8086\n")
        (place / "class").write_text("0x060000\n")
        (place / "device").write_text("0x1234\n")
    return str(empty), str(full)


def hung(folder: Path) -> float:
    """Return the seconds that a tool costs which never answers."""
    from flagscale_hw import detect
    from flagscale_hw.host import Host

    tool = folder / "hung/usr/bin/mx-smi"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\ntrap '' TERM\nsleep 600 &\nsleep 600\n")
    tool.chmod(0o755)
    (folder / "hung/dev").mkdir()
    (folder / "hung/dev/mxcd").write_text("")
    start = time.perf_counter()
    detect(Host(folder / "hung"))
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="interpreter of an environment with gpustack-runtime 0.2.6")
    parser.add_argument("--wheel", type=Path)
    options = parser.parse_args()
    ours, bare, peer = [], [], []
    with tempfile.TemporaryDirectory() as name:
        empty, full = trees(Path(name))
        for _ in range(ROUNDS):
            ours.append(ask(sys.executable, OURS, empty, full))
            bare.append(ask(sys.executable, BARE, empty, full))
            if options.peer:
                peer.append(ask(options.peer, PEER))
        hung_s = hung(Path(name))
    if not peer:
        print("gpustack-runtime: not measured (name its interpreter with --peer)")
    broken = report(best(ours), best(bare), best(peer) if peer else {})
    print(f"{'a tool that hangs':24} {hung_s:9.2f} s    bound {HUNG_BOUND_S:g} s")
    broken += ["a tool that hangs"] if hung_s > HUNG_BOUND_S else []
    if options.wheel:
        size = options.wheel.stat().st_size
        print(f"{'wheel':24} {size / 1000:9.1f} kB   bound {WHEEL_BOUND / 1000:g} kB")
        broken += ["wheel"] if size > WHEEL_BOUND else []
    print("within all bounds" if not broken else f"bound broken: {', '.join(broken)}")
    return 1 if broken else 0


def report(ours: dict[str, float], bare: dict[str, float], peer: dict[str, float]) -> list[str]:
    print(f"{'milliseconds':24} {'ours':>9} {'bare':>9} {'x bare':>7} {'peer':>9} {'peer/ours':>9}   bound")
    broken = []
    for name in (*BOUNDS_MS, FIRST):
        mine, least, other = ours[name] * 1000, bare.get(name, 0.0) * 1000, peer.get(name, 0.0) * 1000
        columns = [f"{least:9.2f} {mine / least:7.1f}" if least else f"{'-':>9} {'-':>7}"]
        columns.append(f"{other:9.2f} {other / mine:9.1f}" if other else f"{'-':>9} {'-':>9}")
        print(f"{name:24} {mine:9.2f} {' '.join(columns)}   {BOUNDS_MS.get(name, '-')}")
        broken += [name] if mine > BOUNDS_MS.get(name, mine) else []
    return broken


if __name__ == "__main__":
    sys.exit(main())
