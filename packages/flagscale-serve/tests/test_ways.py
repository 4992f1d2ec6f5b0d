"""The commands of docs/serve/ways.md, run as they stand there, on the real transformers server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs/serve/ways.md"
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(not PAGE.exists(), reason="the page is in the repository, not in the package"),
]


@pytest.fixture(scope="module")
def place(module_service, real_model):
    """A directory with `model` in it, and a shell whose services end with the module."""
    shell, _ = module_service
    model, _ = real_model(sys.executable, shell.home, "x", 1)
    # Room for what the recipe asks for; positions of this kind take no weights.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40960}))
    del shell.env["FLAGSCALE_SERVE_PYTHON"]
    return shell


@pytest.fixture
def run_blocks(place, run_block):
    return lambda *words: all_blocks(place, run_block, *words)


def all_blocks(shell, run_block, language: str, *command: str) -> list[str]:
    """Run every block of a language; return what each printed."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    path = str(Path(sys.executable).parent)
    return [run_block(shell, *command, "-c", block, path=path) for block in blocks]


def test_the_commands_serve(place, run_blocks):
    file, recipe, bare = run_blocks("sh", "bash", "-euo", "pipefail")
    for printed in (file, recipe, bare):
        assert "ready after" in printed
        assert ": stopped: stopped on request" in printed
    assert (place.home / "outputs/demo/runs/latest/plan.json").is_file()
    assert "Qwen/Qwen3-0.6B" in recipe
    assert "http://127.0.0.1:30500/v1" in bare
    answers = [json.loads(line) for line in (place.home / "answers.jsonl").read_text().splitlines()]
    assert [bool(one["text"]) for one in answers] == [True, True]
    states = json.loads(place("list", "--json").stdout)
    assert {one["state"] for one in states} == {"stopped"}


def test_the_python_serves(place, run_blocks):
    (printed,) = run_blocks("python", sys.executable)
    whole, streamed = printed.splitlines()
    assert len(whole) == len(streamed) == 16
    assert json.loads(place("list", "--json").stdout)[-1]["state"] == "stopped"
