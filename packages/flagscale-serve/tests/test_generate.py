"""A file of requests: answered in order, each mistake in its own line, and taken up where it was left."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flagscale_serve import InvalidService, NotServing, Sampling, generate
from flagscale_serve.metrics import Load, parse, read_load


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI server whose manners a test can set."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.busy = 0
        self.gate = threading.Event()
        self.gate.set()
        self.under_way = 0
        self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def send(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send(200, {"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append({**body, "path": self.path})
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            is_busy, server.busy = server.busy > 0, server.busy - 1
        server.gate.wait(30)
        with server.lock:
            server.under_way -= 1
        said = body.get("prompt") or body["messages"][-1]["content"]
        if is_busy:
            self.send(503, {"error": {"message": "later"}})
        elif said == "forbidden":
            self.send(400, {"error": {"message": "we do not say that"}})
        elif "prompt" in body:
            self.send(
                200,
                {
                    "choices": [{"text": said.upper(), "finish_reason": "stop"}],
                    "usage": {"completion_tokens": 2},
                },
            )
        else:
            message = {"role": "assistant", "content": said.upper()}
            if said == "tool":
                message["tool_calls"] = [{"id": "1"}]
            self.send(
                200,
                {
                    "choices": [{"message": message, "finish_reason": "stop"}],
                    "usage": {"completion_tokens": 2},
                },
            )


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.gate.set()
        server.shutdown()


@pytest.fixture
def batch(tmp_path):
    def write(*lines: object) -> tuple[Path, Path]:
        source = tmp_path / "in.jsonl"
        source.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines) + "\n")
        return source, tmp_path / "out.jsonl"

    return write


def answers(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_kind_of_line_is_answered_in_its_place(server, batch):
    source, output = batch(
        {"prompt": "first"},
        {"messages": [{"role": "user", "content": "second"}], "temperature": 0.5},
        "",
        {"custom_id": "x-1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "third"}},
        {"messages": [{"role": "user", "content": "tool"}]},
    )
    ended = generate(server.url, source, output, sampling=Sampling(max_tokens=7, temperature=0, system="s"))
    assert (ended.total, ended.done, ended.failed, ended.tokens) == (4, 4, 0, 8)
    found = answers(output)
    assert [(one["index"], one["text"]) for one in found] == [
        (0, "FIRST"),
        (1, "SECOND"),
        (3, "THIRD"),
        (4, "TOOL"),
    ]
    assert found[2]["custom_id"] == "x-1"
    assert found[3]["choices"][0]["message"]["tool_calls"] == [{"id": "1"}]
    assert found[0]["finish_reason"] == "stop"
    asked = {one.get("prompt") or one["messages"][-1]["content"]: one for one in server.asked}
    assert asked["first"]["path"] == "/v1/completions"
    assert (asked["first"]["max_tokens"], asked["first"]["model"]) == (7, "the-model")
    assert asked["second"]["path"] == "/v1/chat/completions"
    assert asked["second"]["temperature"] == 0.5  # the line's own wish wins
    assert asked["second"]["messages"][0] == {"role": "system", "content": "s"}
    assert "custom_id" not in asked["third"]


def test_a_mistake_is_the_answer_of_its_line_and_the_others_go_on(server, batch, shell):
    source, output = batch(
        "not json",
        {"prompt": "good"},
        {"prompt": "forbidden"},
        {"nothing": 1},
        {"prompt": "a", "stream": True},
        {"body": []},
    )
    done = shell("generate", source, output, server.url)
    assert done.returncode == 4
    assert "1 of 6 answered" in done.stderr
    assert "5 failed" in done.stderr
    found = answers(output)
    assert [one.get("error", "")[:20] for one in found] == [
        "not a JSON object",
        "",
        "HTTP 400: we do not ",
        "one of `prompt` and ",
        "`stream` makes no se",
        "`body` must be a JSO",
    ]


def test_it_goes_on_where_it_was_left(server, batch):
    lines = [{"prompt": f"p{number}"} for number in range(6)]
    lines[4] = {"prompt": "forbidden"}
    source, output = batch(*lines)
    assert generate(server.url, source, output).failed == 1
    whole = output.read_text()
    kept = whole.splitlines()
    # As a kill leaves it: out of order, one line cut, one missing.
    output.write_text("\n".join([kept[2], kept[0], kept[4], kept[1][:25]]))
    server.asked.clear()
    source.write_text(source.read_text().replace("forbidden", "allowed"))
    ended = generate(server.url, source, output)
    assert (ended.total, ended.done, ended.kept, ended.failed) == (6, 6, 2, 0)
    assert sorted(one["prompt"] for one in server.asked) == ["allowed", "p1", "p3", "p5"]
    assert [one["text"] for one in answers(output)] == ["P0", "P1", "P2", "P3", "ALLOWED", "P5"]
    server.asked.clear()
    assert generate(server.url, source, output).kept == 6
    assert server.asked == []


def test_an_answer_is_kept_only_for_the_same_request(server, batch):
    source, output = batch({"prompt": "a"}, {"prompt": "b"})
    generate(server.url, source, output)
    batch({"prompt": "a"}, {"prompt": "changed"})
    assert generate(server.url, source, output).kept == 1
    assert [one["text"] for one in answers(output)] == ["A", "CHANGED"]
    assert generate(server.url, source, output, sampling=Sampling(max_tokens=3)).kept == 0


def test_a_busy_server_is_asked_again(server, batch):
    server.busy = 2
    source, output = batch({"prompt": "a"})
    assert generate(server.url, source, output).failed == 0
    assert len(server.asked) == 3


def test_so_many_at_a_time_and_no_more(server, batch, eventually):
    server.gate.clear()
    source, output = batch(*({"prompt": f"p{number}"} for number in range(12)))
    worker = threading.Thread(target=generate, args=(server.url, source, output), kwargs={"concurrency": 4})
    worker.start()
    eventually(lambda: server.under_way == 4)
    server.gate.set()
    worker.join(60)
    assert server.most == 4
    assert len(answers(output)) == 12


def test_a_server_that_is_gone_ends_it_and_keeps_what_was_answered(server, batch):
    source, output = batch({"prompt": "a"})
    generate(server.url, source, output, model="the-model")
    server.shutdown()
    server.server_close()
    batch({"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(NotServing, match="nobody answers any more"):
        generate(server.url + "/v1", source, output, model="the-model")
    assert [one["text"] for one in answers(output)] == ["A"]
    with pytest.raises(NotServing, match="nobody answers"):
        generate(server.url, source, output)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source, _: source.unlink(), "input: .*No such file"),
        (lambda source, _: source.write_text("\n"), "no line in it"),
        (lambda source, _: source.write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda _, output: output.write_text('{"some": "other file"}\n'), "did not write"),
        (lambda _, output: output.mkdir(), "Is a directory"),
        (lambda source, output: output.symlink_to(source), "the input itself"),
    ],
)
def test_files_that_cannot_be_used_are_left_alone(server, batch, spoil, message):
    source, output = batch({"prompt": "a"})
    spoil(source, output)
    before = output.read_bytes() if output.is_file() else None
    with pytest.raises(InvalidService, match=message):
        generate(server.url, source, output)
    assert (output.read_bytes() if output.is_file() else None) == before


def test_a_model_that_is_not_served_is_served_meanwhile(shell, batch, model_dir, alive):
    source, output = batch({"prompt": "hi"}, {"messages": [{"role": "user", "content": "you"}]})
    done = shell("generate", source, output, model_dir)
    assert done.returncode == 0, done.stderr
    assert [one["text"] for one in answers(output)] == ["HI", "YOU"]
    assert shell.engine_pids()
    assert not [pid for pid in shell.engine_pids() if alive(pid)]


def test_a_running_service_is_asked_and_left_running(shell, batch, model_dir):
    source, output = batch({"prompt": "hi"})
    assert shell("run", model_dir, "--detach").returncode == 0
    assert shell("generate", source, output).returncode == 0
    assert answers(output)[0]["text"] == "HI"
    assert shell.the_status()["state"] == "ready"


# --- how busy a server is -----------------------------------------------------------------------------------


def test_metrics_of_several_labels_are_added():
    text = '# TYPE a gauge\na{x="1",y="} 3"} 2\na{x="2"} 3.5\nb NaN-ish\nc_total 1e3\n'
    assert parse(text) == {"a": 5.5, "c_total": 1000.0}


def test_status_tells_how_busy_an_instance_is(shell, model_dir):
    assert shell("run", model_dir, "--detach").returncode == 0
    (one,) = shell.the_status()["instances"]
    load = one["load"]
    assert (load["running"], load["waiting"], load["kv_usage"]) == (3, 4, 0.25)
    # It generates 100 tokens a second, as far as its clock and ours agree on a busy machine.
    assert 20 < load["tokens_per_s"] < 500
    shown = shell("status").stdout
    assert "3 running, 4 waiting, " in shown
    assert "25% of the key-value cache" in shown


def test_an_engine_s_own_rate_of_tokens_wins_over_its_counter(shell, model_dir):
    shell.env["FAKE_METRICS"] = (
        'sglang:num_running_reqs{tp_rank="0"} 96.0\nsglang:gen_throughput{tp_rank="0"} 3726.5\n'
        'sglang:generation_tokens_total{is_streaming="true"} 40.0\n'
    )
    assert shell("run", model_dir, "--detach").returncode == 0
    load = shell.the_status()["instances"][0]["load"]
    assert (load["running"], load["tokens_per_s"]) == (96, 3726.5)


def test_how_busy_an_instance_is_may_need_its_key(shell, model_dir):
    shell.env["FAKE_METRICS_KEY"] = "secret"
    assert shell("run", model_dir, "--detach").returncode == 0
    for key, running in (("", None), ("wrong", None), ("k\u00e9y", None), ("secret", 3)):
        shell.env["OPENAI_API_KEY"] = key
        load = shell.the_status()["instances"][0]["load"] or {}
        assert load.get("running") == running


def test_a_server_that_tells_nothing_is_not_asked_twice(server):
    assert read_load(server.url) is None  # answers, but not with metrics
    server.shutdown()
    server.server_close()
    assert read_load(server.url, timeout_s=1) is None
    assert Load() == Load(running=None)
