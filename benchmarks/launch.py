"""How long it takes to plan for 1,024 hosts, and to start and stop 64.

    python benchmarks/launch.py [--hosts 64]

Bounds: a plan for 1,024 hosts made and rendered in less than 1 s (CPU time, so that a busy machine does not
matter); 64 simulated hosts, each with an agent, a guardian and a supervisor of its own on this machine,
started and stopped in less than 20 s on 2 cores. As the physical limit beside it: starting as many bare
Python interpreters, 64 x 3, without doing anything in them. Exits 4 when a bound is not met.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flagscale_hw import Plan, Process, Target, launch, render_scripts, render_slurm

PLAN_BOUND_S, HOSTS_BOUND_S = 1.0, 20.0
NUM_OPTIONS = 150


def plan(count: int, *, code: str = "sleep 600", transport: str = "ssh") -> Plan:
    names = [f"node-{rank}" for rank in range(count)]
    options = (
        () if transport == "local" else tuple(f"--option-{number}=value" for number in range(NUM_OPTIONS))
    )
    return Plan(
        kind="train",
        name="bench",
        targets=tuple(Target(name=name, transport=transport, address="127.0.0.1") for name in names),
        processes=tuple(
            Process(
                name=f"train-{rank}",
                rank=rank,
                host=name,
                argv=("sh", "-c", code, "{address:node-0}", "{port:rendezvous}", "{node_rank}", *options),
                env={f"VARIABLE_{number}": "value" for number in range(20)},
            )
            for rank, name in enumerate(names)
        ),
        ports={"rendezvous": None},
    )


def planning() -> float:
    begun = time.process_time()
    made = plan(1024)
    made.to_json()
    render_slurm(made, "/exp/runs/1")
    render_scripts(made)
    return time.process_time() - begun


def starting(count: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as name:
        os.environ["FLAGSCALE_STATE_DIR"] = f"{name}/state"
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        begun = time.monotonic()
        run = launch(plan(count, transport="local"), Path(name) / "run")
        try:
            state = run.wait_ready(300).state
            started = time.monotonic() - begun
        finally:
            stopped = run.stop()
        assert (state, stopped.state) == ("running", "stopped"), stopped
        return started, time.monotonic() - begun - started


def bare(count: int) -> float:
    begun = time.monotonic()
    children = [subprocess.Popen([sys.executable, "-I", "-S", "-c", "pass"]) for _ in range(3 * count)]
    for child in children:
        child.wait()
    return time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=64)
    count = parser.parse_args().hosts
    planned_s = planning()
    print(f"plan for 1,024 hosts, made and rendered: {planned_s:.2f} s CPU (bound {PLAN_BOUND_S:g} s)")
    bare_s = bare(count)
    started_s, stopped_s = starting(count)
    total_s = started_s + stopped_s
    spent = f"started {started_s:.1f} s, stopped {stopped_s:.1f} s"
    print(f"{count} hosts: {spent} (bound {HOSTS_BOUND_S:g} s)")
    ratio = total_s / bare_s
    load = os.getloadavg()[0]
    print(f"{3 * count} bare interpreters: {bare_s:.1f} s: ratio {ratio:.1f}, load {load:.1f}")
    return 0 if planned_s < PLAN_BOUND_S and total_s < HOSTS_BOUND_S else 4


if __name__ == "__main__":
    raise SystemExit(main())
