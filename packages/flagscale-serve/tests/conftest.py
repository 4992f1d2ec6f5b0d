LONGDOC """What the tests share: model directories without a model, an engine without an engine, and a way to see leftovers."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest

DEADLINE_S = 60.0
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

# Stands for the Python that has an engine: answers the question whether it does, and is the server.
FAKE_PYTHON = '''\
#!{python}
"""A server with the manners of an engine, or the lack of them; FAKE_MODE says which."""
import http.server, json, os, signal, subprocess, sys, threading, time

MODE = os.environ.get("FAKE_MODE", "good")

def remember(pid):
    with open(os.environ["FAKE_PIDS"], "a") as file:
        file.write(f"{{pid}}\\n")

if "-c" in sys.argv:
    wanted = json.loads(sys.argv[-1])
    print(json.dumps({{
        "python": "3.12.0",
        "missing": [name for name in wanted["modules"] if name == os.environ.get("FAKE_MISSING")],
        "versions": {{name: "9.9" for name in wanted["distributions"]}},
    }}))
    raise SystemExit

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

remember(os.getpid())
with open(os.environ["FAKE_PIDS"] + ".argv", "w") as file:
    json.dump(sys.argv[1:], file)
print("Loading weights: 100%", flush=True)
if MODE == "dies":
    def load():
        raise RuntimeError("weights are made of cheese")
    load()
if MODE in ("deaf", "family"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if MODE == "family":
    # A grandchild in a session of its own, whose parent is gone: nothing but the sub-reaper knows it.
LONGCODE     code = "import os,signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
    outer = (
        "import subprocess,sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "start_new_session=True, stdout=subprocess.PIPE); print(p.stdout.readline().decode().strip(), "
        "flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", outer, code], stdout=subprocess.PIPE, check=True)
    remember(int(done.stdout))

BORN = time.monotonic()

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        print(args[0] % args[1:], flush=True)

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/v1/models":
            self.answer(200, {{"object": "list", "data": [{{"id": "from-the-list"}}]}})
        else:
            self.answer(200, {{"status": "ok"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = os.environ.get("VLLM_API_KEY")
        if key and self.headers.get("Authorization") != f"Bearer {{key}}":
            self.answer(401, {{"error": "Unauthorized"}})
        elif MODE == "mute":
            self.answer(200, {{"choices": [], "usage": {{"completion_tokens": 0}}}})
        elif MODE == "slow" and time.monotonic() - BORN < 2:
            self.answer(503, {{"error": "still loading"}})
        elif body.get("max_tokens") == 13:
            self.answer(400, {{"error": {{"message": "13 is unlucky", "code": 400}}}})
        elif body.get("stream"):
            self.stream(body)
        else:
            self.answer(200, {{"choices": [{{"text": "!"}}], "usage": {{"completion_tokens": 1}}}})

    def stream(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
LONGCODE         said = body["prompt"] if "prompt" in body else " | ".join(m["role"] + "=" + m["content"] for m in body["messages"])
LONGCODE         pieces = [said, f" t={{body.get('temperature')}}", f" n={{body['max_tokens']}}", f" m={{body['model']}}"]
        for piece in pieces:
            choice = {{"text": piece}} if "prompt" in body else {{"delta": {{"content": piece}}}}
            self.wfile.write(f"data: {{json.dumps({{'choices': [choice]}})}}\\n\\n".encode())
            self.wfile.flush()
            if body["max_tokens"] == 14:
                self.wfile.write(b'data: {{"error": "the engine fell over"}}\\n\\n')
                return
        self.wfile.write(b"data: [DONE]\\n\\n")

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

server = Server((value("--host"), int(value("--port"))), Handler)
print("Application startup complete", flush=True)
if MODE == "dies-later":
    threading.Timer(1.5, lambda: os._exit(7)).start()
server.serve_forever()
'''


def write_safetensors(path: Path, names: tuple[str, ...] = ("a", "b")) -> None:
    """Write tensors of one float each."""
    entries = {
LONGCODE         name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4 * len(names))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory that looks whole to everybody who reads headers only."""
    path = tmp_path / "models" / "tiny-qwen3"
    path.mkdir(parents=True)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    write_safetensors(path / "model.safetensors")
    return path


@pytest.fixture
def serve_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a FlagScale serve file of two levels and return its path."""

    def write(items: str, *, experiment: str = "", name: str = "demo") -> Path:
        conf = tmp_path / "conf"
        (conf / "serve").mkdir(parents=True, exist_ok=True)
        (conf / f"{name}.yaml").write_text(
            "defaults:\n  - _self_\n"
            f"  - serve: {name}\n"
            "experiment:\n"
            f"  exp_name: {name}\n"
            f"  exp_dir: {tmp_path / 'outputs'}\n"
            "  task:\n    type: serve\n" + dedent(experiment).replace("\n", "\n  ").join(("  ", "\n")) + "
            ""action: run\n"
        )
        (conf / "serve" / f"{name}.yaml").write_text(dedent(items))
        return conf / f"{name}.yaml"

    return write


@dataclass
class Shell:
    """Runs the command line as a user does, on a state directory and an engine of its own."""

    home: Path
    python: Path
    env: dict[str, str] = field(default_factory=dict)

    def popen(self, *words: object, **more: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flagscale_serve.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.env},
            cwd=self.home,
            **more,
        )

    def __call__(self, *words: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flagscale_serve.cli", *map(str, words)],
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, **self.env},
            cwd=self.home,
            timeout=DEADLINE_S,
            check=False,
        )

    def mode(self, mode: str) -> None:
        self.env["FAKE_MODE"] = mode

    def engine_pids(self) -> list[int]:
        path = Path(self.env["FAKE_PIDS"])
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def engine_argv(self) -> list[str]:
        argv: list[str] = json.loads(Path(self.env["FAKE_PIDS"] + ".argv").read_text())
        return argv

    def the_status(self, target: object = None) -> dict[str, object]:
        done = self("status", *([target] if target else []), "--json")
        status: dict[str, object] = json.loads(done.stdout)
        return status


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie that nobody has collected yet does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def until(what: Callable[[], object], *, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition, with a deadline instead of a guess."""
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, f"not within {deadline_s} s"
        time.sleep(0.05)


@pytest.fixture
def eventually() -> Callable[..., None]:
    return until


@pytest.fixture
def alive() -> Callable[[int], bool]:
    return is_alive


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """The command line with a fake engine; nothing that a test started outlives it."""
    python = tmp_path / "engine" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    shell = Shell(home=tmp_path, python=python)
    shell.env = {
        "FLAGSCALE_STATE_DIR": str(tmp_path / "state"),
        "FLAGSCALE_SERVE_PYTHON": str(python),
        "FAKE_PIDS": str(tmp_path / "pids"),
        "no_proxy": "*",
    }
    yield shell
    import flagscale_hw as hw

    for plan in [*tmp_path.glob("state/serve/*/*/plan.json"), *tmp_path.glob("outputs/runs/2*/plan.json")]:
        hw.open_run(plan.parent).stop(0.0)
    until(lambda: not [pid for pid in shell.engine_pids() if is_alive(pid)], deadline_s=10)
