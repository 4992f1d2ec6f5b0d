"""The examples of docs/train/examples.md, run as they stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs/train/examples.md"
pytestmark = [
    pytest.mark.megatron,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not PAGE.exists(), reason="the page is in the repository, not in the package"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Run every block of the page, one behind the other, and return the directory."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "corpus").mkdir()
    # Enough documents for the recipe's 2 % of validation: of none Megatron counts epochs for ever.
    for number, text in enumerate(4 * PAGE.read_text(encoding="utf-8").split("\n\n")):
        (folder / "corpus" / f"{number}.txt").write_text(text, encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=folder,
        env={**os.environ, "PATH": path, "FLAGSCALE_STATE_DIR": str(folder / "state")},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder


def losses(folder):
    lines = (folder / "runs" / "latest" / "events.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == "step"]


@pytest.mark.parametrize("name", ["scratch", "continued", "chat", "adapters"])
def test_an_example_trains(place, name):
    found = losses(place / "outputs" / name)
    assert len(found) == 6
    assert min(found[1:]) < found[0], "with so few steps the last batch may be a hard one"


def test_weights_are_taken_over(place):
    scratch, continued = losses(place / "outputs" / "scratch"), losses(place / "outputs" / "continued")
    assert continued[0] < scratch[0] - 0.2


def test_what_was_written_loads(place):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name in ("model", "chat-model", "adapted-model"):
        assert AutoModelForCausalLM.from_pretrained(place / name).num_parameters() > 4e6
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), place / "adapter")
