"""Starting plans, and what a run leaves to read."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import flagscale_hw
from flagscale_hw import (
    File,
    InvalidPlan,
    LaunchError,
    Plan,
    Process,
    Run,
    RunNotFound,
    RunStatus,
    StopPolicy,
    launch,
    list_runs,
    open_run,
)


def test_a_run_succeeds_and_tells_everything(keeper):
    run = keeper.start(keeper.shell("echo hello; exit 0"), keeper.shell("exit 0"), facts={"layout": [1, 2]})
    status = run.wait(keeper.patience_s)
    assert (status.state, status.reason, status.exit_code) == ("succeeded", "", 0)
    assert [(p.name, p.exit_code, p.signal) for p in status.processes] == [("a", 0, None), ("b", 0, None)]
    assert all(p.pid and p.start_time and p.started_at <= p.ended_at for p in status.processes)
    assert status.started_at <= status.ended_at
    assert RunStatus.from_dict(json.loads(json.dumps(status.to_dict()))) == status
    manifest = json.loads((run.dir / "manifest.json").read_text())
    assert manifest["facts"] == {"layout": [1, 2]}
    assert manifest["result"]["state"] == "succeeded"
    assert manifest["versions"]["flagscale-hw"] == flagscale_hw.__version__
    assert manifest["host"]["hostname"] == socket.gethostname()
    assert run.name == "a test"
    assert [line.text for line in run.logs()] == ["hello"]


def test_nothing_of_a_run_stays_when_it_is_over(keeper):
    run = keeper.start(keeper.shell("sleep 600 & setsid sleep 600 & exit 0"))
    assert run.wait(keeper.patience_s).state == "succeeded"
    assert keeper.carrying(keeper.run_id(run)) == []
    assert keeper.start_time(keeper.pid_of(run, "supervisor")) is None
    assert keeper.start_time(keeper.pid_of(run, "guardian")) is None


def test_a_process_that_fails_ends_the_others_and_gives_the_reason(keeper):
    failing = keeper.python("import time; time.sleep(0.3); raise RuntimeError('the disk is on fire')")
    status = keeper.finish(keeper.shell("exec sleep 600"), failing)
    assert status.state == "failed"
    assert status.exit_code == 4
    assert status.reason == "b: exited with code 1: RuntimeError: the disk is on fire"
    assert [(p.exit_code, p.signal) for p in status.processes] == [(None, signal.SIGTERM), (1, None)]


def test_one_that_ends_well_leaves_the_others_alone(keeper):
    status = keeper.finish(keeper.shell("exit 0"), keeper.shell("sleep 0.5; exit 0"))
    assert status.state == "succeeded"


def test_exit_codes_and_signals_come_through(keeper):
    assert keeper.finish(keeper.shell("exit 77")).processes[0].exit_code == 77
    status = keeper.finish(keeper.shell("kill -SEGV $$"))
    assert status.processes[0].signal == signal.SIGSEGV
    assert "killed by signal 11 (SIGSEGV)" in status.reason


@pytest.mark.parametrize(
    ("argv", "cwd", "match"),
    [
        (("no-such-program",), "{run_dir}", "a: cannot start `no-such-program`: No such file or directory"),
        (("/etc/passwd",), "{run_dir}", "a: cannot start `/etc/passwd`: Permission denied"),
        (("/bin/true",), "/no/such/place", "working directory /no/such/place: No such file or directory"),
    ],
)
def test_what_cannot_start_is_named(keeper, argv, cwd, match):
    plan = Plan(kind="test", name="t", processes=(Process(name="a", argv=argv, cwd=cwd),))
    status = keeper.launch(plan).wait(keeper.patience_s)
    assert status.state == "failed"
    assert match in status.reason


def test_placeholders_are_replaced_and_other_braces_are_not(keeper, tmp_path):
    code = 'printf "%s\\n" "$@" "$HERE" "$(pwd)"'
    plan = Plan(
        kind="test",
        name="t",
        processes=(
            Process(
                name="a",
                argv=("/bin/sh", "-c", code, "sh", "{port:web}", "{run_dir}/x", '{"port": {run_dirs}}', "{}"),
                env={"HERE": "{run_dir}:{port:web}"},
            ),
        ),
        ports={"web": None},
        files=(File(path="conf/engine.json", text='{"port": {port:web}}'),),
    )
    run = launch(plan, tmp_path / "a {port:web} $HOME dir")  # hostile on purpose: replaced once, never twice
    keeper.runs.append(run)
    status = run.wait(keeper.patience_s)
    port = status.ports["web"]
    place = str(run.dir)
    expected = [str(port), f"{place}/x", '{"port": {run_dirs}}', "{}", f"{place}:{port}", place]
    assert [line.text for line in run.logs()] == expected
    assert json.loads((run.dir / "conf/engine.json").read_text()) == {"port": port}


def test_hostile_words_reach_the_program_unchanged(keeper):
    words = ["$(touch /dev/null)", "; exit 9", "`id`", "a\nb", "'\"", "--", "ü漢字🜚", "*", "\udcff\udcfe", ""]
    code = (
        "import os, sys; sys.stdout.buffer.write(os.fsencode('|'.join(sys.argv[1:]) + '|' + os.environ['X']))"
    )
    plan = Plan(
        kind="test",
        name="a name: 'with' \"everything\"\n/../ü🜚",
        processes=(Process(name="a", argv=(*keeper.python(code), *words), env={"X": "\udcff=\n$Y"}),),
    )
    run = keeper.launch(plan)
    assert run.wait(keeper.patience_s).state == "succeeded"
    assert (run.dir / "logs/a.log").read_bytes() == os.fsencode("|".join([*words, "\udcff=\n$Y"]))
    assert run.name == plan.name


def test_secrets_are_given_to_the_process_and_written_nowhere(keeper, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "inherited-secret")
    plan = keeper.plan(
        keeper.shell('test "$KEY" = very-secret && test -n "$HF_TOKEN"'),
        env={"KEY": "very-secret", "ARG": "key=very-secret"},
        secrets=("KEY",),
    )
    run = keeper.launch(plan)
    assert run.wait(keeper.patience_s).state == "succeeded"
    for path in run.dir.rglob("*"):
        if path.is_file():
            assert b"very-secret" not in path.read_bytes(), path
            assert b"inherited-secret" not in path.read_bytes(), path


def test_a_directory_holds_one_run(keeper):
    run = keeper.start(keeper.shell("exec sleep 600"))
    with pytest.raises(
        LaunchError, match=r"holds a run already \((running|starting)\): choose a new directory"
    ):
        launch(keeper.plan(keeper.shell("exit 0")), run.dir)
    assert run.status().state in {"running", "starting"}
    run.stop(0.0)
    with pytest.raises(LaunchError, match=r"holds a run already \(stopped\)"):
        launch(keeper.plan(keeper.shell("exit 0")), run.dir)


def test_a_file_system_without_links_will_do(keeper, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    run = keeper.start(keeper.shell("exit 0"))
    assert run.wait(keeper.patience_s).state == "succeeded"
    with pytest.raises(LaunchError, match=r"holds a run already \(succeeded\)"):
        launch(keeper.plan(keeper.shell("exit 0")), run.dir)
    assert [path for path in run.dir.iterdir() if path.name.startswith(".")] == []


def test_a_directory_that_cannot_be_made_is_named(keeper, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"file/run: cannot hold a run: Not a directory") as refused:
        launch(keeper.plan(keeper.shell("exit 0")), tmp_path / "file" / "run")
    assert refused.value.exit_code == 2


def test_a_file_that_was_there_is_not_replaced(keeper, tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "conf.txt").write_text("precious")
    plan = keeper.plan(
        keeper.shell("exit 0"), files=(File(path="a.txt", text=""), File(path="conf.txt", text=""))
    )
    with pytest.raises(LaunchError, match=r"conf\.txt: File exists"):
        launch(plan, place)
    assert [path.name for path in place.iterdir()] == ["conf.txt"]
    assert (place / "conf.txt").read_text() == "precious"


def test_a_host_that_is_no_target_is_refused():
    with pytest.raises(InvalidPlan, match="host 'node7' is not a target"):
        Plan(kind="t", name="t", processes=(Process(name="a", argv=("true",), host="node7"),))


def test_no_run_is_not_found(tmp_path):
    with pytest.raises(RunNotFound, match="holds no run"):
        open_run(tmp_path)


def test_a_relative_directory_is_fine(keeper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = launch(keeper.plan(keeper.shell("exit 0")), "here")
    keeper.runs.append(run)
    monkeypatch.chdir("/")
    assert run.wait(keeper.patience_s).state == "succeeded"
    assert run.dir == tmp_path / "here"


def test_runs_are_listed_newest_last_and_those_gone_are_dropped(keeper, tmp_path):
    runs = [keeper.start(keeper.shell("exit 0")) for _ in range(3)]
    for number, run in enumerate(runs):
        run.wait(keeper.patience_s)
        os.utime(run.dir / "plan.json", (number, number))
    assert list_runs() == tuple(runs)
    (tmp_path / "state/runs/broken.json").write_text("{")
    (runs[1].dir / "supervisor.json").unlink()
    assert list_runs() == (runs[0], runs[2])
    assert len(list((tmp_path / "state/runs").iterdir())) == 2


def test_a_run_starts_where_the_index_cannot_be_written(keeper, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", "/proc/nowhere")
    assert keeper.finish(keeper.shell("exit 0")).state == "succeeded"
    assert list_runs() == ()


def test_a_launcher_that_ignores_its_children_changes_nothing(keeper):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert keeper.finish(keeper.shell("exit 5")).processes[0].exit_code == 5
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_signals_have_their_ordinary_meaning_in_processes(keeper):
    code = "from signal import *; print(*(int(getsignal(s)) for s in (1, 15, 17)), pthread_sigmask(0, ()))"
    run = keeper.start(keeper.python(code))
    run.wait(keeper.patience_s)
    assert [line.text for line in run.logs()] == ["0 0 0 set()"]
    run = keeper.start(keeper.shell("yes | head -n 1"))  # without SIGPIPE, `yes` complains or never ends
    assert run.wait(keeper.patience_s).state == "succeeded"
    assert [line.text for line in run.logs()] == ["y"]


def test_many_launches_at_once_share_nothing(keeper):
    code = keeper.python("import socket; s = socket.create_server(('', {port:web})); print('bound')")
    plan = keeper.plan(code, ports={"web": None})

    def one(number: int) -> tuple[Run, RunStatus]:
        run = launch(plan, keeper.folder / f"many{number}")
        return run, run.wait(keeper.patience_s)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(12)))
    keeper.runs += [run for run, _ in results]
    assert [status.reason for _, status in results] == [""] * 12
    assert len(list_runs()) == 12


def test_restarts_are_counted_and_only_the_last_reason_stays(keeper):
    code = keeper.shell("echo x >> count; test $(wc -l < count) -ge 2 || { echo not yet; exit 3; }")
    run = keeper.start(code, keeper.shell("echo y >> other; sleep 1"), max_restarts=4)
    status = run.wait(keeper.patience_s)
    assert (status.state, status.restarts, status.reason) == ("succeeded", 1, "")
    assert (run.dir / "other").read_text() == "y\ny\n"  # a restart is one of the whole run


def test_restarts_end(keeper):
    status = keeper.finish(keeper.shell("echo broken; exit 3"), max_restarts=1)
    assert (status.state, status.restarts) == ("failed", 1)
    assert status.reason == "a: exited with code 3: broken"


def test_a_run_can_be_stopped_between_restarts(keeper):
    run = keeper.start(keeper.shell("exit 3"), max_restarts=100)
    keeper.until(lambda: run.status().restarts >= 2)
    status = run.stop()
    assert (status.state, status.exit_code) == ("stopped", 0)


INTERRUPTED = """
import os, signal, sys, threading, time
from flagscale_hw import File, Plan, Process, launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
process = Process(name="a", argv=("/bin/sleep", "600"))
plan = Plan(kind="t", name="t", processes=(process,), files=(File(path="conf/a/b.txt", text="x"),))
delay = float(sys.argv[2])
bomb = threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGINT)))
try:
    try:
        bomb.start()
        run = launch(plan, sys.argv[1])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise SystemExit(0)
    time.sleep(60)
except KeyboardInterrupt:
    print("launched", flush=True)
    run.stop(0.0)
"""


def test_ctrl_c_while_launching_leaves_nothing(keeper, tmp_path):
    seen = set()
    for number in range(7):
        place = tmp_path / f"interrupted{number}"
        if number % 2:
            place.mkdir()
            (place / "precious").touch()
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, str(place), str(0.009 * number)],
            capture_output=True,
            text=True,
            timeout=keeper.patience_s,
            check=False,
        )
        assert done.stderr == ""
        seen.add(done.stdout.strip())
        assert keeper.carrying(str(place)) == []
        if done.stdout.strip() == "interrupted":
            left = sorted(path.name for path in place.iterdir()) if place.exists() else []
            assert left == (["precious"] if number % 2 else [])
            assert place.exists() == bool(number % 2)
    assert seen <= {"interrupted", "launched"}
    assert "interrupted" in seen


def test_stop_uses_the_signal_of_the_plan(keeper):
    code = "trap 'echo saved; exit 0' USR1; trap '' TERM; echo up; while :; do sleep 0.05; done"
    run = keeper.start(keeper.shell(code), stop=StopPolicy(signal="SIGUSR1", grace_s=600.0))
    keeper.until(lambda: [line.text for line in run.logs()] == ["up"])
    started = time.monotonic()
    status = run.stop()
    assert (status.state, status.reason) == ("stopped", "stopped on request")
    assert [line.text for line in run.logs()] == ["up", "saved"]
    assert time.monotonic() - started < keeper.patience_s


def test_import_of_a_module_in_the_working_directory_is_not_ours(keeper, tmp_path, monkeypatch):
    for name in ("json", "signal", "socket", "subprocess", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert keeper.finish(keeper.shell("exit 0")).state == "succeeded"


def test_the_supervisor_is_not_for_hands():
    done = subprocess.run(
        [sys.executable, "-m", "flagscale_hw.supervisor", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "not by hand" in done.stderr
    assert Path("x").exists() is False
