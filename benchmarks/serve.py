"""How fast serving is: `flagscale-serve run` against `vllm serve`, and the front against the engine itself.

    python benchmarks/serve.py [--python ENV/bin/python] [--rounds 2] [--repeats 3] [--only run|front]
    python benchmarks/serve.py --shape qwen3-0.6b                       # on one GPU

Where flagscale-serve is installed; `--python` is an interpreter that has vLLM (default: this one), and the
front needs vllm-router beside flagscale-serve. The model is the shape's configuration with random weights and
a tokenizer of one token per word, so that every prompt and answer has the length that is asked for. The load
is made by `vllm bench serve`.

(a) Each round starts both in turn with the same options and loads each a few times:
    - run: `flagscale-serve run` of a FlagScale file;
    - by hand: the engine's own command with the same words and variables, nothing of ours around it.
    Bound: output tokens/s, run / by hand >= 0.99. Of each start of `run` is told how long it took before the
    engine's process began, and how long after the first token that anybody could get it returned; bounds:
    both together <= 1 s, the second <= 0.5 s.
(b) The router that a plan starts, in front of that engine, at 32 requests at a time: each repeat loads the
    engine and the front of each policy in turn. Bound: output tokens/s, front / engine >= 0.97. What the
    front adds to a request is measured on a server that answers after 50 ms sharp, at 32 at a time, since an
    engine's own times vary by more; bound: <= 2 ms in the median. The bounds judge the first of
    `--policies` (default: a plan's own).

Prints a table, writes JSON with `--json FILE`, and exits 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from flagscale_serve.bench import Measured, Workload, measure, percentile
from flagscale_serve.chat import Server
from flagscale_serve.router import VLLM_ROUTER, router_argv
from flagscale_serve.service import DEFAULT_POLICY, Front, Instance

SHAPES: dict[str, dict[str, Any]] = {
    "cpu-tiny": {
        "layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "groups": 2, "head": 32, "vocab": 1024,
        "input_len": 64, "output_len": 32, "concurrency": 32, "requests": 192, "dtype": "float32",
    },
    "qwen3-0.6b": {
        "layers": 28, "hidden": 1024, "ffn": 3072, "heads": 16, "groups": 8, "head": 128, "vocab": 151936,
        "input_len": 512, "output_len": 128, "concurrency": 64, "requests": 1024, "dtype": "bfloat16",
    },
}  # fmt: skip
RUN_BOUND, FRONT_BOUND = 0.99, 0.97
OVERHEAD_BOUND_S, NOTICED_BOUND_S, ADDED_BOUND_MS = 1.0, 0.5, 2.0
FRONT_CONCURRENCY = 32
NAME = "shape"
START_LIMIT_S = 900.0
ANSWER_AFTER_S = 0.05

CONF = """
defaults: [_self_, {{serve: shape}}]
experiment:
  exp_name: benchmark
  exp_dir: {folder}/exp
  task: {{type: serve}}
action: run
"""
SERVE = """
- serve_id: shape
  engine: vllm
  engine_args:
    model: {folder}/model
    served_model_name: {name}
    load_format: dummy
    dtype: {dtype}
    max_model_len: 1024
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu-tiny")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("run", "front"), help="one half: (a) or (b)")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=[DEFAULT_POLICY])
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.only != "run" and importlib.util.find_spec(VLLM_ROUTER.module) is None:
        parser.error("vllm-router is not installed here: install it, or leave (b) out with --only run")
    with tempfile.TemporaryDirectory(prefix="flagscale-benchmark-") as name:
        found = Benchmark(given, Path(name)).run()
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return tell(found)


class Benchmark:
    """One run of everything on one machine."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.shape = given, folder, SHAPES[given.shape]
        os.environ["FLAGSCALE_STATE_DIR"] = str(folder / "state")
        write_model(folder / "model", self.shape)
        (folder / "serve").mkdir()
        self.file = folder / "shape.yaml"
        self.file.write_text(CONF.format(folder=folder))
        (folder / "serve/shape.yaml").write_text(
            SERVE.format(folder=folder, name=NAME, dtype=self.shape["dtype"])
        )
        self.found: dict[str, Any] = {
            "shape": given.shape,
            "machine": platform.processor() or platform.machine(),
            "tokens_per_s": {kind: [] for kind in ("run", "by hand", "engine", *given.policies)},
            "start_s": {"run": [], "by hand": []},
            "before_s": [],
            "noticed_s": [],
        }

    def run(self) -> dict[str, Any]:
        for number in range(self.given.rounds):
            kinds = ["run"] if self.given.only == "front" else ["run", "by hand"]
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                with self.started(kind) as url:
                    self.load(url, self.shape["concurrency"], seed=100 * number)  # warms it up
                    if self.given.only != "front":
                        self.alone(url, kind, number)
                    if kind == "run" and self.given.only != "run":
                        self.front(url, number)
        if self.given.only != "run":
            self.found["answered_ms"] = {
                policy: asyncio.run(added_latency(policy)) for policy in self.given.policies
            }
        return self.found

    def alone(self, url: str, kind: str, number: int) -> None:
        for repeat in range(1, self.given.repeats + 1):
            done = self.load(url, self.shape["concurrency"], seed=100 * number + repeat)
            self.note(kind, done, number)

    def load(self, url: str, concurrency: int, *, seed: int) -> Measured:
        workload = Workload(
            input_len=self.shape["input_len"],
            output_len=self.shape["output_len"],
            concurrency=concurrency,
            num_requests=self.shape["requests"],
            num_warmups=concurrency,
            seed=seed,
        )
        server = Server(url=url, model=NAME, tokenizer=str(self.folder / "model"))
        done = measure(server, NAME, workload, generator="vllm", python=self.given.python)
        failed = [one.error for one in done.requests if one.error]
        if failed:
            raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
        return done

    def front(self, url: str, number: int) -> None:
        with ExitStack() as fronts:
            doors = [("engine", url)]
            doors += [(policy, fronts.enter_context(router(url, policy))) for policy in self.given.policies]
            for repeat in range(self.given.repeats):
                for kind, door in doors if repeat % 2 == 0 else reversed(doors):
                    done = self.load(door, FRONT_CONCURRENCY, seed=1000 + 100 * number + repeat)
                    self.note(kind, done, number)

    def note(self, kind: str, done: Measured, number: int) -> None:
        self.found["tokens_per_s"][kind].append(done.output_tokens_per_s)
        p50 = 1e3 * percentile(done.times_s("e2e"), 50)
        say(
            f"round {number + 1}: {kind:<12} {done.output_tokens_per_s:12,.0f} output tokens/s, "
            f"E2E p50 {p50:.1f} ms"
        )

    @contextmanager
    def started(self, kind: str) -> Iterator[str]:
        port = free_port()
        url = f"http://127.0.0.1:{port}/v1"
        first = FirstToken(url)
        began = time.time()
        if kind == "run":
            self.command("run", str(self.file), "--detach", "--port", str(port))
            returned = time.time()
            now = json.loads(self.command("status", str(self.file), "--json"))
            engine_began = process_began(Path(now["run_dir"]))
            self.found["before_s"].append(engine_began - began)
            self.found["noticed_s"].append(returned - first.wait())
            self.found["start_s"][kind].append(returned - began)
            try:
                yield url
            finally:
                self.command("stop", str(self.file))
        else:
            process = self.by_hand(port)
            try:
                self.found["start_s"][kind].append(first.wait(process) - began)
                yield url
            finally:
                process.terminate()
                process.wait(60)
        say(f"{kind}: first token after {self.found['start_s'][kind][-1]:.1f} s")

    def command(self, *words: str) -> str:
        more = ("--python", self.given.python) if words[0] in ("run", "plan") else ()
        argv = (sys.executable, "-m", "flagscale_serve.cli", *words, *more)
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: exit {done.returncode}")
        return done.stdout

    def by_hand(self, port: int) -> subprocess.Popen[bytes]:
        """Start the very words of the plan."""
        text = self.command("plan", str(self.file), "--port", str(port), "--json")
        (process,) = json.loads(text)["processes"]
        argv = [word.replace("{port:shape}", str(port)) for word in process["argv"]]
        log = (self.folder / "by-hand.log").open("ab")
        return subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **process["env"]})


class FirstToken:
    """Asks a server that is starting, and keeps the moment of the first token that anybody could get."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0.0
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        body = {"model": NAME, "prompt": "w1", "max_tokens": 1}
        deadline = time.monotonic() + START_LIMIT_S
        with httpx.Client(trust_env=False, timeout=60) as client:
            while time.monotonic() < deadline:
                try:
                    if client.post(f"{self._url}/completions", json=body).status_code == 200:
                        self._at = time.time()
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.02)

    def wait(self, process: subprocess.Popen[bytes] | None = None) -> float:
        """Return the moment; end the benchmark when there is none, or none can come any more."""
        end = time.monotonic() + START_LIMIT_S
        while self._thread.is_alive() and time.monotonic() < end:
            if process is not None and process.poll() is not None:
                raise SystemExit(f"ended with {process.returncode} before its first token")
            self._thread.join(0.2)
        if not self._at:
            raise SystemExit(f"no token within {START_LIMIT_S:g} s")
        return self._at


def process_began(run_dir: Path) -> float:
    import flagscale_hw as hw

    return float(hw.open_run(run_dir).status().processes[0].started_at or 0.0)


@contextmanager
def router(url: str, policy: str) -> Iterator[str]:
    """Start the router with the words of a plan, in front of one server."""
    port, metrics = free_port(), free_port()
    # A policy that chooses needs two: the one server by both of its names.
    base = url.removesuffix("/v1")
    urls = {"one": base, "two": base.replace("127.0.0.1", "localhost")}
    members = [Instance(name=name, model="/m", served_names=(NAME,), engine="vllm") for name in urls]
    front = Front(name="front", host="127.0.0.1", port=port, policy=policy, members=tuple(urls))
    own = f"http://127.0.0.1:{port}"
    argv = router_argv(
        front, members, python=sys.executable, host=front.host, own_url=own, urls=urls, startup_s=60
    )
    given = {"{port:front}": str(port), "{port:front-metrics}": str(metrics)}
    process = subprocess.Popen(
        [given.get(word, word) for word in argv], stdout=subprocess.DEVNULL, stderr=None
    )
    try:
        FirstToken(f"http://127.0.0.1:{port}/v1").wait(process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


async def added_latency(policy: str) -> tuple[list[float], list[float]]:
    """Return the milliseconds of requests at a server that answers after a fixed time, and by the front."""
    server = await asyncio.start_server(answer_later, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    inside = router(url, policy)
    address = await asyncio.to_thread(inside.__enter__)
    try:
        times: dict[str, list[float]] = {url: [], address: []}
        for number in range(6):
            for door in (url, address) if number % 2 == 0 else (address, url):
                taken = await ask_many(door)
                times[door] += taken if number else []  # the first warms connections up
        return times[url], times[address]
    finally:
        inside.__exit__(None, None, None)
        server.close()
        await server.wait_closed()  # the router's end has closed its connections


async def ask_many(url: str, rounds: int = 20) -> list[float]:
    """Ask with raw sockets, FRONT_CONCURRENCY at a time: a client library's own time would be in the way."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"model": NAME, "prompt": "w1", "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    words = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    times: list[float] = []

    async def ask() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(rounds):
            began = time.perf_counter()
            writer.write(words)
            if b" 200 " not in await read_message(reader):
                raise SystemExit(f"{url}: refused")
            times.append(1e3 * (time.perf_counter() - began))
        writer.close()

    await asyncio.gather(*(ask() for _ in range(FRONT_CONCURRENCY)))
    return times


async def answer_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = json.dumps({"choices": [{"text": "w"}], "usage": {"completion_tokens": 1}}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    while await read_message(reader):
        await asyncio.sleep(ANSWER_AFTER_S)
        writer.write(head.encode() + body)
    writer.close()


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Return the first line of an HTTP message after having read all of it; empty at the end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    lines = head.lower().split(b"\r\n")
    length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
    await reader.readexactly(length)
    return lines[0].upper()


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write a Qwen3 of a shape: its configuration, and a tokenizer whose words are w0, w1, ..."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
        "hidden_size": shape["hidden"], "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["groups"], "head_dim": shape["head"], "vocab_size": shape["vocab"],
        "max_position_embeddings": 4096, "rope_theta": 1000000, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "attention_bias": False, "dtype": shape["dtype"],
        "torch_dtype": shape["dtype"], "eos_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    words = {f"w{number}": number for number in range(shape["vocab"])}
    special = {
        "id": 0, "content": "w0", "special": True,
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0", "unk_token": "w0",
        "model_max_length": 4096, "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}",
    }  # fmt: skip
    for name, data in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
        ("generation_config.json", {"eos_token_id": 0}),
    ):
        (folder / name).write_text(json.dumps(data))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tell(found: dict[str, Any]) -> int:
    rates = {kind: median(values) for kind, values in found["tokens_per_s"].items() if values}
    starts = {kind: median(values) for kind, values in found["start_s"].items() if values}
    say("")
    for kind, rate in rates.items():
        start = f", first token after {starts[kind]:.1f} s" if kind in starts else ""
        say(f"{kind:<12} {rate:12,.0f} output tokens/s{start}")
    rows = rows_of_run(found, rates) + rows_of_fronts(found, rates)
    for name, value, bound, holds in rows:
        say(f"{name:<56} {value:8.3f}  {bound:<8} {'holds' if holds else 'BROKEN'}")
    return 0 if all(holds for *_, holds in rows) else 1


Row = tuple[str, float, str, bool]


def rows_of_run(found: dict[str, Any], rates: dict[str, float]) -> list[Row]:
    overhead = median(sum(pair) for pair in zip(found["before_s"], found["noticed_s"], strict=True))
    noticed = median(found["noticed_s"])
    rows: list[Row] = [
        ("run before and after the engine's start, s", overhead, "<= 1", overhead <= OVERHEAD_BOUND_S),
        ("readiness noticed after, s", noticed, "<= 0.5", noticed <= NOTICED_BOUND_S),
    ]
    if "by hand" in rates:
        ratio = rates["run"] / rates["by hand"]
        rows.insert(0, ("run / by hand, output tokens/s", ratio, ">= 0.99", ratio >= RUN_BOUND))
    return rows


def rows_of_fronts(found: dict[str, Any], rates: dict[str, float]) -> list[Row]:
    """Judge the first policy; the others are told beside it."""
    rows: list[Row] = []
    for number, (policy, (direct, fronted)) in enumerate(found.get("answered_ms", {}).items()):
        ratio, added = rates[policy] / rates["engine"], median(fronted) - median(direct)
        rows += [
            (
                f"front ({policy}) / engine, output tokens/s", ratio,
                ">= 0.97" if number == 0 else "", number > 0 or ratio >= FRONT_BOUND,
            ),
            (
                f"front ({policy}) adds to a request, p50 ms", added,
                "<= 2" if number == 0 else "", number > 0 or added <= ADDED_BOUND_MS,
            ),
        ]  # fmt: skip
    return rows


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
