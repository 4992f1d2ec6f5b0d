"""Asking: through a run, and through any address."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from flagscale_serve.chat import Conversation, Server
from flagscale_serve.cli.talking import talk


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
    last = shell("logs", path, "-n", 1).stdout.splitlines()
    assert [line.partition(":")[0] for line in last] == ["a", "b"]
    assert shell("stop", path).returncode == 0


# The first terminal that the leader of a session opens is its own: so Ctrl-C reaches it.
ON_TERMINAL = """
import os, runpy
os.close(os.open(os.ttyname(0), os.O_RDWR))
runpy.run_module("flagscale_serve.cli", run_name="__main__")
"""


class Terminal:
    """The command line as a person at a terminal has it."""

    def __init__(self, shell, *words):
        self._mine, theirs = pty.openpty()
        self._patience_s, self._shown = shell.patience_s, ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **shell.env, "TERM": "dumb"},
            cwd=shell.home,
            start_new_session=True,
        )
        os.close(theirs)

    def until(self, sign):
        """Read until a sign has been shown; return what stands in front of it."""
        end = time.monotonic() + self._patience_s
        while sign not in self._shown:
            assert time.monotonic() < end, f"{sign!r} not in {self._shown[-500:]!r}"
            if select.select([self._mine], [], [], 0.5)[0]:
                self._shown += os.read(self._mine, 65536).decode()
        before, _, self._shown = self._shown.partition(sign)
        return before

    def type(self, text):
        os.write(self._mine, text.encode())

    def say(self, text):
        """Type a line at the prompt and return what is shown until the next one."""
        self.type(f"{text}\n")
        self.until(text)
        return self.until("> ").strip()

    def close(self):
        os.close(self._mine)


@contextmanager
def terminal(shell, *words):
    here = Terminal(shell, *words)
    try:
        yield here
        here.process.wait(shell.patience_s)
    finally:
        here.process.kill()
        here.process.wait()
        here.close()


def test_a_conversation_on_a_terminal(served):
    with terminal(served, "chat") as here:
        here.until("/help tells the commands")
        here.until("> ")
        assert here.say("One") == "user=One t=None n=512 m=tiny-qwen3"
        first = "user=One|assistant=user=One t=None n=512 m=tiny-qwen3"
        assert here.say("Two").startswith(f"{first}|user=Two t=None")
        assert here.say("/retry").startswith(f"{first}|user=Two t=None")
        here.say("/system Be brief")
        here.say("/clear")
        assert here.say("Three") == "system=Be brief|user=Three t=None n=512 m=tiny-qwen3"
        assert "/retry" in here.say("/what")
        here.say("/clear")
        here.type('"""Four\n')
        here.until(". ")
        here.type('five"""\n')
        assert "user=Four\r\nfive t=None" in here.until("> ")
        here.type("\x04")
    assert here.process.returncode == 0
    history = Path(served.env["FLAGSCALE_STATE_DIR"]) / "serve/chat_history"
    assert "/system" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_at_the_prompt_does_not_leave(monkeypatch, tmp_path):
    # By hand: between the prompt and the wait for a key, Python's readline loses the signal until one comes.
    typed = iter([KeyboardInterrupt, "a \\", KeyboardInterrupt, "  ", "/system Be brief", EOFError])

    def read(_prompt):
        now = next(typed)
        if isinstance(now, str):
            return now
        raise now

    monkeypatch.setattr("builtins.input", read)
    shown = []
    conversation = Conversation(Server(url="http://127.0.0.1:9/v1", model="m"))
    talk(conversation, shown.append, history=tmp_path / "no/such/folder" / "history")
    assert "".join(shown).count("(Ctrl-D leaves)") == 2
    assert (conversation.system, conversation.said) == ("Be brief", [])


def test_ctrl_c_breaks_an_answer_off_and_the_conversation_goes_on(served):
    with terminal(served, "chat", "--max-tokens", "15") as here:  # for which the fake engine never ends
        here.until("> ")
        here.type("Go on\n")
        here.until("xxxx")
        here.type("\x03")
        here.until("(broken off)")
        here.until("> ")
        here.type("/quit\n")
    assert here.process.returncode == 0


def test_a_mistake_does_not_end_the_conversation(served):
    with terminal(served, "chat", "--max-tokens", "13") as here:
        here.until("> ")
        assert "HTTP 400: 13 is unlucky" in here.say("Hi")
        here.type("/quit\n")
    assert here.process.returncode == 0
