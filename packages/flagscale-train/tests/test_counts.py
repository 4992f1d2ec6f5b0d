"""Every recipe is the published model: its parameters, counted by Megatron on the meta device."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from flagscale_config import load, models, render_megatron
from flagscale_hw import detect
from flagscale_train.findings import Findings
from flagscale_train.logits import reference_options

pytestmark = [pytest.mark.megatron, pytest.mark.every_megatron]

RECIPES = Path(str(files("flagscale_train.recipes")))
SCRIPTED = ("llava1_5", "llava_onevision", "qwen2_5_vl", "rwkv")
"""Families that FlagScale's own scripts train."""
NAMES = sorted(
    f"{path.parent.parent.name}/{path.stem}"
    for path in RECIPES.glob("*/conf/*.yaml")
    if path.parent.parent.name not in SCRIPTED and path.stem != "tiny"
)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Build the model of every recipe on the meta device, in one process."""
    request = tmp_path_factory.mktemp("meta") / "request.json"
    words = {}
    for name in NAMES:
        options = reference_options(recipe(name), detect(), Findings())
        words[name] = list(render_megatron(options))
    request.write_text(json.dumps(words))
    script = Path(__file__).with_name("meta_models.py")
    done = subprocess.run(
        [sys.executable, script, request], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line["parameters"] for line in lines}


def recipe(name):
    family, stem = name.split("/")
    given = ["train.data.data_path=/data/text", "train.data.tokenizer.tokenizer_model=/tokenizer"]
    if name.endswith(("_sft", "_lora")):
        given.append("train.system.checkpoint.pretrained_checkpoint=/weights")
    return load(RECIPES / family / "conf" / f"{stem}.yaml", given)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_with_the_published_parameters(name, counts):
    assert counts[name] == models.match(recipe(name)).num_parameters
