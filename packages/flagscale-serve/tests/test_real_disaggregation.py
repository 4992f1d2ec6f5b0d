"""Prefill apart from decode on two real vLLM servers: keys and values move through NIXL, over CPU memory.

They are started once, behind the real vllm-router. They run where vllm-router is, beside a Python that has
vLLM and nixl, named by FLAGSCALE_TEST_VLLM_PYTHON: `nox -s vllm`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time

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
PAIR = """
runner:
  deploy:
    prefill_decode_disaggregation: true
    prefill_num: 1
    decode_num: 1
"""


@pytest.fixture(scope="module")
def pair(module_service, real_model, vllm_python, tmp_path_factory):
    """The command line that started both halves, and what the model says by itself."""
    shell, serve_file = module_service
    model, expected = real_model(vllm_python, tmp_path_factory.mktemp("model"), PROMPT, NUM_TOKENS)
    shell.env["FLAGSCALE_SERVE_PYTHON"] = vllm_python
    file = serve_file(FILE.format(model=model), experiment=PAIR)
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


def test_what_was_computed_in_one_half_is_answered_from_the_other(pair):
    shell, expected = pair
    prefill, decode, front = shell.the_status()["instances"]
    assert [one["behind"] for one in (prefill, decode)] == [front["name"]] * 2
    before = prompt_tokens(prefill), prompt_tokens(decode)
    long = "to be or not to be, " * 25  # several blocks of 128 tokens
    assert text_of(ask(front, PROMPT)) == expected["completion"]
    through_both = text_of(ask(front, long))
    after = prompt_tokens(prefill), prompt_tokens(decode)
    asked = len(PROMPT) + len(long)  # every byte is a token
    assert after[0]["local_compute"] - before[0]["local_compute"] == asked
    assert after[1]["external_kv_transfer"] - before[1]["external_kv_transfer"] == asked
    assert after[1]["local_compute"] == before[1]["local_compute"] == 0
    assert after[1]["bytes"] > before[1]["bytes"]
    assert text_of(ask(prefill, long)) == through_both  # the same model, alone


def test_the_halves_chat(pair):
    shell, expected = pair
    said = shell("chat", "--temperature", "0", "--max-tokens", NUM_TOKENS, "-m", PROMPT)
    assert said.stdout == expected["chat"] + "\n"


def test_a_killed_half_is_started_again_and_the_pair_answers(pair, eventually):
    shell, expected = pair
    prefill, decode, front = shell.the_status()["instances"]
    os.kill(prefill["pid"], signal.SIGKILL)
    eventually(lambda: "killed by signal 9" in shell.the_status()["reason"])
    began = time.monotonic()
    assert ask(front, PROMPT).status_code >= 500
    assert time.monotonic() - began < 60  # it is told, and waits for nothing
    eventually(lambda: shell.the_status()["is_ready"], deadline_s=READY_S)
    assert text_of(ask(front, PROMPT)) == expected["completion"]  # at once: ready is said of the whole pair
    again, same, _ = shell.the_status()["instances"]
    assert (again["restarts"], same["restarts"], same["pid"]) == (1, 0, decode["pid"])
    assert prompt_tokens(again)["local_compute"] >= len(PROMPT)
    assert prompt_tokens(same)["local_compute"] == 0


def test_a_stop_leaves_nothing(pair, alive, everybody):
    shell, _ = pair
    status = shell.the_status()
    pids = everybody(status)
    assert shell("stop").returncode == 0
    assert not [pid for pid in pids if alive(pid)]
    for one in status["instances"]:
        host, _, port = one["url"].removeprefix("http://").removesuffix("/v1").partition(":")
        with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
            pass
