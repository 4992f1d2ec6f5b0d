"""Asking: through a run, and through any address."""

from __future__ import annotations

import pytest


@pytest.fixture
def served(shell, model_dir):
    assert shell("run", model_dir, "--detach").returncode == 0
    return shell


def test_the_answer_alone_is_on_standard_output(served, model_dir):
    done = served("chat", model_dir, "-m", "Hello", "--temperature", "0", "--max-tokens", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "user=Hello t=0.0 n=5 m=tiny-qwen3\n"


def test_system_message_standard_input_and_plain_completion(served):
    done = served("chat", "--system", "Be brief", stdin="Hi")
    assert done.stdout == "system=Be brief|user=Hi t=None n=512 m=tiny-qwen3\n"
    done = served("chat", "--complete", "-m", "Once upon")
    assert done.stdout == "Once upon t=None n=512 m=tiny-qwen3\n"
    refused = served("chat", "--complete", "--system", "x", "-m", "y")
    assert refused.returncode == 2


def test_any_address_and_its_first_model(served):
    url = served.the_status()["instances"][0]["url"]
    assert url.endswith("/v1")
    for address in (url, url + "/", url.removesuffix("/v1")):
        assert served("chat", address, "-m", "Hi").stdout.endswith("m=from-the-list\n")
    assert served("chat", url, "-m", "Hi", "--model", "mine").stdout.endswith("m=mine\n")


def test_a_refused_request_and_a_broken_answer(served):
    refused = served("chat", "-m", "Hi", "--max-tokens", "13")
    assert refused.returncode == 4
    assert "HTTP 400: 13 is unlucky" in refused.stderr
    broken = served("chat", "-m", "Hi", "--max-tokens", "14")
    assert broken.returncode == 4
    assert broken.stdout.startswith("user=Hi")
    assert "the engine fell over" in broken.stderr


def test_nobody_there(shell):
    done = shell("chat", "http://127.0.0.1:9/v1", "-m", "Hi")
    assert done.returncode == 3
    assert "nobody answers" in done.stderr
    assert shell("chat", "-m", "Hi").returncode == 3


def test_a_model_without_chat_template_is_told_before_the_engine_fails(served, model_dir):
    (model_dir / "tokenizer_config.json").write_text("{}")
    done = served("chat", "-m", "Hi")
    assert done.returncode == 2
    assert "no chat template: ask for a plain completion (--complete)" in done.stderr
    assert served("chat", "-m", "Hi", "--complete").returncode == 0


def test_a_key_is_asked_for_and_given(shell, model_dir, serve_file):
    path = serve_file(
        f"- serve_id: a\n  engine: vllm\n  engine_args: {{model: {model_dir}, api_key: very-secret-key}}\n"
    )
    assert shell("run", path, "--detach").returncode == 0
    refused = shell("chat", path, "-m", "Hi")
    assert refused.returncode == 4
    assert "HTTP 401" in refused.stderr
    assert "--api-key" in refused.stderr
    assert shell("chat", path, "-m", "Hi", "--api-key", "very-secret-key").returncode == 0
    leaks = [p for p in path.parent.parent.rglob("*.json") if p.is_file() and "very-secret" in p.read_text()]
    assert leaks == []


def test_two_models_and_a_choice(shell, model_dir, serve_file):
    path = serve_file(
        f"- serve_id: a\n  engine_args: {{model: {model_dir}, served_model_name: first}}\n"
        f"- serve_id: b\n  engine_args: {{model: {model_dir}, served_model_name: second}}\n"
    )
    done = shell("run", path, "--detach")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ready after") == 2
    assert "a: loading weights" in done.stderr
    refused = shell("chat", path, "-m", "Hi")
    assert refused.returncode == 3
    assert "choose one of first, second" in refused.stderr
    assert shell("chat", path, "-m", "Hi", "--model", "second").stdout.endswith("m=second\n")
    assert "b: Application startup complete" in shell("logs", path).stdout
    assert shell("stop", path).returncode == 0
