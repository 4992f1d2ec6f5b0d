"""Real engines, a real (tiny, random) model: what is served is what the model says, and stop leaves nothing.

The transformers tests run in an environment that has transformers[serving] and torch. The vLLM tests need a
Python that has vLLM, named by FLAGSCALE_TEST_VLLM_PYTHON; without it they fail, because a skipped proof looks
like a proof.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

PROMPT = "def main():"
NUM_TOKENS = 24
# Importing vLLM on two busy cores was seen to take minutes.
READY_S = 400


@pytest.fixture(scope="module")
def for_transformers(real_model, tmp_path_factory):
    return real_model(sys.executable, tmp_path_factory.mktemp("transformers"), PROMPT, NUM_TOKENS)


@pytest.fixture(scope="module")
def two_for_vllm(real_model, tmp_path_factory, vllm_python):
    folder, other = tmp_path_factory.mktemp("vllm"), tmp_path_factory.mktemp("other")
    first = real_model(vllm_python, folder, PROMPT, NUM_TOKENS, other)
    return first, (other / "model", json.loads((other / "expected.json").read_text()))


@pytest.fixture(scope="module")
def for_vllm(two_for_vllm):
    return two_for_vllm[0]


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


def check_bad_requests(status: dict, expected: dict, *, wrong_model: int, too_large: int) -> None:
    """What is wrong is said in OpenAI's form, whatever comes beside it, and nobody else is harmed by it."""
    (instance,) = status["instances"]
    url, asked = instance["url"], {"model": instance["model"], "max_tokens": 1}
    json_type = {"Content-Type": "application/json"}
    address = urlsplit(url)
    with (
        ThreadPoolExecutor(1) as pool,
        socket.create_connection((address.hostname, address.port)) as slow,
        httpx.Client(base_url=url, timeout=300, trust_env=False) as client,
    ):
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        other = pool.submit(ask, status, "completions", prompt=PROMPT, max_tokens=400)
        for path, question in (("/completions", {"prompt": "x"}), ("/chat/completions", {"messages": []})):
            large = b'{"model": "%b", "max_tokens": 1, "prompt": "%b"}' % (
                instance["model"].encode(),
                b"x" * 100_000_000,
            )
            for sent, code in (
                (client.post(path, content=b'{"model": ', headers=json_type), 400),
                (client.post(path, json={**asked, **question, "model": "no-such"}), wrong_model),
                (client.post(path, content=large, headers=json_type), too_large),
                (client.post(path, content=large[:-2], headers=json_type), too_large),
            ):
                assert sent.status_code == code, sent.text[:500]
                error = sent.json()["error"]
                assert (error["code"], bool(error["message"]), bool(error["type"])) == (code, True, True)
        assert client.post("/completions", json={**asked, "prompt": "x"}).status_code == 200
        assert other.result().json()["choices"][0]["text"].startswith(expected["completion"])


def check_stop(shell, alive, everybody, status: dict) -> None:
    pids = everybody(status)
    assert len(pids) >= 3
    assert shell("stop").returncode == 0
    assert not [pid for pid in pids if alive(pid)]
    assert shell.the_status()["state"] == "stopped"


@pytest.mark.transformers
def test_transformers_serves_what_the_model_says(shell, for_transformers, alive, everybody):
    model, expected = for_transformers
    shell.env["FLAGSCALE_SERVE_PYTHON"] = sys.executable
    done = shell("run", model, "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    assert "loading weights" in done.stderr
    status = shell.the_status()
    check_answers(shell, status, expected)
    check_bad_requests(status, expected, wrong_model=400, too_large=413)
    too_long = ask(status, "completions", prompt="x" * 5000)
    assert too_long.status_code == 400
    assert "maximum context length is 2048 tokens" in too_long.json()["error"]["message"]
    chunks = (b"x" * 1_000_000 for _ in range(100))
    url = f"{status['instances'][0]['url']}/completions"
    assert httpx.post(url, content=chunks, timeout=120, trust_env=False).status_code == 413
    assert "Traceback" not in Path(status["instances"][0]["log"]).read_text()
    check_stop(shell, alive, everybody, status)


@pytest.mark.transformers
def test_transformers_is_stopped_in_the_middle_of_an_answer(
    shell, for_transformers, alive, everybody, serve_file
):
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
    asking.communicate(timeout=shell.patience_s)
    assert asking.returncode == 4


@pytest.mark.transformers
def test_llama_cpp_serves_what_the_model_says(shell, for_transformers, alive, everybody):
    """llama.cpp's own server, by the wheel xllamacpp, on the same numbers."""
    model, expected = for_transformers
    engines = Path(__file__).parent / "engines"
    file = shell.home / "tiny.gguf"
    subprocess.run([sys.executable, engines / "gguf_model.py", model, file], check=True)
    program = shell.home / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{(engines / 'llama_server.py').read_text()}")
    program.chmod(0o755)
    shell.env["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = shell("run", file, "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    status = shell.the_status()
    assert status["instances"][0]["engine"] == "llama_cpp"
    check_answers(shell, status, expected)
    assert status["instances"][0]["load"]["waiting"] == 0
    check_bad_requests_of_llama_cpp(status)
    check_stop(shell, alive, everybody, status)


def check_bad_requests_of_llama_cpp(status: dict) -> None:
    """It says what is wrong in OpenAI's form, and many slow clients take no place from others.

    It answers to every name, and reads whatever it is sent: 100 MB cost that request its time, not others'.
    """
    (instance,) = status["instances"]
    address = urlsplit(instance["url"])
    begun = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    with ExitStack() as during:
        client = during.enter_context(httpx.Client(base_url=instance["url"], timeout=300, trust_env=False))
        for _ in range(64):
            slow = during.enter_context(socket.create_connection((address.hostname, address.port)))
            slow.sendall(begun)
        pool = during.enter_context(ThreadPoolExecutor(1))
        large = pool.submit(client.post, "/completions", content=b"x" * 100_000_000)
        asked = {"model": instance["model"], "prompt": "x", "max_tokens": 1}
        for sent, code in (
            (client.post("/completions", content=b'{"model": '), 400),
            (client.post("/completions", json={**asked, "prompt": "x" * 5000}), 400),
            (client.post("/completions", json={**asked, "temperature": "hot"}), 400),
            (client.post("/no/such/path", json=asked), 404),
            (large.result(), 400),
        ):
            assert sent.status_code == code, sent.text[:500]
            error = sent.json()["error"]
            assert (error["code"], bool(error["message"]), bool(error["type"])) == (code, True, True)
        assert client.post("/completions", json={**asked, "model": "no-such"}).status_code == 200


VLLM_FILE = """
- serve_id: {name}
  engine: vllm
  engine_args:
    model: {model}
    served_model_name: {name}
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
def test_vllm_serves_what_the_model_says(vllm_shell, for_vllm, alive, everybody, serve_file):
    model, expected = for_vllm
    path = serve_file(VLLM_FILE.format(name="tiny", model=model))
    done = vllm_shell("run", path, "--detach", "--timeout", READY_S)
    assert done.returncode == 0, done.stderr
    assert "loading weights" in done.stderr
    status = vllm_shell.the_status()
    check_answers(vllm_shell, status, expected)
    check_bad_requests(status, expected, wrong_model=404, too_large=400)
    check_bench(vllm_shell)
    check_stop(vllm_shell, alive, everybody, status)


@pytest.mark.vllm
def test_two_vllm_models_answer_by_their_names_and_a_killed_one_leaves_no_orphaned_engine(
    vllm_shell, two_for_vllm, alive, everybody, serve_file, eventually
):
    """Both stand behind the real router, at one port. An engine core outlives its killed API server for ever
    when nobody looks after it.
    """
    expected = dict(zip(("small", "large"), (answers for _, answers in two_for_vllm), strict=True))
    assert expected["small"]["completion"] != expected["large"]["completion"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    items = "".join(
        VLLM_FILE.format(name=name, model=model) + f"    port: {urlsplit(url).port}\n"
        for name, (model, _) in zip(expected, two_for_vllm, strict=True)
    )
    done = vllm_shell("run", serve_file(items), "--detach", "--timeout", READY_S, "--max-restarts", "0")
    assert done.returncode == 0, done.stderr
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        asked = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        for name in ("small", "large", "large", "small"):
            answer = client.post("/completions", json={**asked, "model": name}).json()
            assert (answer["model"], answer["choices"][0]["text"]) == (name, expected[name]["completion"])
        for _ in range(4):  # whoever gets it
            unknown = client.post("/completions", json={**asked, "model": "no-such"})
            assert (unknown.status_code, "no-such" in unknown.json()["error"]["message"]) == (404, True)
        assert sorted(client.get("/models").json()["models"]) == sorted(expected)
    settings = ("--temperature", "0", "--max-tokens", NUM_TOKENS, "-m", PROMPT)
    assert vllm_shell("chat", "--model", "large", *settings).stdout == expected["large"]["chat"] + "\n"
    status = vllm_shell.the_status()
    pids = everybody(status)
    os.kill(status["instances"][0]["pid"], signal.SIGKILL)
    eventually(lambda: not [pid for pid in pids if alive(pid)])
    assert vllm_shell.the_status()["state"] == "failed"


@pytest.mark.vllm
def test_vllm_that_cannot_start_gives_its_first_cause(vllm_shell, for_vllm, serve_file, tmp_path):
    model = tmp_path / "broken"
    shutil.copytree(for_vllm[0], model)
    file = VLLM_FILE.format(name="tiny", model=model)
    path = serve_file(f"{file}    tokenizer: /no/such/tokenizer\n", name="bad")
    done = vllm_shell("run", path, "--detach", "--timeout", READY_S)
    assert done.returncode == 2
    (model / "config.json").write_text(
        (model / "config.json").read_text().replace("Qwen3ForCausalLM", "NoSuchModel")
    )
    done = vllm_shell("run", serve_file(file), "--detach", "--timeout", READY_S)
    assert done.returncode == 4
    assert "NoSuchModel" in done.stderr
    assert "Traceback" not in done.stderr
