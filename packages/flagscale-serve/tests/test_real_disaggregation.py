"""Prefill apart from decode on real vLLM servers, 2P1D: keys and values move through NIXL, over CPU memory.

They are started once, behind the real vllm-router. They run where vllm-router is, beside a Python that has
vLLM and nixl, named by FLAGSCALE_TEST_VLLM_PYTHON: `nox -s vllm`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytestmark = pytest.mark.vllm
READY_S = 600
PROMPT, NUM_TOKENS = "def main():", 24
FILE = """
- serve_id: tiny
  engine: vllm
  engine_args:
    model: {model}
    served_model_name: tiny
    dtype: float32
    kv_cache_memory_bytes: 67108864
    max_model_len: 1024
    # Seconds for which prefill keeps what nobody has fetched; 30 are too few where all cores are taken.
    kv_transfer_config: {{kv_connector_extra_config: {{kv_lease_duration: 600}}}}
"""
# In turn, so that every prefill gets its share.
THREE = """
runner:
  deploy:
    prefill_decode_disaggregation: true
    prefill_num: 2
    decode_num: 1
    prefill_decode_strategy: robin
"""


@pytest.fixture(scope="module")
def three(module_service, real_model, vllm_python, tmp_path_factory):
    """The command line that started them all, and what the model says by itself."""
    shell, serve_file = module_service
    model, expected = real_model(vllm_python, tmp_path_factory.mktemp("model"), PROMPT, NUM_TOKENS)
    shell.env["FLAGSCALE_SERVE_PYTHON"] = vllm_python
    file = serve_file(FILE.format(model=model), experiment=THREE)
    done = shell("run", file, "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    return shell, expected


def ask(instance: dict, prompt: str) -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    return httpx.post(f"{instance['url']}/completions", json=body, timeout=120, trust_env=False)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def prompt_tokens(instance: dict) -> dict[str, float]:
    """Return how many tokens of prompts came from where: computed here, or moved here from elsewhere."""
    base = instance["url"].removesuffix("/v1")
    told = httpx.get(f"{base}/metrics", timeout=60, trust_env=False).text
    rows = re.findall(r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} (\S+)$', told, re.MULTILINE)
    moved = re.findall(r"^vllm:nixl_bytes_transferred_sum\{.*\} (\S+)$", told, re.MULTILINE)
    return {name: float(value) for name, value in rows} | {"bytes": sum(map(float, moved))}


def test_what_each_prefill_computed_is_answered_from_decode(three):
    shell, expected = three
    *halves, front = shell.the_status()["instances"]
    assert [one["behind"] for one in halves] == [front["name"]] * 3
    before = [prompt_tokens(one) for one in halves]
    long = "to be or not to be, " * 25  # several blocks of 128 tokens
    prompts = [PROMPT, long, f"again: {long}", f"and again: {long}"]
    answers = [text_of(ask(front, prompt)) for prompt in prompts]
    after = [prompt_tokens(one) for one in halves]
    grown = [{name: now[name] - then[name] for name in now} for now, then in zip(after, before, strict=True)]
    *prefills, decode = grown
    asked = sum(map(len, prompts))  # every byte is a token
    # What one of them computed, the other did not, and decode computed nothing: it fetched from both.
    assert all(one["local_compute"] > 0 for one in prefills)
    assert sum(one["local_compute"] for one in prefills) == decode["external_kv_transfer"] == asked
    assert decode["local_compute"] == 0
    assert decode["bytes"] > 0
    assert answers[0] == expected["completion"]
    assert answers[1] == text_of(ask(halves[0], long))  # the same model, alone


def test_the_halves_chat(three):
    shell, expected = three
    said = shell("chat", "--temperature", "0", "--max-tokens", NUM_TOKENS, "-m", PROMPT)
    assert said.stdout == expected["chat"] + "\n"


def ask_until(url: str, is_over: threading.Event, asked: list[tuple[float, str]]) -> None:
    """Ask again and again; note when each request began, and its problem."""
    body = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    with httpx.Client(timeout=300, trust_env=False) as client:
        while not is_over.is_set():
            began = time.monotonic()
            try:
                prompt = f"{len(asked)} {'x' * 150}"
                answer = client.post(f"{url}/completions", json={**body, "prompt": prompt})
                problem = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
            except httpx.HTTPError as error:
                problem = repr(error)
            asked.append((began, problem))


def computed_for_elsewhere(prefill: dict, prompt: str) -> dict:
    """Let a prefill compute a prompt as the router does; return where it says that the result lies."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    wish = {"do_remote_decode": True, "do_remote_prefill": False}
    url = f"{prefill['url']}/completions"
    answer = httpx.post(url, json={**body, "kv_transfer_params": wish}, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["kv_transfer_params"]


def test_one_prefill_is_killed_under_load_and_no_later_request_fails(three, eventually):
    shell, expected = three
    first, second, decode, front = shell.the_status()["instances"]
    lost = "what nobody has fetched when its prefill dies, " * 10
    lying = computed_for_elsewhere(first, lost)
    before = prompt_tokens(first)["local_compute"], prompt_tokens(second)["local_compute"]
    is_over = threading.Event()
    asked: list[tuple[float, str]] = []
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(ask_until, front["url"], is_over, asked) for _ in range(2)]
        try:
            for one, then in zip((first, second), before, strict=True):
                eventually(
                    lambda one=one, then=then: prompt_tokens(one)["local_compute"] > then, deadline_s=READY_S
                )
            killed_at = time.monotonic()
            os.kill(first["pid"], signal.SIGKILL)
            eventually(
                lambda: len([began for began, _ in asked if began > killed_at]) > 8, deadline_s=READY_S
            )
            assert "killed by signal 9" in shell.the_status()["reason"]
            # Decode computes itself what it cannot fetch any more.
            body = {"model": "tiny", "prompt": lost, "max_tokens": NUM_TOKENS, "temperature": 0}
            answer = httpx.post(
                f"{decode['url']}/completions",
                json={**body, "kv_transfer_params": lying},
                timeout=READY_S,
                trust_env=False,
            )
            assert text_of(answer) == text_of(ask(second, lost))
        finally:
            is_over.set()
        for load in loads:
            load.result()
    assert [problem for began, problem in asked if problem and began > killed_at] == []
    eventually(lambda: shell.the_status()["is_ready"], deadline_s=READY_S)
    again, other, same, _ = shell.the_status()["instances"]
    assert (again["restarts"], other["restarts"], same["restarts"]) == (1, 0, 0)
    assert (other["pid"], same["pid"]) == (second["pid"], decode["pid"])
    assert text_of(ask(front, PROMPT)) == expected["completion"]


def test_a_stop_leaves_nothing(three, alive, everybody):
    shell, _ = three
    status = shell.the_status()
    pids = everybody(status)
    assert shell("stop").returncode == 0
    assert not [pid for pid in pids if alive(pid)]
    for one in status["instances"]:
        host, _, port = one["url"].removeprefix("http://").removesuffix("/v1").partition(":")
        with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
            pass
