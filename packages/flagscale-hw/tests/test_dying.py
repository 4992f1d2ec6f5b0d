"""kill -9 of anything: no process of the run survives ten seconds, and the status tells what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from flagscale_hw import StopPolicy, open_run

LIMIT_S = 10.0

LAUNCHER = """
import sys, time
from pathlib import Path
from flagscale_hw import Plan, launch
run = launch(Plan.from_json(Path(sys.argv[1]).read_text()), sys.argv[2], detach=sys.argv[3] == "detach")
print("launched", flush=True)
time.sleep(float(sys.argv[4]))
"""


def test_the_supervisor_is_killed(keeper):
    run, members = keeper.start_tree()
    keeper.kill(keeper.pid_of(run, "supervisor"))
    keeper.until(lambda: keeper.survivors(members) == [], LIMIT_S)
    status = run.wait(keeper.patience_s)
    assert (status.state, status.exit_code) == ("failed", 4)
    assert status.reason == "the supervisor was killed by signal 9"
    assert status.processes[0].signal == signal.SIGKILL
    assert keeper.start_time(keeper.pid_of(run, "guardian")) is None
    assert json.loads((run.dir / "manifest.json").read_text())["result"]["state"] == "failed"


def test_the_guardian_is_killed(keeper):
    run, members = keeper.start_tree()
    keeper.kill(keeper.pid_of(run, "guardian"))
    keeper.until(lambda: keeper.survivors(members) == [], LIMIT_S)
    status = run.wait(keeper.patience_s)
    assert (status.state, status.reason) == ("failed", "the guardian of the run was killed")
    keeper.until(lambda: keeper.start_time(keeper.pid_of(run, "supervisor")) is None)


def test_a_process_is_killed(keeper):
    run, members = keeper.start_tree()
    keeper.kill(run.status().processes[0].pid)
    keeper.until(lambda: keeper.survivors(members) == [], LIMIT_S)
    status = run.wait(keeper.patience_s)
    assert status.state == "failed"
    assert status.reason.startswith("a: killed by signal 9 (SIGKILL), which this run did not send")


def test_a_grandchild_is_killed_and_that_is_the_business_of_its_parent(keeper):
    run, members = keeper.start_tree()
    process = run.status().processes[0].pid
    keeper.kill(next(pid for pid, _ in members if pid != process))
    keeper.until(lambda: len(keeper.survivors(members)) < len(members))
    assert run.status().state == "running"


def test_supervisor_and_guardian_are_both_killed(keeper):
    run, members = keeper.start_tree()
    os.kill(keeper.pid_of(run, "guardian"), signal.SIGSTOP)  # so that it cannot clean up in between
    keeper.kill(keeper.pid_of(run, "supervisor"))
    keeper.kill(keeper.pid_of(run, "guardian"))
    keeper.until(lambda: run.status().is_over)
    status = run.status()
    assert (status.state, status.exit_code) == ("lost", 4)
    # Nobody is left to end the process: the kernel does, by the signal that its parent's death sends.
    process = (status.processes[0].pid, status.processes[0].start_time)
    keeper.until(lambda: keeper.survivors([process]) == [], LIMIT_S)
    assert run.stop().state == "lost"  # and yet nothing carries the mark of the run any more
    assert keeper.survivors(members) == []


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_run_bound_to_its_launcher_ends_with_it(keeper, tmp_path, how):
    launcher, run, members = _launched_by_another(
        keeper, tmp_path, "bound", 600.0 if how == "killed" else 0.0
    )
    if how == "killed":
        launcher.kill()
    launcher.wait()
    keeper.until(lambda: keeper.survivors(members) == [], LIMIT_S)
    status = run.wait(keeper.patience_s)
    assert (status.state, status.exit_code) == ("failed", 4)
    assert status.reason == f"its launcher (pid {launcher.pid}) ended before the run did"


def test_a_run_let_go_outlives_its_launcher(keeper, tmp_path):
    launcher, run, members = _launched_by_another(keeper, tmp_path, "detach", 600.0)
    launcher.kill()
    launcher.wait()
    assert run.wait(0.5).state == "running"
    assert keeper.survivors(members) == [pid for pid, _ in members]


def _launched_by_another(keeper, tmp_path, mode, life_s):
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(keeper.plan(keeper.python(keeper.tree_code)).to_json(masked=False))
    place = tmp_path / "run"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(plan_file), str(place), mode, str(life_s)],
        stdout=subprocess.PIPE,
    )
    with launcher.stdout as said:
        assert said.readline() == b"launched\n"
    run = open_run(place)
    keeper.runs.append(run)
    # A launcher that ends at once takes the tree with it before the tree has grown.
    members = keeper.tree_of(place) if life_s else []
    return launcher, run, members


def test_a_launcher_killed_while_launching_leaves_nothing(keeper, tmp_path):
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(keeper.plan(keeper.shell("setsid sleep 600")).to_json(masked=False))
    for number in range(5):
        place = tmp_path / f"killed{number}"
        words = [str(plan_file), str(place), "bound", "600"]
        launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, *words], stdout=subprocess.DEVNULL)
        if number:
            keeper.until(place.exists)
        try:
            launcher.wait(0.02 * number)
        except subprocess.TimeoutExpired:
            launcher.kill()
        launcher.wait()
        keeper.until(lambda place=place: keeper.carrying(str(place)) == [], LIMIT_S)


def test_the_supervisor_is_asked_to_end_by_somebody_else(keeper):
    run, members = keeper.start_tree(stop=StopPolicy(grace_s=0.2))
    os.kill(keeper.pid_of(run, "guardian"), signal.SIGTERM)  # as a container does to what it finds
    assert run.wait(keeper.patience_s).state == "stopped"
    assert keeper.survivors(members) == []


def test_a_supervisor_that_hangs_is_helped_out(keeper, monkeypatch):
    monkeypatch.setattr("flagscale_hw.runs._END_LIMIT_S", 1.0)
    run, members = keeper.start_tree()
    os.kill(keeper.pid_of(run, "supervisor"), signal.SIGSTOP)
    run.stop(grace_s=0.0)
    keeper.until(lambda: keeper.survivors(members) == [])
    assert run.wait(keeper.patience_s).reason == "the supervisor was killed by signal 9"


def test_a_process_that_never_stops_forking_is_ended(keeper):
    code = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    if os.fork():
        time.sleep(0.01)
        os._exit(0)
    os.setsid()
"""
    run = keeper.start(keeper.python(code), keeper.shell("exec sleep 600"))
    status = run.stop(grace_s=0.5)
    assert status.state in {"stopped", "succeeded"}
    assert keeper.carrying(keeper.run_id(run)) == []
