"""Stopping: from anywhere, with patience, and never a process that is not proven to be ours."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from flagscale_hw import LaunchError, StopPolicy, open_run

STOPPER = """
import sys
from flagscale_hw import open_run
print(open_run(sys.argv[1]).stop(float(sys.argv[2])).state)
"""


def test_stop_from_another_process(keeper):
    run, members = keeper.start_tree()
    done = subprocess.run(
        [sys.executable, "-c", STOPPER, str(run.dir), "0.2"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "stopped\n"
    assert keeper.survivors(members) == []
    assert run.status().state == "stopped"
    assert run.stop().state == "stopped"  # again is no harm


def test_stop_of_a_finished_run_changes_nothing(keeper):
    run = keeper.start(keeper.shell("exit 0"))
    before = run.wait(keeper.patience_s)
    assert run.stop() == before


def test_nothing_lives_any_more_when_the_end_is_on_record(keeper):
    run, members = keeper.start_tree(stop=StopPolicy(grace_s=0.1))
    os.kill(keeper.pid_of(run, "supervisor"), signal.SIGTERM)
    keeper.until(lambda: '"is_over": true' in (run.dir / "state.json").read_text())
    assert keeper.survivors(members) == []


def test_patience_is_kept(keeper):
    code = "trap 'sleep 1; echo saved; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    run = keeper.start(keeper.shell(code))
    keeper.until(lambda: [line.text for line in run.logs()] == ["up"])
    assert run.stop(grace_s=30.0).state == "stopped"
    assert [line.text for line in run.logs()] == ["up", "saved"]


def test_a_second_stop_can_be_more_urgent(keeper):
    run, members = keeper.start_tree(stop=StopPolicy(grace_s=600.0))
    first = threading.Thread(target=run.stop)
    first.start()
    keeper.until(lambda: run.status().state == "stopping")
    assert keeper.survivors(members) == [pid for pid, _ in members]
    started = time.monotonic()
    assert open_run(run.dir).stop(grace_s=0.0).state == "stopped"
    assert time.monotonic() - started < keeper.patience_s
    first.join()


def test_the_first_cause_stays_when_a_stop_follows(keeper):
    run = keeper.start(keeper.python(keeper.tree_code), keeper.shell("test -e go || sleep 0.1; exit 9"))
    keeper.until(lambda: run.status().state in {"stopping", "failed"})
    assert run.stop(grace_s=0.0).reason == "b: exited with code 9"


@pytest.mark.parametrize("lie", ["start_time", "boot_id"])
def test_a_pid_that_was_used_again_is_never_signalled(keeper, lie):
    run = keeper.start(keeper.shell("exit 0"))
    run.wait(keeper.patience_s)
    innocent = subprocess.Popen(["/bin/sleep", "600"])
    try:
        who = json.loads((run.dir / "supervisor.json").read_text())
        true = {"pid": innocent.pid, "start_time": keeper.start_time(innocent.pid), "boot_id": who["boot_id"]}
        false = {**true, lie: {"start_time": true["start_time"] - 1, "boot_id": "of yesterday"}[lie]}
        (run.dir / "supervisor.json").write_text(json.dumps({**who, "supervisor": false, "guardian": false}))
        state = json.loads((run.dir / "state.json").read_text())
        state["processes"][0].update(pid=innocent.pid, exit_code=None, ended_at=None)
        (run.dir / "state.json").write_text(json.dumps({**state, "state": "running"}))
        assert run.status().state == "lost"
        assert run.stop(grace_s=0.0).state == "lost"
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_a_run_of_another_host_is_shown_and_not_touched(keeper):
    run = keeper.start(keeper.shell("exec sleep 600"))
    keeper.until(lambda: run.status().state == "running")
    true = (run.dir / "supervisor.json").read_text()
    (run.dir / "supervisor.json").write_text(json.dumps({**json.loads(true), "hostname": "elsewhere"}))
    assert run.status().state == "running"
    with pytest.raises(LaunchError, match="runs on host 'elsewhere'"):
        run.stop()
    (run.dir / "supervisor.json").write_text(true)
    assert run.status().state == "running"


def test_a_run_of_another_boot_is_lost(keeper):
    run = keeper.start(keeper.shell("exec sleep 600"))
    keeper.until(lambda: run.status().state == "running")
    true = (run.dir / "supervisor.json").read_text()
    (run.dir / "supervisor.json").write_text(true.replace(json.loads(true)["boot_id"], "of-yesterday"))
    assert run.status().state == "lost"
    (run.dir / "supervisor.json").write_text(true)


def test_half_a_state_file_is_not_believed(keeper):
    run = keeper.start(keeper.shell("exit 0"))
    run.wait(keeper.patience_s)
    for text in ("", "{", "[]", '{"state": "sleeping", "processes": []}', '{"state": "running"}', "\0" * 100):
        (run.dir / "state.json").write_text(text)
        assert run.status().state == "lost"


def test_a_full_disk_keeps_the_last_good_state_and_the_end_is_recorded_when_it_can_be(keeper):
    run = keeper.start(keeper.shell("while ! test -e go; do sleep 0.05; done"))
    keeper.until(lambda: run.status().state == "running")
    watchers = [keeper.pid_of(run, role) for role in ("supervisor", "guardian")]
    for pid in watchers:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    (run.dir / "go").touch()
    process = run.status().processes[0].pid
    keeper.until(lambda: keeper.start_time(process) is None)
    time.sleep(0.5)
    assert json.loads((run.dir / "state.json").read_text())["state"] == "running"
    for pid in reversed(watchers):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run.wait(keeper.patience_s).state == "succeeded"


def test_a_full_disk_does_not_keep_a_run_alive(keeper):
    run, members = keeper.start_tree(stop=StopPolicy(grace_s=0.1))
    keeper.until(lambda: run.status().state == "running")
    for role in ("supervisor", "guardian"):
        resource.prlimit(keeper.pid_of(run, role), resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    os.kill(keeper.pid_of(run, "supervisor"), signal.SIGTERM)
    keeper.until(lambda: keeper.survivors(members) == [])
    assert run.wait(keeper.patience_s).state == "lost"  # nobody could write how it ended


FULL = """
import resource, sys
from flagscale_hw import LaunchError, Plan, Process, launch
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    launch(Plan(kind="t", name="t", processes=(Process(name="a", argv=("true",)),)), sys.argv[1])
except LaunchError as error:
    print(error)
"""


@pytest.mark.parametrize("limit_bytes", [0, 600, 20000])
def test_a_launch_on_a_full_disk_leaves_nothing(keeper, tmp_path, limit_bytes):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "run"), str(limit_bytes)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in done.stdout
    assert not (tmp_path / "run").exists()
    assert keeper.carrying(str(tmp_path / "run")) == []
