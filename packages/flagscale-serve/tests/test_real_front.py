"""Two real vLLM instances behind the real router: bad requests, a killed instance, and a stop under load.

They are started once. They run where vllm-router is, beside a Python that has vLLM, named by
FLAGSCALE_TEST_VLLM_PYTHON: `nox -s vllm`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from flagscale_serve.metrics import parse

pytestmark = pytest.mark.vllm
READY_S = 400
STREAMS, TOKENS = 8, 150
FILE = """
- serve_id: tiny
  engine: vllm
  engine_args:
    model: {model}
    served_model_name: tiny
    dtype: float32
    kv_cache_memory_bytes: 67108864
    max_model_len: 2048
    enable_log_requests: true
  resources: {{num_replicas: 2}}
"""


@dataclass(frozen=True)
class Streamed:
    """One streamed answer, as its client saw it."""

    name: str
    """Passed by the router and written to the log of the instance that gets the request."""
    began: float
    ended: float
    tokens: int
    problem: str


@pytest.fixture(scope="module")
def shell(module_service, real_model, vllm_python, tmp_path_factory):
    """The command line that started both."""
    shell, serve_file = module_service
    model, _ = real_model(vllm_python, tmp_path_factory.mktemp("model"), "x", 1)
    shell.env["FLAGSCALE_SERVE_PYTHON"] = vllm_python
    done = shell("run", serve_file(FILE.format(model=model)), "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    return shell


def stream(
    url: str, prompt: str, tokens: int, heard: Callable[[str, int], object] = lambda _name, _pieces: None
) -> Streamed:
    """Ask once, without retries; what is not ended by [DONE] is not whole.

    `heard` is told the name of the request and the number of pieces so far, with each piece.
    """
    body = {
        "model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    name = uuid.uuid4().hex
    began, count, pieces, problem = time.monotonic(), 0, 0, "not ended by [DONE]"
    try:
        with (
            httpx.Client(timeout=300, trust_env=False) as client,
            client.stream("POST", f"{url}/completions", json=body, headers={"X-Request-Id": name}) as answer,
        ):
            if answer.status_code != 200:
                problem = f"{answer.status_code} {answer.read()!r}"
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    problem = ""
                elif line.startswith("data: "):
                    pieces += 1
                    heard(name, pieces)
                    piece = json.loads(line.removeprefix("data: "))
                    count = (piece.get("usage") or {}).get("completion_tokens", max(count, 1))
    except httpx.HTTPError as error:
        problem = repr(error)
    return Streamed(name, began, time.monotonic(), count, problem)


def metrics(instance: dict) -> dict[str, float]:
    base = instance["url"].removesuffix("/v1")
    return parse(httpx.get(f"{base}/metrics", timeout=60, trust_env=False).text)


def keep_asking(
    url: str,
    number: int,
    tell: Callable[[Streamed], object],
    is_over: threading.Event,
    *,
    pause_s: float = 0,
    heard: Callable[[str, int], object] = lambda _name, _pieces: None,
) -> None:
    count = 0
    while not is_over.is_set():
        # Prompts that have nothing in common, so that the router spreads them by load.
        tell(stream(url, f"{number} {count} " * 4, TOKENS, heard))
        count += 1
        is_over.wait(pause_s)


def check_error(answer: httpx.Response, status: int, word: str) -> None:
    """OpenAI's form: an object `error` with a message that says what was wrong."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert word in error["message"]
    assert (error["code"], bool(error["type"])) == (status, True)


def test_bad_requests_are_answered_and_harm_no_other(shell):
    url = shell.the_status()["instances"][-1]["url"]
    host, _, port = url.removeprefix("http://").removesuffix("/v1").partition(":")
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        streaming = threading.Event()
        other = pool.submit(stream, url, "another", 1000, lambda *_: streaming.set())
        assert streaming.wait(60)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 4}
        check_error(client.post("/completions", json={**body, "model": "no-such"}), 404, "no-such")
        check_error(client.post("/completions", json={**body, "prompt": "x" * 4000}), 400, "2048")
        check_error(client.post("/completions", json={**body, "max_tokens": 5000}), 400, "2048")
        check_error(client.post("/completions", json={**body, "temperature": -1}), 400, "temperature")
        # These two the router itself answers, in plain words and not in OpenAI's form.
        json_type = {"Content-Type": "application/json"}
        broken = client.post("/completions", content=b'{"model": ', headers=json_type)
        assert (broken.status_code, "JSON" in broken.text) == (400, True)
        large = client.post("/completions", content=b'{"prompt": "' + b"x" * 100_000_000, headers=json_type)
        assert large.status_code == 413
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            good = client.post("/completions", json=body)
            assert good.json()["usage"]["completion_tokens"] == 4
        done = other.result()
    assert (done.problem, done.tokens) == ("", 1000)


def test_one_of_two_is_killed_under_load_and_takes_requests_again(shell, eventually, alive):
    first, second, front = shell.the_status()["instances"]
    asked: list[Streamed] = []
    heard: dict[str, int] = {}
    is_calm, is_over = threading.Event(), threading.Event()

    def is_answering(instance: dict) -> bool:
        """Whether it is in the middle of an answer, whose rest cannot come from anybody else."""
        log = Path(instance["log"]).read_text()
        return any(pieces < TOKENS / 3 and f"cmpl-{name}" in log for name, pieces in tuple(heard.items()))

    with ThreadPoolExecutor(2 * STREAMS + 1) as pool:
        # One goes on while the killed one starts, which takes longer the more there is to do.
        loads = [pool.submit(keep_asking, front["url"], 99, asked.append, is_over, pause_s=1)]
        loads += [
            pool.submit(keep_asking, front["url"], number, asked.append, is_calm, heard=heard.__setitem__)
            for number in range(STREAMS)
        ]
        try:
            eventually(lambda: is_answering(second) and is_answering(first))
            killing_at = time.monotonic()
            os.kill(first["pid"], signal.SIGKILL)
            eventually(lambda: not alive(first["pid"]))
            killed_at = time.monotonic()
            eventually(lambda: "killed by signal 9" in shell.the_status()["reason"])
            eventually(lambda: len([one for one in asked if one.began > killed_at]) > 2 * STREAMS)
            is_calm.set()
            eventually(lambda: shell.the_status()["is_ready"], deadline_s=READY_S)
            again, other, _ = shell.the_status()["instances"]
            loads += [
                pool.submit(keep_asking, front["url"], number, asked.append, is_over)
                for number in range(STREAMS, 2 * STREAMS)
            ]
            # Its readiness took one token; the rest is the load's.
            eventually(lambda: metrics(again)["vllm:generation_tokens_total"] > 300)
        finally:
            is_calm.set()
            is_over.set()
    for load in loads:
        load.result()
    under_way = [one for one in asked if one.began <= killed_at and killing_at <= one.ended]
    failed = [one for one in asked if one.problem or one.tokens != TOKENS]
    assert [one for one in failed if one not in under_way] == []
    killed_log, other_log = (Path(one["log"]).read_text() for one in (first, second))
    on_the_other = [one for one in under_way if f"cmpl-{one.name}" in other_log]
    # Whoever failed had got to the killed one, and to nobody else; who was on the other one did not notice.
    assert [one for one in failed if f"cmpl-{one.name}" not in killed_log] == []
    assert [one for one in failed if one in on_the_other] == []
    assert (len(failed) > 0, len(on_the_other) > 0) == (True, True)
    assert (again["restarts"], again["pid"] != first["pid"]) == (1, True)
    assert (other["restarts"], other["pid"]) == (0, second["pid"])


def test_a_stop_lets_streams_end_and_leaves_nothing(shell, alive, everybody):
    status = shell.the_status()
    front = status["instances"][-1]
    pids = everybody(status)
    begun = [threading.Event() for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        answers: list[Future[Streamed]] = [
            pool.submit(stream, front["url"], f"{number} " * 4, 1000, lambda *_, one=one: one.set())
            for number, one in enumerate(begun)
        ]
        for one in begun:
            assert one.wait(60)
        asked_at = time.monotonic()
        assert shell("stop", "--grace", "200").returncode == 0
        wait(answers)
    ended = [one.result() for one in answers]
    assert [one for one in ended if one.problem or one.tokens != 1000] == []
    assert [one for one in ended if one.ended > asked_at]
    assert not [pid for pid in pids if alive(pid)]
    for one in status["instances"]:
        host, _, port = one["url"].removeprefix("http://").removesuffix("/v1").partition(":")
        with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
            pass
