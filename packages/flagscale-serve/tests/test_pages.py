"""The commands of docs/serve/operating.md and measuring.md, run as they stand there, on the fake engine.

The commands of ways.md run on a real one (test_ways.py); here only what needs more hosts is planned.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path

import pytest

from flagscale_config import load
from flagscale_hw import Node, Target
from flagscale_hw.testing import fake_host
from flagscale_serve import plan

PAGES = Path(__file__).resolve().parents[3] / "docs/serve"
pytestmark = pytest.mark.skipif(not PAGES.exists(), reason="the pages are in the repository only")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def run_page(shell, model_dir, run_block):
    """Run every shell block of a page in one bash, so that variables last; return what it printed."""
    (shell.home / "model").symlink_to(model_dir)
    command = shell.home / "bin" / "flagscale-serve"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m flagscale_serve.cli "$@"\n')
    command.chmod(0o755)

    def run(name: str) -> str:
        text = (PAGES / name).read_text("utf-8").replace("30600", str(free_port()))
        blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        assert blocks
        return run_block(shell, "bash", "-euo", "pipefail", "-c", "".join(blocks), path=str(command.parent))

    return run


def test_a_service_is_operated(shell, run_page):
    printed = run_page("operating.md")
    status = json.loads((shell.home / "status.json").read_text())
    assert (status["state"], status["instances"][0]["model"]) == ("ready", "mine")
    assert "vllm:num_requests_running" in printed
    assert "Application startup complete" in printed
    assert "service: stopped: stopped on request" in printed
    plan = (shell.home / "outputs/service/runs/latest/plan.json").read_text()
    assert "a-long-random-word" not in plan
    assert "a-long-random-word" not in json.dumps(shell.engine_argv())


def test_a_model_is_asked_measured_and_tuned(shell, run_page):
    printed = run_page("measuring.md")
    assert "system=Be brief|user=Hello t=0.0 n=32" in printed
    answers = [json.loads(line) for line in (shell.home / "answers.jsonl").read_text().splitlines()]
    assert [one["text"] for one in answers] == ["ONCE UPON A TIME", "HELLO", "HI"]
    assert answers[2]["custom_id"] == "third"
    counts = json.loads((shell.home / "counts.json").read_text())
    assert {name: counts[name] for name in ("total", "done", "failed")} == {
        "total": 3,
        "done": 3,
        "failed": 0,
    }
    levels = json.loads((shell.home / "measured/bench.json").read_text())["levels"]
    assert [one["concurrency"] for one in levels] == [1, 4]
    assert (shell.home / "measured/bench.html").stat().st_size
    tuned = json.loads((shell.home / "tuned.json").read_text())
    assert len(tuned["trials"]) == 3
    assert tuned["best"]["fate"] == "measured"
    best = load(shell.home / "tune/best.yaml")
    assert best.serve[0].engine_args["model"] == str((shell.home / "model").absolute())
    # Beside the journal, where one looks for them.
    assert len(list((shell.home / "tune/runs").glob("2*/plan.json"))) == 4
    assert not (shell.home / "tune/runs/runs").exists()


def test_several_hosts_are_planned_as_the_page_says(serve_file):
    block, sglang = re.findall(
        r"^```yaml\n(.*?)^```$", (PAGES / "ways.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    path = serve_file(
        "- serve_id: a\n  engine_args: {model: /m, tensor_parallel_size: 8}\n", experiment=block
    )
    (path.parent / "hostfile").write_text("10.0.0.1 slots=8\n10.0.0.2 slots=8\n")
    experiment = load(path)
    assert experiment.runner.hostfile == "hostfile"
    host = fake_host("nvidia", 8)
    nodes = [Node(target=Target(name=f"10.0.0.{n}"), machine=host, slots=8) for n in (1, 2)]
    made = plan(experiment, host, nodes=nodes, python="py")
    assert {one.name: one.host for one in made.processes} == {
        "a-prefill-1": "10.0.0.1",
        "a-decode-1": "10.0.0.2",
        "a-router": "10.0.0.1",
    }
    made = plan(load(serve_file(sglang, experiment=block)), host, nodes=nodes, python="py")
    first, _, router = made.processes
    assert "--disaggregation-bootstrap-port {port:model-prefill-1-bootstrap}" in " ".join(first.argv)
    assert "sglang_router.launch_router" in router.argv
    assert made.ports["model-router"] == 8000
