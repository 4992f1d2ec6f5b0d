"""Several instances behind the real router. It runs where vllm-router is installed: `nox -s engines`."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import httpx
import pytest

import flagscale_hw as hw
from flagscale_config import load
from flagscale_hw.testing import fake_host
from flagscale_serve import plan, router

ITEM = """
- serve_id: a
  engine: vllm
  engine_args: {{model: {model}, served_model_name: m, api_key: the-very-key}}
  resources: {{num_replicas: 2}}
"""


@pytest.mark.transformers
def test_copies_answer_at_one_address(shell, serve_file, model_dir, alive):
    path = serve_file(ITEM.format(model=model_dir))
    done = shell("run", path, "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    status = shell.the_status()
    first, second, router = status["instances"]
    assert (first["behind"], second["behind"], router["behind"]) == ("a-router", "a-router", None)
    assert router["url"] in done.stdout
    assert first["url"] not in done.stdout
    key = {"Authorization": "Bearer the-very-key"}
    body = {"model": "m", "max_tokens": 4}
    for number in range(8):
        answer = httpx.post(
            f"{router['url']}/completions",
            json={**body, "prompt": f"word {number}"},
            headers=key,
            timeout=shell.patience_s,
            trust_env=False,
        )
        assert answer.json()["choices"][0]["text"] == f"WORD {number}"
    # The key is the instances' own: the router passes it on, and has none in its command line.
    refused = httpx.post(
        f"{router['url']}/completions",
        json={**body, "prompt": "x"},
        timeout=shell.patience_s,
        trust_env=False,
    )
    assert refused.status_code == 401
    streamed = shell("chat", "-m", "Hello", "--api-key", "the-very-key")
    assert streamed.stdout.startswith("user=Hello")
    pids = [one["pid"] for one in status["instances"]]
    assert shell("stop").returncode == 0
    assert not [pid for pid in pids if alive(pid)]


def ask_until(url: str, is_over: threading.Event) -> list[tuple[float, float, str]]:
    """Ask again and again without retries of its own; return begin, end and problem of each request."""
    found = []
    with httpx.Client(timeout=60, trust_env=False) as client:
        while not is_over.is_set():
            began, problem = time.monotonic(), ""
            try:
                body = {"model": "m", "prompt": f"x {len(found)}", "max_tokens": 1}
                answer = client.post(f"{url}/completions", json=body)
                problem = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
            except httpx.HTTPError as error:
                problem = repr(error)
            found.append((began, time.monotonic(), problem))
    return found


@pytest.mark.transformers
def test_what_a_dead_instance_would_get_goes_to_the_other(shell, serve_file, model_dir, eventually, alive):
    """The router goes on to choose an instance for a while after nobody is there any more."""
    done = shell("run", serve_file(SHORT_ITEM.format(model=model_dir)), "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    *both, front = shell.the_status()["instances"]
    body = {"model": "m", "prompt": "the same thing again and again", "max_tokens": 1}

    def ask() -> int:
        answer = httpx.post(
            f"{front['url']}/completions", json=body, timeout=shell.patience_s, trust_env=False
        )
        return answer.status_code

    def asked(one: dict) -> int:
        return Path(one["log"]).read_text().count("POST /v1/completions HTTP")

    before = {one["name"]: asked(one) for one in both}
    assert {ask() for _ in range(4)} == {200}
    chosen = max(both, key=lambda one: asked(one) - before[one["name"]])
    os.kill(chosen["pid"], signal.SIGKILL)
    eventually(lambda: not alive(chosen["pid"]))
    assert {ask() for _ in range(8)} == {200}
    told = Path(front["log"]).read_text()
    assert "Router ready" in told
    assert "selection" not in told  # a line for each request fills a disk


@pytest.mark.transformers
def test_one_of_two_is_killed_under_load_and_comes_back(shell, serve_file, model_dir, eventually, alive):
    done = shell("run", serve_file(SHORT_ITEM.format(model=model_dir)), "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    status = shell.the_status()
    run = hw.open_run(status["run_dir"])
    first, second, front = status["instances"]
    is_over = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(ask_until, front["url"], is_over) for _ in range(4)]
        try:
            logs = [Path(one["log"]) for one in (first, second)]
            eventually(lambda: all("POST" in log.read_text() for log in logs))
            killing_at = time.monotonic()
            os.kill(first["pid"], signal.SIGKILL)
            eventually(lambda: not alive(first["pid"]))
            killed_at = time.monotonic()
            # It is away for a second or two, too short for the command to be sure to see it.
            eventually(lambda: "killed by signal 9" in run.status().reason)
            eventually(lambda: shell.the_status()["is_ready"])
        finally:
            is_over.set()
        asked = [one for load in loads for one in load.result()]
    failed = [one for one in asked if one[2]]
    assert [one for one in failed if one[0] > killed_at or one[1] < killing_at] == []
    assert len([one for one in asked if one[0] > killed_at]) > 8
    again, other, _ = shell.the_status()["instances"]
    assert (again["restarts"], again["pid"] != first["pid"]) == (1, True)
    assert (other["restarts"], other["pid"]) == (0, second["pid"])
    assert "started again 1 times" in shell("status").stdout
    assert shell("stop").returncode == 0


PARTED_ITEM = """
- serve_id: a
  engine: vllm
  engine_args: {{model: {model}, served_model_name: m}}
"""
TWO_AND_TWO = """
runner:
  deploy:
    prefill_decode_disaggregation: true
    prefill_num: 2
    decode_num: 2
    prefill_decode_strategy: robin
"""


def check_that_a_death_costs_nothing(run: hw.Run, half: str, eventually: Callable[..., None]) -> None:
    """Kill one of two instances under load, and let it come back."""
    ports, is_over = run.status().ports, threading.Event()
    url = f"http://127.0.0.1:{ports['a-router']}/v1"
    logs = [run.dir / "logs" / f"a-{half}-{number}.log" for number in (1, 2)]

    def victim() -> hw.ProcessStatus:
        return next(one for one in run.status().processes if one.name == f"a-{half}-1")

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(ask_until, url, is_over) for _ in range(4)]
        try:
            eventually(lambda: all(log.read_text().count("POST /v1/completions HTTP") > 8 for log in logs))
            os.kill(victim().pid, signal.SIGKILL)
            killed_at = time.monotonic()
            eventually(lambda: victim().restarts == 1 and run.status().state == "ready")
        finally:
            is_over.set()
        asked = [one for load in loads for one in load.result()]
    # Not even what it was answering fails, for no part of an answer was sent on yet.
    assert [problem for *_, problem in asked if problem] == []
    assert len([began for began, *_ in asked if began > killed_at]) > 8


@pytest.mark.transformers
@pytest.mark.parametrize("half", ["prefill", "decode"])
def test_a_half_that_dies_beside_another_costs_nothing(shell, serve_file, model_dir, eventually, half):
    path = serve_file(PARTED_ITEM.format(model=model_dir), experiment=TWO_AND_TWO)
    done = shell("run", path, "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    check_that_a_death_costs_nothing(hw.open_run(shell.the_status()["run_dir"]), half, eventually)
    assert shell("stop").returncode == 0


@pytest.mark.transformers
@pytest.mark.parametrize("half", ["prefill", "decode"])
def test_sglangs_halves_are_told_where_they_meet(shell, serve_file, model_dir, eventually, half):
    """SGLang needs an accelerator, the plan for one does not: the engines behind sglang-router are fakes."""
    text = PARTED_ITEM.format(model=model_dir).replace("vllm", "sglang")
    made = plan(
        # Drawn at random, a dead one comes up several times in a row.
        load(serve_file(text, experiment=TWO_AND_TWO.replace("robin", "random"))),
        fake_host("nvidia", 4),
        python=shell.env["FLAGSCALE_SERVE_PYTHON"],
        ready_timeout_s=120,
    )
    with mock.patch.dict(os.environ, shell.env):
        run = hw.launch(made, shell.home / "outputs" / "runs" / "2-and-2")
    assert run.wait_ready(120).state == "ready", run.status().reason
    check_that_a_death_costs_nothing(run, half, eventually)

    def told(name: str) -> list[dict]:
        lines = (run.dir / "logs" / f"{name}.log").read_text().splitlines()
        return [json.loads(line.split("meets ")[1]) for line in lines if "meets " in line]

    # Both halves of a request are told of the same room, at the port on which its prefill listens.
    ports = run.status().ports
    rooms = {one["bootstrap_room"]: one for number in (1, 2) for one in told(f"a-decode-{number}")}
    for number in (1, 2):
        there = told(f"a-prefill-{number}")
        assert {one["bootstrap_port"] for one in there} == {ports[f"a-prefill-{number}-bootstrap"]}
        assert {one["bootstrap_host"] for one in there} == {"127.0.0.1"}
        both = [(one, rooms[one["bootstrap_room"]]) for one in there if one["bootstrap_room"] in rooms]
        assert len(both) > 4
        assert all(prefill == decode for prefill, decode in both)
    run.stop()


TWO_MODELS = """
- serve_id: one
  engine: vllm
  engine_args: {{model: {model}, served_model_name: small, port: {port}}}
  resources: {{num_replicas: 2}}
- serve_id: two
  engine: vllm
  engine_args: {{model: {model}, served_model_name: large, port: {port}}}
"""


def check_forms_of_the_router(url: str, patience_s: float) -> None:
    """As docs/serve/operating.md tells: its list of models and its refusals are not in OpenAI's form."""
    with httpx.Client(base_url=url, timeout=patience_s, trust_env=False) as client:
        listed = client.get("/models").json()
        assert {**listed, "models": sorted(listed["models"])} == {"models": ["large", "small"]}
        json_type = {"Content-Type": "application/json"}
        for content, code in ((b'{"model": ', 400), (b'"' + b"x" * (65 << 20), 413)):
            refused = client.post("/completions", content=content, headers=json_type)
            assert (refused.status_code, refused.headers["content-type"]) == (
                code,
                "text/plain; charset=utf-8",
            )
            assert refused.text.count("\n") == 0


@pytest.mark.transformers
def test_models_of_one_address_are_found_by_their_names(shell, serve_file, model_dir, eventually):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = serve_file(TWO_MODELS.format(model=model_dir, port=port))
    done = shell("run", path, "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    url = f"http://127.0.0.1:{port}/v1"
    assert done.stdout.count(f": {url}  model ") == 2

    def answers(model: str) -> bool:
        asked = {"model": model, "prompt": "x", "max_tokens": 2}
        answer = httpx.post(f"{url}/completions", json=asked, timeout=shell.patience_s, trust_env=False)
        assert not answer.is_success or answer.json()["model"] == model
        return answer.is_success

    assert all(answers(model) for model in ("small", "large") * 6)
    check_forms_of_the_router(url, shell.patience_s)
    for model in ("small", "large"):
        assert f"m={model}" in shell("chat", "--model", model, "-m", "x").stdout
    # A router that was started again is told anew, an engine that was is used again.
    for victim in ("one-router", "two"):
        was = next(one for one in shell.the_status()["instances"] if one["name"] == victim)
        os.kill(was["pid"], signal.SIGKILL)

        def is_back(was=was) -> bool:
            now = shell.the_status()
            again = next(one for one in now["instances"] if one["name"] == was["name"])
            return again["restarts"] == 1 and now["is_ready"]

        eventually(is_back)
        eventually(lambda: all(answers(model) for model in ("small", "large") * 6))
    assert shell("stop").returncode == 0


SHORT_ITEM = """
- serve_id: a
  engine: vllm
  engine_args: {{model: {model}, served_model_name: m, max_num_seqs: 2}}
  resources: {{num_replicas: 2}}
"""


@pytest.mark.transformers
def test_bad_requests_are_answered_and_harm_no_other_and_a_stop_waits(
    shell, serve_file, model_dir, eventually
):
    shell.mode("deaf")  # ends when it is killed, so that it is the router that lets an answer through
    done = shell("run", serve_file(SHORT_ITEM.format(model=model_dir)), "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    url = shell.the_status()["instances"][-1]["url"]
    host, _, port = url.removeprefix("http://").removesuffix("/v1").partition(":")
    json_type = {"Content-Type": "application/json"}
    good = {"model": "m", "prompt": "x", "max_tokens": 1}
    is_over = threading.Event()
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=url, timeout=shell.patience_s, trust_env=False) as client,
    ):
        others = pool.submit(ask_until, url, is_over)
        try:
            # What the router itself says is in plain words, not in OpenAI's form.
            for content, headers, status, word in (
                (b'{"model": ', json_type, 400, "JSON"),
                (b'{"model": "m"}', json_type, 422, "prompt"),
                (json.dumps({**good, "max_tokens": "many"}).encode(), json_type, 422, "max_tokens"),
                (json.dumps(good).encode(), {}, 415, "application/json"),
                (b'{"prompt": "' + b"x" * 100_000_000, json_type, 413, "length limit"),
                ((b"x" * 1_000_000 for _ in range(100)), json_type, 413, "length limit"),
            ):
                refused = client.post("/completions", content=content, headers=headers)
                assert (refused.status_code, word in refused.text) == (status, True), refused.text
            # What the engine says, which takes two seconds here, passes as it is.
            unlucky = client.post("/completions", json={**good, "max_tokens": 13})
            assert (unlucky.status_code, unlucky.json()["error"]["code"]) == (400, 400)
            with socket.create_connection((host, int(port))) as nonsense:
                nonsense.sendall(b"NONSENSE\r\n\r\n")
                assert b"400 Bad Request" in nonsense.recv(1000)
        finally:
            is_over.set()
    assert {problem for _, _, problem in others.result()} == {""}
    logs = Path(shell.the_status()["instances"][0]["log"]).parent
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "m", "prompt": "x", "max_tokens": 4}  # takes two seconds
        answer = pool.submit(httpx.post, f"{url}/completions", json=body, timeout=60, trust_env=False)
        eventually(lambda: sum(path.read_text().count("took it") for path in logs.glob("a-?.log")) == 2)
        assert shell("stop", "--grace", "8").returncode == 0
        assert answer.result().json()["choices"][0]["text"] == "X"


def send_slowly(
    sockets: Sequence[socket.socket], words: bytes, meanwhile: Callable[[], object], *, every: int = 16
) -> None:
    """Send one byte at a time on each connection, and do something else every few bytes."""
    for place in range(len(words)):
        for one in sockets:
            one.sendall(words[place : place + 1])
        if place % every == 0:
            meanwhile()


@pytest.mark.transformers
def test_slow_clients_keep_nobody_waiting(shell, serve_file, model_dir, eventually):
    """Some send byte by byte, and some never read what they asked for; the others are answered meanwhile."""
    done = shell("run", serve_file(SHORT_ITEM.format(model=model_dir)), "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    status = shell.the_status()
    address = urlsplit(status["instances"][-1]["url"])
    logs = [Path(one["log"]) for one in status["instances"][:2]]

    def count(words: str) -> int:
        return sum(log.read_text().count(words) for log in logs)

    def request(**more: object) -> bytes:
        body = json.dumps({"model": "m", "prompt": "slow", "max_tokens": 1, **more})
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return f"POST /v1/completions HTTP/1.1\r\n{head}{body}".encode()

    with ExitStack() as during:
        client = during.enter_context(httpx.Client(timeout=shell.patience_s, trust_env=False))
        slow, deaf = (
            [
                during.enter_context(
                    socket.create_connection((address.hostname, address.port), shell.patience_s)
                )
                for _ in range(number)
            ]
            for number in (32, 4)
        )
        for one in deaf:
            one.sendall(request(max_tokens=15, stream=True))
        eventually(lambda: count("took it") == len(deaf))

        def another() -> None:
            body = {"model": "m", "prompt": "quick", "max_tokens": 1}
            answer = client.post(f"{address.geturl()}/completions", json=body)
            assert answer.json()["choices"][0]["text"] == "QUICK"

        send_slowly(slow, request(), another)
        for one in slow:
            answer = b""
            while b"SLOW" not in answer:
                piece = one.recv(1000)
                assert piece, answer
                answer += piece
    # An engine is not left to write for a client that has gone.
    eventually(lambda: count("the reader is gone") == len(deaf))


def test_a_router_that_is_not_there_is_named_with_its_cure(shell, serve_file, model_dir, monkeypatch):
    monkeypatch.setattr(router, "VLLM_ROUTER", replace(router.VLLM_ROUTER, module="no_such_router"))
    done = shell("run", serve_file(ITEM.format(model=model_dir)))
    assert done.returncode == 3
    assert "pip install 'flagscale-serve[router]'" in done.stderr
    assert shell.engine_pids() == []
