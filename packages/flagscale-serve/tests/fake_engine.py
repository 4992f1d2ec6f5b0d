"""Stands for the Python that has an engine; has the manners of one, or the lack of them (FAKE_MODE).

It answers the question whether it has the engine, and is the server otherwise. Tests copy it behind a
shebang.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

MODE = os.environ.get("FAKE_MODE", "good")
BORN = time.monotonic()
SLEEPER = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""
# The sleeper's parent ends at once, and it has a session of its own: only a sub-reaper can still find it.
FORKER = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], start_new_session=True, stdout=subprocess.PIPE, text=True
)
print(child.stdout.readline().strip(), flush=True)
"""


def remember(pid):
    with Path(os.environ["FAKE_PIDS"]).open("a") as file:
        file.write(f"{pid}\n")


def answer_whether_installed():
    wanted = json.loads(sys.argv[-1])
    lacking = os.environ.get("FAKE_MISSING", "").split(",")
    answer = {
        "python": "3.12.0",
        "missing": [name for name in wanted["modules"] if name in lacking],
        "versions": dict.fromkeys(wanted["distributions"], os.environ.get("FAKE_VERSION", "9.9")),
    }
    print(json.dumps(answer))


def is_slow():
    """Tell whether the options are bad ones: few sequences at a time take two seconds for each answer."""
    few = sys.argv[sys.argv.index("--max-num-seqs") + 1] if "--max-num-seqs" in sys.argv else "64"
    return int(few) < 4


def tell_meeting(body):
    """Log where the halves of a request meet, if they do."""
    meeting = {key: value for key, value in body.items() if key.startswith("bootstrap")}
    if meeting:
        line = "meets " + json.dumps({**meeting, "prompt": body["prompt"]})
        print(line + "\n", end="", flush=True)  # in one piece: other threads print too


class Handler(http.server.BaseHTTPRequestHandler):
    wbufsize = -1  # one that is killed has sent an answer as a whole, or nothing of it

    def log_message(self, text, *args):
        print(text % args, flush=True)

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        key = os.environ.get("FAKE_METRICS_KEY")
        if self.path == "/metrics" and key and self.headers.get("Authorization") != f"Bearer {key}":
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/metrics":
            self.send_response(200)
            self.end_headers()
            lines = [
                'vllm:num_requests_running{engine="0",model_name="m"} 2.0',
                'vllm:num_requests_running{engine="1",model_name="m"} 1.0',
                "vllm:num_requests_waiting 4.0",
                "vllm:kv_cache_usage_perc 0.25",
                f"vllm:generation_tokens_total {100 * (time.monotonic() - BORN)}",
            ]
            text = "\n".join(["# HELP x", *lines, ""])
            self.wfile.write(os.environ.get("FAKE_METRICS", text).encode())
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": "from-the-list"}]})
        else:
            self.answer(200, {"status": "ok"})

    def do_POST(self):
        if self.path in ("/v1/completions", "/v1/chat/completions"):
            self.generate()
        else:  # the router asks for the tokens of a prompt, and goes without where nobody knows them
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(404, {"error": {"message": "no such path", "code": 404}})

    def generate(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tell_meeting(body)
        if body.get("max_tokens") != 1 and is_slow():
            print("took it", flush=True)
            time.sleep(2)
        key = os.environ.get("VLLM_API_KEY")
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self.answer(401, {"error": "Unauthorized"})
        elif MODE == "mute":
            self.answer(200, {"choices": [], "usage": {"completion_tokens": 0}})
        elif MODE == "slow" and time.monotonic() - BORN < 2:
            self.answer(503, {"error": "still loading"})
        elif body.get("max_tokens") == 13:
            self.answer(400, {"error": {"message": "13 is unlucky", "code": 400}})
        elif body.get("stream"):
            self.stream(body)
        elif "messages" in body:
            message = {"role": "assistant", "content": body["messages"][-1]["content"].upper()}
            self.answer(200, {"choices": [{"message": message}], "usage": {"completion_tokens": 3}})
        else:
            flag = "--served-model-name"
            own = sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else body["model"]
            choice = {"text": body["prompt"].upper()}
            self.answer(200, {"model": own, "choices": [choice], "usage": {"completion_tokens": 1}})

    def stream_on(self):
        """Write for ever, as far as the reader's side takes it."""
        try:
            while True:
                self.wfile.write(b'data: {"choices": [{"text": "%b"}]}\n\n' % (b"x" * 1000))
        except OSError:
            print("the reader is gone", flush=True)

    def stream(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if body["max_tokens"] == 15:
            self.stream_on()
            return
        is_plain = "prompt" in body
        said = (
            body["prompt"] if is_plain else "|".join(f"{m['role']}={m['content']}" for m in body["messages"])
        )
        for piece in (
            said,
            f" t={body.get('temperature')}",
            f" n={body['max_tokens']}",
            f" m={body['model']}",
        ):
            choice = {"text": piece} if is_plain else {"delta": {"content": piece}}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.flush()
            if body["max_tokens"] == 14:
                self.wfile.write(b'data: {"error": "the engine fell over"}\n\n')
                return
        self.wfile.write(b"data: [DONE]\n\n")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


def load():
    print("Loading weights: 100%", flush=True)
    if MODE == "dies":
        raise RuntimeError("weights are made of cheese")


def bench():
    """Stand for `vllm bench serve`: two requests that were answered, one that was not."""

    def value_of(flag):
        return sys.argv[sys.argv.index(flag) + 1]

    Path(os.environ["FAKE_PIDS"] + ".bench").write_text(json.dumps(sys.argv[1:]))
    result = {
        "duration": 2.0,
        "ttfts": [0.1, 0.3, 0.0],
        "itls": [[0.02, 0.04], [0.1, 0.1], []],
        "output_lens": [3, 3, 0],
        "errors": ["", "", "it fell over"],
    }
    (Path(value_of("--result-dir")) / value_of("--result-filename")).write_text(json.dumps(result))


def main():
    if "-c" in sys.argv:
        answer_whether_installed()
        return
    if "bench" in sys.argv:
        bench()
        return
    remember(os.getpid())
    Path(os.environ["FAKE_PIDS"] + ".argv").write_text(json.dumps(sys.argv[1:]))
    load()
    if MODE in ("deaf", "family"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "polite":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if MODE == "family":
        done = subprocess.run([sys.executable, "-c", FORKER, SLEEPER], stdout=subprocess.PIPE, check=True)
        remember(int(done.stdout))
    host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
    server = Server((host, int(port)), Handler)
    print("Application startup complete", flush=True)
    if MODE == "dies-later":
        threading.Timer(1.5, lambda: os._exit(7)).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
