"""Real vLLM on two hosts over real ssh: one model spread over both, and a copy of it on each.

The Python that has vLLM is named by FLAGSCALE_TEST_VLLM_PYTHON: `nox -s vllm`, as root.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.vllm
TINY_MODEL = Path(__file__).parents[2] / "packages/flagscale-serve/tests/engines/tiny_model.py"
PROMPT, NUM_TOKENS = "def main():", 24
# Importing vLLM on two busy cores was seen to take minutes, and five processes do it here.
READY_S = 900

EXPERIMENT = """
defaults: [_self_, {{serve: tiny}}]
experiment:
  exp_name: tiny
  exp_dir: {folder}/exp
  task: {{type: serve}}
  runner: {{hostfile: {folder}/hostfile}}
action: run
"""
SERVE = """
- serve_id: tiny
  engine: vllm
  engine_args:
    model: {model}
    served_model_name: tiny
    dtype: float32
    kv_cache_memory_bytes: 67108864
    max_model_len: 2048
    {args}
  resources: {{num_replicas: {copies}}}
"""


@pytest.fixture(scope="module")
def vllm_python() -> str:
    python = os.environ.get("FLAGSCALE_TEST_VLLM_PYTHON")
    if not python:
        pytest.fail("FLAGSCALE_TEST_VLLM_PYTHON is not set: name a Python that has vLLM")
    return python


@pytest.fixture(scope="module")
def tiny(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small random model, and what it answers by itself."""
    folder = tmp_path_factory.mktemp("model")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [vllm_python, str(TINY_MODEL), str(folder / "model"), PROMPT, str(NUM_TOKENS)]
    subprocess.run(words, check=True, env=env)
    return folder / "model", json.loads((folder / "expected.json").read_text())["completion"]


@dataclass
class Served:
    """A service on the first two hosts, and the commands on it."""

    folder: Path
    env: dict[str, str]
    network: object

    @property
    def hosts(self) -> list[str]:
        return [self.network.address(1), self.network.address(2)]

    def do(self, *words: object, code: int = 0) -> str:
        command = [sys.executable, "-m", "flagscale_serve.cli", *map(str, words)]
        done = subprocess.run(
            command,
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=READY_S + 60,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def start(self, model: Path, args: str = "", copies: int = 1) -> dict:
        (self.folder / "hostfile").write_text("".join(f"{host} slots=1\n" for host in self.hosts))
        (self.folder / "conf/serve").mkdir(parents=True)
        (self.folder / "conf/serve/tiny.yaml").write_text(SERVE.format(model=model, args=args, copies=copies))
        file = self.folder / "conf/tiny.yaml"
        file.write_text(EXPERIMENT.format(folder=self.folder))
        self.do("run", file, "--detach", "--timeout", READY_S)
        return self.status()

    def status(self, code: int = 0) -> dict:
        return json.loads(self.do("status", "--json", code=code))

    def hosts_of_processes(self) -> dict[str, str]:
        run = Path(self.status()["run_dir"])
        processes = json.loads((run / "state.json").read_text())["processes"]
        return {one["name"]: one["host"] for one in processes}

    def assert_nothing_left(self, mentioned: Callable[[str], list[str]]) -> None:
        assert mentioned(f"{self.folder}/exp/runs") == []
        for number in (1, 2):
            assert self.network.listening(number) == []
            assert len(self.network.pids(number)) == 1  # its sshd


@pytest.fixture
def served(network, vllm_python: str, tmp_path: Path) -> Iterator[Served]:
    network.configure("user")
    env = {
        **os.environ,
        "FLAGSCALE_STATE_DIR": str(tmp_path / "state"),
        "FLAGSCALE_SERVE_PYTHON": vllm_python,
        "FLAGSCALE_SSH": f"ssh -F {network.folder / 'config'}",
    }
    made = Served(tmp_path, env, network)
    yield made
    words = [sys.executable, "-m", "flagscale_serve.cli", "stop", "--grace", "0"]
    subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, check=False)


def answer(url: str) -> str:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    said = httpx.post(f"{url}/completions", json=body, timeout=120, trust_env=False)
    assert said.status_code == 200, said.text
    return said.json()["choices"][0]["text"]


def stream(url: str, tokens: int, begun: Callable[[], object]) -> list[str]:
    """Ask for a long answer and return its lines as they came."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    lines = []
    with (
        httpx.Client(timeout=300, trust_env=False) as client,
        client.stream("POST", f"{url}/completions", json=body) as said,
    ):
        for line in filter(None, said.iter_lines()):
            lines.append(line)
            begun()
    return lines


def test_tensors_over_two_hosts_and_a_stop_that_lets_an_answer_end(served, tiny, mentioned):
    model, expected = tiny
    (instance,) = served.start(model, "tensor_parallel_size: 2")["instances"]
    first, second = served.hosts
    assert served.hosts_of_processes() == {"tiny": first, "tiny-rank-1": second}
    assert instance["hosts"] == [first, second]
    assert f"on {first}, {second}" in served.do("status")
    assert answer(instance["url"]) == expected
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(stream, instance["url"], 1000, begun.set)
        assert begun.wait(120)
        served.do("stop", "--grace", "200")
        lines = long.result()
    assert not [line for line in lines if '"error"' in line]
    assert lines[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in lines[-2]
    served.assert_nothing_left(mentioned)


def test_stages_on_two_hosts_and_the_death_of_the_second(served, tiny, mentioned, network):
    model, expected = tiny
    (instance,) = served.start(model, "pipeline_parallel_size: 2")["instances"]
    assert answer(instance["url"]) == expected
    (worker,) = [
        pid for pid in network.pids(2) if b"VLLM::Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(worker, signal.SIGKILL)
    network.until(lambda: json.loads(served.do("list", "--json"))[0]["state"] == "failed", "the failure")
    assert served.hosts[1] in served.status(code=4)["reason"]
    served.assert_nothing_left(mentioned)


def test_a_copy_on_each_host_behind_one_address(served, tiny, mentioned):
    model, expected = tiny
    *copies, front = served.start(model, copies=2)["instances"]
    assert [one["hosts"] for one in copies] == [[host] for host in served.hosts]
    assert {answer(front["url"]) for _ in range(4)} == {expected}
    for one in copies:
        assert answer(one["url"]) == expected
    served.do("stop")
    served.assert_nothing_left(mentioned)
