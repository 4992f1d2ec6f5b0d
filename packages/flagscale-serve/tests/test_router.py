"""Several instances behind the real router. It runs where vllm-router is installed: `nox -s engines`."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

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
            trust_env=False,
        )
        assert answer.json()["choices"][0]["text"] == f"WORD {number}"
    # The key is the instances' own: the router passes it on, and has none in its command line.
    refused = httpx.post(f"{router['url']}/completions", json={**body, "prompt": "x"}, trust_env=False)
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
def test_one_of_two_is_killed_under_load_and_comes_back(shell, serve_file, model_dir, eventually):
    done = shell("run", serve_file(SHORT_ITEM.format(model=model_dir)), "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    first, second, front = shell.the_status()["instances"]
    is_over = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(ask_until, front["url"], is_over) for _ in range(4)]
        try:
            logs = [Path(one["log"]) for one in (first, second)]
            eventually(lambda: all("POST" in log.read_text() for log in logs))
            killed_at = time.monotonic()
            os.kill(first["pid"], signal.SIGKILL)
            eventually(lambda: not shell.the_status()["is_ready"])
            assert "killed by signal 9" in shell.the_status()["reason"]
            eventually(lambda: shell.the_status()["is_ready"])
        finally:
            is_over.set()
        asked = [one for load in loads for one in load.result()]
    failed = [one for one in asked if one[2]]
    assert [one for one in failed if not one[0] <= killed_at <= one[1]] == []
    assert len([one for one in asked if one[0] > killed_at]) > 8
    again, other, _ = shell.the_status()["instances"]
    assert (again["restarts"], again["pid"] != first["pid"]) == (1, True)
    assert (other["restarts"], other["pid"]) == (0, second["pid"])
    assert "started again 1 times" in shell("status").stdout
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
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        # vLLM's router answers in plain words here, not in OpenAI's form.
        broken = client.post("/completions", content=b'{"model": ', headers=json_type)
        assert (broken.status_code, "JSON" in broken.text) == (400, True)
        large = client.post("/completions", content=b'{"prompt": "' + b"x" * 100_000_000, headers=json_type)
        assert large.status_code == 413
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            good = client.post("/completions", json={"model": "m", "prompt": "x", "max_tokens": 1})
            assert good.json()["choices"][0]["text"] == "X"
    logs = Path(shell.the_status()["instances"][0]["log"]).parent
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "m", "prompt": "x", "max_tokens": 4}  # takes two seconds
        answer = pool.submit(httpx.post, f"{url}/completions", json=body, timeout=60, trust_env=False)
        eventually(lambda: any("took it" in path.read_text() for path in logs.glob("a-?.log")))
        assert shell("stop", "--grace", "8").returncode == 0
        assert answer.result().json()["choices"][0]["text"] == "X"


def test_a_router_that_is_not_there_is_named_with_its_cure(shell, serve_file, model_dir, monkeypatch):
    monkeypatch.setattr("flagscale_serve.router.MODULE", "no_such_router")
    done = shell("run", serve_file(ITEM.format(model=model_dir)))
    assert done.returncode == 3
    assert "pip install 'flagscale-serve[router]'" in done.stderr
    assert shell.engine_pids() == []
