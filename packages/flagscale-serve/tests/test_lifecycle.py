"""The life of a service, through the command line and the real launcher, with a fake engine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest


def supervisor_pids(run_dir: str) -> dict[str, int]:
    recorded = json.loads((Path(run_dir) / "supervisor.json").read_text())
    return {role: recorded[role]["pid"] for role in ("supervisor", "guardian")}


def test_run_detach_returns_when_a_token_came_and_stop_leaves_nothing(shell, model_dir, alive):
    shell.mode("slow")
    done = shell("run", model_dir, "--detach")
    assert done.returncode == 0, done.stderr
    assert re.search(r"ready after [\d.]+ s: http://127\.0\.0\.1:\d+/v1  model tiny-qwen3", done.stdout)
    status = shell.the_status(model_dir)
    assert (status["state"], status["is_ready"], status["reason"]) == ("ready", True, "")
    assert status["instances"][0]["model_dir"] == str(model_dir)
    (pid,) = shell.engine_pids()
    assert alive(pid)
    assert alive(status["instances"][0]["pid"])

    stopped = shell("stop", model_dir, "--json")
    assert stopped.returncode == 0
    assert json.loads(stopped.stdout)["state"] == "stopped"
    assert not alive(pid)
    assert shell("status", model_dir).returncode == 3
    again = shell("stop", model_dir)
    assert again.returncode == 3
    assert "not running: it is stopped" in again.stderr


def test_a_healthy_server_without_a_token_is_not_ready(shell, model_dir, eventually, alive):
    shell.mode("mute")
    assert shell("run", model_dir, "--detach", "--no-wait").returncode == 0
    eventually(lambda: "startup complete" in shell("logs", model_dir).stdout)
    status = shell.the_status(model_dir)
    assert (status["state"], status["is_ready"]) == ("starting", False)
    asked = shell("chat", model_dir, "-m", "hi")
    assert asked.returncode == 3
    assert "not ready" in asked.stderr
    assert shell("status", model_dir).returncode == 3


def test_no_token_in_time_ends_the_run_and_says_so(shell, model_dir, alive):
    shell.mode("mute")
    done = shell("run", model_dir, "--detach", "--timeout", "3")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "completion_tokens" in done.stderr
    assert not [pid for pid in shell.engine_pids() if alive(pid)]


def test_an_engine_that_dies_at_start_gives_its_first_cause(shell, model_dir):
    shell.mode("dies")
    done = shell("run", model_dir, "--detach")
    assert done.returncode == 4
    assert "weights are made of cheese" in done.stderr
    assert "Traceback" not in done.stderr
    status = shell.the_status(model_dir)
    assert status["state"] == "failed"
    assert "weights are made of cheese" in status["reason"]
    assert shell("status", model_dir).returncode == 4
    whole = shell("logs", model_dir).stdout
    assert "raise RuntimeError" in whole
    lines = whole.splitlines(keepends=True)
    for words in (("-n", 2), ("-f", "-n", 2)):
        assert shell("logs", model_dir, *words).stdout == "".join(lines[-2:])
    assert shell("logs", model_dir, "-n", len(lines) + 1).stdout == whole
    assert shell("logs", model_dir, "-n", 0).stdout == ""


@pytest.mark.parametrize("mode", ["deaf", "family"])
def test_stop_ends_an_engine_that_does_not_listen(shell, model_dir, alive, mode):
    shell.mode(mode)
    assert shell("run", model_dir, "--detach").returncode == 0
    pids = shell.engine_pids()
    assert len(pids) == (2 if mode == "family" else 1)
    assert all(map(alive, pids))
    assert shell("stop", model_dir, "--grace", "0.5").returncode == 0
    assert not [pid for pid in pids if alive(pid)]


@pytest.mark.parametrize("victim", ["supervisor", "guardian", "engine"])
def test_kill_9_of_any_part_leaves_nothing(shell, model_dir, alive, eventually, victim):
    shell.mode("family")
    assert shell("run", model_dir, "--detach", "--max-restarts", 0).returncode == 0
    run_dir = shell.the_status()["run_dir"]
    pids = supervisor_pids(run_dir)
    engine = shell.engine_pids()
    os.kill({**pids, "engine": engine[0]}[victim], signal.SIGKILL)
    everybody = [*pids.values(), *engine]
    eventually(lambda: not [pid for pid in everybody if alive(pid)])
    status = shell.the_status()
    assert status["state"] == "failed"
    assert status["reason"]


TWO = """
- serve_id: a
  engine: vllm
  engine_args: {{model: {model}, served_model_name: m}}
  resources: {{num_replicas: 2}}
"""


@pytest.fixture
def behind_a_router(shell, serve_file, model_dir):
    shell.mode("family")
    done = shell("run", serve_file(TWO.format(model=model_dir)), "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    return shell


@pytest.mark.transformers  # its session has the router
@pytest.mark.parametrize("last", ["supervisor", "guardian"])
def test_kill_9_of_the_router_and_another(behind_a_router, alive, eventually, everybody, last):
    """With one engine both come back and the other engine goes on; with a watcher nothing is left."""
    shell = behind_a_router
    before = shell.the_status()
    first, other, front = before["instances"]
    for one in (front, first):
        os.kill(one["pid"], signal.SIGKILL)
    eventually(lambda: [one["restarts"] for one in shell.the_status()["instances"]] == [1, 0, 1])
    eventually(lambda: shell.the_status()["is_ready"])
    after = shell.the_status()
    assert after["instances"][1] == other | {"load": after["instances"][1]["load"]}
    assert [one["url"] for one in after["instances"]] == [one["url"] for one in before["instances"]]
    body = {"model": "m", "prompt": "x", "max_tokens": 1}
    answers = [httpx.post(f"{front['url']}/completions", json=body, trust_env=False) for _ in range(4)]
    assert {answer.status_code for answer in answers} == {200}

    pids = everybody(after)
    for pid in (after["instances"][2]["pid"], supervisor_pids(after["run_dir"])[last]):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not [pid for pid in pids if alive(pid)])
    ended = shell.the_status()
    assert (ended["state"], ended["is_ready"]) == ("failed", False)
    for one in after["instances"]:
        url = urlsplit(one["url"])
        with pytest.raises(ConnectionRefusedError), socket.create_connection((url.hostname, url.port)):
            pass


@pytest.mark.parametrize("when", ["starting", "ready"])
def test_kill_9_of_the_foreground_command_leaves_nothing(shell, model_dir, alive, eventually, when):
    shell.mode("family" if when == "ready" else "mute")
    command = shell.popen("run", model_dir)
    if when == "ready":
        assert "ready after" in command.stdout.readline()
    else:
        eventually(lambda: len(shell.engine_pids()) == 1)
    command.kill()
    command.communicate()
    run_dir = shell.the_status()["run_dir"]
    everybody = [*supervisor_pids(run_dir).values(), *shell.engine_pids()]
    eventually(lambda: not [pid for pid in everybody if alive(pid)])
    assert shell.the_status()["state"] in ("stopped", "failed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["starting", "ready"])
def test_ctrl_c_stops_and_exits_130(shell, model_dir, alive, eventually, number, when):
    shell.mode("good" if when == "ready" else "mute")
    command = shell.popen("run", model_dir)
    if when == "ready":
        assert "ready after" in command.stdout.readline()
    else:
        eventually(shell.engine_pids)
    command.send_signal(number)
    _, errors = command.communicate(timeout=shell.patience_s)
    assert command.returncode == 130
    assert "nothing of it is left" in errors
    assert "Traceback" not in errors
    assert not [pid for pid in shell.engine_pids() if alive(pid)]
    assert shell.the_status()["state"] == "stopped"


def test_ctrl_c_while_waiting_for_a_detached_run_stops_it(shell, model_dir, alive, eventually):
    shell.mode("mute")
    command = shell.popen("run", model_dir, "--detach")
    eventually(shell.engine_pids)
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=shell.patience_s)
    assert command.returncode == 130
    assert not [pid for pid in shell.engine_pids() if alive(pid)]


def test_the_foreground_ends_with_4_when_the_engine_dies_later(shell, model_dir):
    shell.mode("dies-later")
    done = shell("run", model_dir, "--max-restarts", 1)
    assert "ready after" in done.stdout
    assert done.returncode == 4
    assert "exited with code 7" in done.stderr
    assert len(shell.engine_pids()) == 2
    status = shell.the_status(model_dir)
    assert (status["state"], status["instances"][0]["restarts"]) == ("failed", 1)


def test_an_engine_that_ends_softly_has_failed_too(shell, model_dir, alive, eventually):
    shell.mode("polite")
    assert shell("run", model_dir, "--detach", "--max-restarts", 1).returncode == 0
    os.kill(shell.engine_pids()[0], signal.SIGTERM)
    eventually(lambda: len(shell.engine_pids()) == 2 and shell.the_status()["is_ready"])
    os.kill(shell.engine_pids()[1], signal.SIGTERM)
    eventually(lambda: shell.the_status()["state"] == "failed")
    status = shell.the_status(model_dir)
    assert (status["state"], status["instances"][0]["restarts"]) == ("failed", 1)
    assert "model: exited with code 0, although nobody had stopped it" in status["reason"]
    assert shell("status", model_dir).returncode == 4

    assert shell("run", model_dir, "--detach", "--max-restarts", 0).returncode == 0
    os.kill(shell.engine_pids()[2], signal.SIGTERM)
    eventually(lambda: shell.the_status(model_dir)["state"] == "failed")


def test_a_host_of_another_machine_is_refused_before_anything_starts(shell, model_dir):
    done = shell("run", model_dir, "--host", "192.0.2.1", "--detach")  # an address nobody has (RFC 5737)
    assert done.returncode == 2
    assert "host 192.0.2.1: not an address of this machine" in done.stderr
    assert shell.engine_pids() == []


def test_a_full_disk_is_refused_before_anything_starts(shell, model_dir, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 5 << 20}))
    done = shell("run", model_dir, "--detach")
    assert done.returncode == 2
    assert "5 MiB free: logs and state need 64 MiB: make room" in done.stderr
    assert shell.engine_pids() == []


def test_a_port_in_use_is_refused_before_anything_starts(shell, model_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = shell("run", model_dir, "--port", port, "--detach")
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert shell.engine_pids() == []


def test_the_asked_port_is_the_port(shell, model_dir):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert f":{port}/v1" in shell("run", model_dir, "--port", port, "--detach").stdout


def test_start_log_tells_phases_and_what_to_try(shell, model_dir):
    done = shell("run", model_dir, "--detach")
    assert "loading weights" in done.stderr
    assert "waiting for the first token" in done.stderr
    assert "Loading weights: 100%" not in done.stderr
    assert "try: curl http://127.0.0.1" in done.stdout
    assert "chat/completions" in done.stdout
    assert "Loading weights: 100%" in shell("run", model_dir, "--detach", "--verbose").stderr


def test_list_and_choice_among_several(shell, model_dir):
    assert "no services" in shell("list").stderr
    assert shell("stop").returncode == 3
    shell("run", model_dir, "--detach")
    shell("run", model_dir, "--detach")
    listed = json.loads(shell("list", "--json").stdout)
    assert [one["state"] for one in listed] == ["ready", "ready"]
    refused = shell("stop")
    assert refused.returncode == 3
    assert "2 services are running" in refused.stderr
    run_id = Path(listed[0]["run_dir"]).name
    assert shell("stop", run_id).returncode == 0
    assert [one["state"] for one in json.loads(shell("list", "--json").stdout)] == ["stopped", "ready"]
    assert shell("stop").returncode == 0


def test_logs_follow_ends_with_the_run(shell, model_dir):
    shell.mode("dies-later")
    shell("run", model_dir, "--detach", "--max-restarts", 0)
    done = shell("logs", model_dir, "-f")
    assert done.returncode == 0
    assert "startup complete" in done.stdout


def test_a_run_directory_is_not_used_twice(shell, model_dir, tmp_path):
    assert shell("run", model_dir, "--detach", "--run-dir", tmp_path / "mine").returncode == 0
    again = shell("run", model_dir, "--detach", "--run-dir", tmp_path / "mine")
    assert again.returncode in (2, 4)
    assert "mine" in again.stderr
    assert shell("stop", tmp_path / "mine").returncode == 0
