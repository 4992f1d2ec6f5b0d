"""Readiness: a server is ready when it has generated something; a late one is told from a dead one."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flagscale_hw import Plan, Probe, Process

SERVER = """
import http.server, json, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        tokens = 1 if os.path.exists("loaded") and prompt == "hi" else 0
        body = json.dumps({"usage": {"completion_tokens": tokens}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", {port:http}), Handler).serve_forever()
"""


def probe_of(url: str, **changes: object) -> Probe:
    given = {"url": url, "interval_s": 0.05, "request_timeout_s": 0.3, "timeout_s": 5.0, **changes}
    return Probe(**given)


@pytest.fixture
def answering():
    """Serve fixed answers in this process: path -> (code, body)."""
    answers: dict[str, tuple[int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            code, body = answers[self.path]
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield answers, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_that_answers_without_tokens_is_not_ready(keeper, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not stand between us and this very machine
    probe = Probe(
        url="http://127.0.0.1:{port:http}/v1/completions",
        method="POST",
        body={"prompt": "hi"},
        expect="usage.completion_tokens",
        interval_s=0.05,
    )
    run = keeper.start(keeper.python(SERVER), ports={"http": None}, probes=(probe,))
    keeper.until(lambda: sum("POST" in line.text for line in run.logs()) >= 3)
    assert run.status().state == "starting"
    (run.dir / "loaded").touch()
    assert run.wait_ready(keeper.patience_s).state == "ready"
    number_then = sum("POST" in line.text for line in run.logs())
    assert run.stop(5.0).state == "stopped"
    assert sum("POST" in line.text for line in run.logs()) == number_then  # asked no more once it was ready
    with socket.create_server(("127.0.0.1", run.status().ports["http"])):
        pass  # the port is free again


def test_a_server_that_hangs_is_not_ready(keeper):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        status = keeper.finish(keeper.shell("echo loading; exec sleep 600"), probes=(probe_of(url),))
    assert status.state == "failed"
    assert status.reason.startswith(f"not ready after 5 s: {url} answered last: no answer within 0.3 s")
    assert status.reason.endswith("last log lines of a: loading")


def test_a_server_that_drips_cannot_hold_the_supervisor(keeper):
    dripping = threading.Event()

    def drip(listening: socket.socket) -> None:
        listening.settimeout(0.1)
        connection = None
        while connection is None and not dripping.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listening.accept()
        if connection is None:
            return
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not dripping.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        status = keeper.finish(keeper.shell("exec sleep 600"), probes=(probe_of(url, timeout_s=2.0),))
        dripping.set()
        thread.join()
    assert "not ready after 2 s" in status.reason


@pytest.mark.parametrize(
    ("code", "body", "expect", "said"),
    [
        (503, b"still\nloading", None, "HTTP 503: still loading"),
        (200, b"OK", "choices.0.text", "HTTP 200: OK (not JSON, `choices.0.text` is expected in it)"),
        (
            200,
            b'{"choices": []}',
            "choices.0.text",
            '{"choices": []} (`choices.0.text` is missing, null, 0 or empty)',
        ),
        (200, b'{"choices": [{"text": ""}]}', "choices.0.text", "is missing, null, 0 or empty"),
        (200, b"[" * 100000, "a", "..."),
    ],
)
def test_what_is_waited_for_is_told(keeper, answering, code, body, expect, said):
    answers, base = answering
    answers["/x"] = (code, body)
    probe = probe_of(base + "/x", expect=expect, request_timeout_s=30.0, timeout_s=600.0)
    run = keeper.start(keeper.shell("exec sleep 600"), probes=(probe,))
    keeper.until(lambda: said in run.status().reason)
    assert run.status().state == "starting"
    assert run.status().reason.startswith(f"waiting for {base}/x: HTTP {code}: ")


@pytest.mark.parametrize("body", [{"a": [{"b": "x"}]}, {"a": [{"b": 1}]}, {"a": {"0": {"b": True}}}])
def test_a_path_leads_through_lists_and_maps(keeper, answering, body):
    answers, base = answering
    answers["/x"] = (200, json.dumps(body).encode())
    run = keeper.start(
        keeper.shell("exec sleep 600"), probes=(probe_of(base + "/x", expect="a.0.b", timeout_s=60),)
    )
    assert run.wait_ready(keeper.patience_s).state == "ready"


def test_all_probes_must_pass(keeper, answering):
    answers, base = answering
    answers.update({"/good": (200, b"{}"), "/bad": (500, b"no")})
    probes = tuple(probe_of(base + path, request_timeout_s=30.0, timeout_s=600.0) for path in answers)
    run = keeper.start(keeper.shell("exec sleep 600"), probes=probes)
    keeper.until(lambda: run.status().reason == f"waiting for {base}/bad: HTTP 500: no")
    answers["/bad"] = (200, b"{}")
    assert run.wait_ready(keeper.patience_s).state == "ready"
    assert run.status().reason == ""


def test_a_server_that_dies_before_it_is_ready_gives_the_cause(keeper):
    code = "raise ValueError('no room for the KV cache')"
    run = keeper.start(keeper.python(code), probes=(probe_of("http://127.0.0.1:9/", timeout_s=600),))
    status = run.wait_ready(keeper.patience_s)
    assert run.wait(keeper.patience_s).reason == "a: exited with code 1: ValueError: no room for the KV cache"
    assert status.is_over


def test_a_server_that_ends_well_before_it_is_ready_has_failed(keeper):
    probe = probe_of("http://127.0.0.1:9/", timeout_s=600)
    status = keeper.finish(keeper.shell("echo nothing to do"), probes=(probe,))
    assert status.state == "failed"
    assert status.reason == "a: exited with code 0: nothing to do (before it was ready)"


def test_one_of_several_services_ends_well_and_nobody_waits_for_the_others(keeper):
    codes = {"goes": "echo nothing to do", "stays": "exec sleep 600"}
    processes = tuple(
        Process(name=name, argv=keeper.shell(code), is_service=True) for name, code in codes.items()
    )
    probe = probe_of("http://127.0.0.1:9/", timeout_s=600)
    run = keeper.launch(Plan(kind="test", name="a test", processes=processes, probes=(probe,)))
    status = run.wait(keeper.patience_s)
    assert status.state == "failed"
    assert status.reason == "goes: exited with code 0, although nobody had stopped it: nothing to do"
    assert keeper.carrying(keeper.run_id(run)) == []


def test_a_run_that_is_getting_ready_can_be_stopped(keeper):
    run = keeper.start(
        keeper.shell("exec sleep 600"), probes=(probe_of("http://127.0.0.1:9/", timeout_s=600),)
    )
    keeper.until(lambda: run.status().processes[0].pid)
    started = time.monotonic()
    assert run.stop(600.0).state == "stopped"
    assert time.monotonic() - started < keeper.patience_s  # the probe's helper obeys the first signal too


def test_a_prober_that_was_killed_is_replaced(keeper, answering):
    answers, base = answering
    answers["/x"] = (503, b"")
    run = keeper.start(keeper.shell("exec sleep 600"), probes=(probe_of(base + "/x", timeout_s=600),))
    keeper.until(lambda: run.status().processes[0].pid)
    process = run.status().processes[0].pid
    supervisor = keeper.pid_of(run, "supervisor")

    def helpers() -> list[int]:
        found = keeper.carrying(str(run.dir))
        return [pid for pid in found if keeper.parent(pid) == supervisor and pid != process]

    keeper.until(lambda: len(helpers()) == 1)
    keeper.kill(helpers()[0])
    answers["/x"] = (200, b"")
    assert run.wait_ready(keeper.patience_s).state == "ready"
