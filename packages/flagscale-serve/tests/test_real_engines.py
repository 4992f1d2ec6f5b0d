"""Real engines, a real (tiny, random) model: what is served is what the model says, and stop leaves nothing.

The transformers tests run in an environment that has transformers[serving] and torch. The vLLM tests need a
Python that has vLLM, named by FLAGSCALE_TEST_VLLM_PYTHON; without it they fail, because a skipped proof looks
like a proof.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

PROMPT = "def main():"
NUM_TOKENS = 24
# Importing vLLM on two busy cores was seen to take minutes.
READY_S = 400


def descendants(pid: int) -> set[int]:
    """Return every process below one, as the kernel tells it now."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def everybody(status: dict) -> set[int]:
    recorded = json.loads((Path(status["run_dir"]) / "supervisor.json").read_text())
    return descendants(recorded["guardian"]["pid"])


def make_model(python: str, folder: Path) -> tuple[Path, dict]:
    model = folder / "model"
    script = Path(__file__).parent / "engines" / "tiny_model.py"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([python, script, model, PROMPT, str(NUM_TOKENS)], check=True, env=env)
    return model, json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def for_transformers(tmp_path_factory):
    return make_model(sys.executable, tmp_path_factory.mktemp("transformers"))


@pytest.fixture(scope="module")
def vllm_python():
    python = os.environ.get("FLAGSCALE_TEST_VLLM_PYTHON")
    if not python:
        pytest.fail("FLAGSCALE_TEST_VLLM_PYTHON is not set: name a Python that has vLLM")
    return python


@pytest.fixture(scope="module")
def for_vllm(tmp_path_factory, vllm_python):
    return make_model(vllm_python, tmp_path_factory.mktemp("vllm"))


def ask(status: dict, path: str, **more: object) -> httpx.Response:
    (instance,) = status["instances"]
    body = {"model": instance["model"], "max_tokens": NUM_TOKENS, "temperature": 0, **more}
    return httpx.post(f"{instance['url']}/{path}", json=body, timeout=120, trust_env=False)


def check_answers(shell, status: dict, expected: dict) -> None:
    """Greedy answers equal `model.generate`: completion, chat, and both streamed by the command line."""
    completion = ask(status, "completions", prompt=PROMPT).json()
    assert completion["choices"][0]["text"] == expected["completion"]
    assert completion["usage"]["completion_tokens"] == NUM_TOKENS
    chat = ask(status, "chat/completions", messages=[{"role": "user", "content": PROMPT}]).json()
    assert chat["choices"][0]["message"]["content"] == expected["chat"]
    settings = ("--temperature", "0", "--max-tokens", NUM_TOKENS, "-m", PROMPT)
    assert shell("chat", *settings).stdout == expected["chat"] + "\n"
    assert shell("chat", "--complete", *settings).stdout == expected["completion"] + "\n"
    models = httpx.get(f"{status['instances'][0]['url']}/models", timeout=60, trust_env=False).json()
    assert status["instances"][0]["model"] in [one["id"] for one in models["data"]]


def check_stop(shell, alive, status: dict) -> None:
    pids = everybody(status)
    assert len(pids) >= 3
    assert shell("stop").returncode == 0
    assert not [pid for pid in pids if alive(pid)]
    assert shell.the_status()["state"] == "stopped"


@pytest.mark.transformers
def test_transformers_serves_what_the_model_says(shell, for_transformers, alive):
    model, expected = for_transformers
    shell.env["FLAGSCALE_SERVE_PYTHON"] = sys.executable
    done = shell("run", model, "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    assert "loading weights" in done.stderr
    status = shell.the_status()
    check_answers(shell, status, expected)
    refused = ask(status, "completions", prompt="x", model="another")
    assert refused.status_code == 400
    check_stop(shell, alive, status)


@pytest.mark.transformers
def test_transformers_is_stopped_in_the_middle_of_an_answer(shell, for_transformers, alive, serve_file):
    """Left alone, the server waits for the answer to end, which takes longer than anybody waits."""
    model, _ = for_transformers
    shell.env["FLAGSCALE_SERVE_PYTHON"] = sys.executable
    path = serve_file(f"- serve_id: m\n  engine_args: {{model: {model}, served_model_name: org/tiny}}\n")
    done = shell("run", path, "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    status = shell.the_status()
    assert status["instances"][0]["model"] == "org/tiny"
    asking = shell.popen("chat", "-m", "go on", "--max-tokens", "100000", "--temperature", "0")
    assert asking.stdout.read(1)
    pids = everybody(status)
    assert shell("stop", "--grace", "2").returncode == 0
    assert not [pid for pid in pids if alive(pid)]
    asking.communicate(timeout=30)
    assert asking.returncode == 4


@dataclass
class Asked:
    """One request under load."""

    began: float
    ended: float = 0.0
    problem: str = ""


def ask_until(url: str, is_over: threading.Event) -> list[Asked]:
    """Ask again and again, as a client without retries of its own."""
    found = []
    with httpx.Client(timeout=120, trust_env=False) as client:
        while not is_over.is_set():
            one = Asked(began=time.monotonic())
            body = {"model": "tiny", "prompt": f"{PROMPT} {len(found)}", "max_tokens": 4}
            try:
                answer = client.post(f"{url}/completions", json=body)
                one.problem = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
            except httpx.HTTPError as error:
                one.problem = repr(error)
            one.ended = time.monotonic()
            found.append(one)
    return found


@pytest.mark.transformers
def test_one_of_two_instances_is_killed_under_load_and_requests_end_before_a_stop(
    shell, for_transformers, alive, serve_file, eventually
):
    model, _ = for_transformers
    shell.env["FLAGSCALE_SERVE_PYTHON"] = sys.executable
    item = f"- serve_id: m\n  engine_args: {{model: {model}, served_model_name: tiny}}\n"
    path = serve_file(f"{item}  resources: {{num_replicas: 2}}\n")
    done = shell("run", path, "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    first, second, front = shell.the_status()["instances"]
    is_over = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(ask_until, front["url"], is_over) for _ in range(4)]
        try:
            time.sleep(2)  # a load, not a wait for something
            killed_at = time.monotonic()
            os.kill(first["pid"], signal.SIGKILL)
            eventually(lambda: shell.the_status()["state"] == "starting")
            assert "killed by signal 9" in shell.the_status()["reason"]
            eventually(lambda: shell.the_status()["is_ready"], deadline_s=READY_S)
        finally:
            is_over.set()
        asked = [one for load in loads for one in load.result()]
    failed = [one for one in asked if one.problem]
    assert [one.problem for one in failed if not one.began <= killed_at <= one.ended] == []
    assert len([one for one in asked if one.began > killed_at]) > len(failed)
    again, other, _ = shell.the_status()["instances"]
    assert (again["restarts"], again["pid"] != first["pid"]) == (1, True)
    assert (other["restarts"], other["pid"]) == (0, second["pid"])
    assert "started again 1 times" in shell("status").stdout

    pids = everybody(shell.the_status())
    words = ("--complete", "--max-tokens", "150", "--temperature", "0", "-m", PROMPT)
    asking = shell.popen("chat", front["url"], "--model", "tiny", *words)
    assert asking.stdout.read(1)
    assert shell("stop", "--grace", "120").returncode == 0
    said, errors = asking.communicate(timeout=60)
    assert asking.returncode == 0, errors
    assert len(said) > 100
    assert not [pid for pid in pids if alive(pid)]


VLLM_FILE = """
- serve_id: tiny
  engine: vllm
  engine_args:
    model: {model}
    served_model_name: tiny
    dtype: float32
    kv_cache_memory_bytes: 67108864
    max_model_len: 1024
"""


@pytest.fixture
def vllm_shell(shell, vllm_python):
    shell.env["FLAGSCALE_SERVE_PYTHON"] = vllm_python
    return shell


def check_bench(shell) -> None:
    """Every request of vLLM's own load is answered in full, and counted as vLLM counts it."""
    words = ("--input-len", 16, "--output-len", 8, "--requests", 12, "--warmups", 2, "--concurrency", 4)
    done = shell("bench", *words, "--slo", "e2e=60s", "--json")
    assert done.returncode == 0, done.stderr
    (level,) = json.loads(done.stdout)["levels"]
    assert (level["generator"], level["answered"], level["failed"]) == ("vllm bench serve", 12, 0)
    assert (level["output_tokens"], level["within_slo"]) == (12 * 8, 1.0)


@pytest.mark.vllm
def test_vllm_serves_what_the_model_says(vllm_shell, for_vllm, alive, serve_file):
    model, expected = for_vllm
    done = vllm_shell("run", serve_file(VLLM_FILE.format(model=model)), "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    assert "loading weights" in done.stderr
    status = vllm_shell.the_status()
    check_answers(vllm_shell, status, expected)
    assert ask(status, "completions", prompt="x", model="another").status_code == 404
    check_bench(vllm_shell)
    # An answer under way ends before the stop does.
    asking = vllm_shell.popen("chat", "--complete", "--max-tokens", "900", "--temperature", "0", "-m", PROMPT)
    assert asking.stdout.read(1)
    check_stop(vllm_shell, alive, status)
    said, errors = asking.communicate(timeout=60)
    assert (asking.returncode, len(said)) == (0, 900), errors


@pytest.mark.vllm
def test_vllm_killed_leaves_no_orphaned_engine(vllm_shell, for_vllm, alive, serve_file, eventually):
    """The engine core of a killed API server lives on for ever when nobody looks after it."""
    model, _ = for_vllm
    path = serve_file(VLLM_FILE.format(model=model))
    done = vllm_shell("run", path, "--detach", "--timeout", READY_S, "--max-restarts", "0")
    assert done.returncode == 0, done.stderr
    status = vllm_shell.the_status()
    pids = everybody(status)
    os.kill(status["instances"][0]["pid"], signal.SIGKILL)
    eventually(lambda: not [pid for pid in pids if alive(pid)], deadline_s=10)
    assert vllm_shell.the_status()["state"] == "failed"


@pytest.mark.vllm
def test_vllm_that_cannot_start_gives_its_first_cause(vllm_shell, for_vllm, serve_file):
    model, _ = for_vllm
    path = serve_file(VLLM_FILE.format(model=model) + "    tokenizer: /no/such/tokenizer\n", name="bad")
    done = vllm_shell("run", path, "--detach", "--timeout", READY_S)
    assert done.returncode == 2
    (model / "config.json").write_text(
        (model / "config.json").read_text().replace("Qwen3ForCausalLM", "NoSuchModel")
    )
    done = vllm_shell("run", serve_file(VLLM_FILE.format(model=model)), "--detach", "--timeout", READY_S)
    assert done.returncode == 4
    assert "NoSuchModel" in done.stderr
    assert "Traceback" not in done.stderr
