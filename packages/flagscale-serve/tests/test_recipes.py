"""Every recipe renders for its engine, and the published model fits the devices that it names."""

import functools
import re
from importlib.resources import files
from pathlib import Path

import pytest

from flagscale_config import load, models, render_engine

FOLDER = Path(str(files("flagscale_serve") / "recipes"))
# The published model, and the bytes of a parameter in its checkpoint.
MODELS = {
    "deepseek_r1/671b": ("deepseek-r1-671b", 1),
    "deepseek_v3/671b": ("deepseek-v3-671b", 1),
    "grok2/270b": ("grok2-270b", 1),
    "kimi_k2/1t": ("kimi-k2-1t", 1),
    "qwen2_5/0_5b": ("qwen2.5-0.5b", 2),
    "qwen2_5/14b": ("qwen2.5-14b", 2),
    "qwen2_5/1_5b": ("qwen2.5-1.5b", 2),
    "qwen2_5/32b": ("qwen2.5-32b", 2),
    "qwen2_5/3b": ("qwen2.5-3b", 2),
    "qwen2_5/72b": ("qwen2.5-72b", 2),
    "qwen2_5/7b": ("qwen2.5-7b", 2),
    "qwen2_5_vl/32b": ("qwen2.5-vl-32b", 2),
    "qwen2_5_vl/3b": ("qwen2.5-vl-3b", 2),
    "qwen2_5_vl/72b": ("qwen2.5-vl-72b", 2),
    "qwen2_5_vl/7b": ("qwen2.5-vl-7b", 2),
    "qwen3/0_6b": ("qwen3-0.6b", 2),
    "qwen3/14b": ("qwen3-14b", 2),
    "qwen3/1_7b": ("qwen3-1.7b", 2),
    "qwen3/235b_a22b": ("qwen3-235b-a22b", 2),
    "qwen3/30b_a3b": ("qwen3-30b-a3b", 2),
    "qwen3/32b": ("qwen3-32b", 2),
    "qwen3/4b": ("qwen3-4b", 2),
    "qwen3/8b": ("qwen3-8b", 2),
    "qwen3_o/30b": ("qwen3-omni-30b-a3b", 2),
    "qwq/32b": ("qwq-32b", 2),
}
GIB = 1 << 30
DEVICE_GIB = {80: 79.1, 141: 139.8}
"""What devices have for programs, by the gigabytes they are sold with."""
RESERVE_GIB = 4
"""For activations, captured graphs and the runtime."""


@functools.cache
def served(name):
    family, stem = name.split("/")
    given = ["serve.0.engine_args.model=/models/m"]
    given += ["experiment.runner.hostfile=/hosts"] if family == "kimi_k2" else []
    given += ["serve.0.engine_args_specific.sglang.tokenizer_path=/t"] if family == "grok2" else []
    return load(FOLDER / family / "conf" / f"{stem}.yaml", given)


def options(experiment):
    """Return the options of the one instance, its engine's own section last."""
    (instance,) = experiment.serve
    return {**instance.engine_args, **instance.engine_args_specific.get(instance.engine or "vllm", {})}


def test_every_recipe_is_checked():
    found = sorted(f"{path.parent.parent.name}/{path.stem}" for path in FOLDER.glob("*/conf/*.yaml"))
    assert found == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_renders_and_names_the_model(name):
    experiment = served(name)
    assert experiment.problems() == ()
    asked = options(experiment)
    publisher, _, repository = str(models.published(MODELS[name][0]).hf_repo).partition("/")
    (given,) = (
        (asked["served_model_name"],)
        if isinstance(asked["served_model_name"], str)
        else asked["served_model_name"]
    )
    assert given.removesuffix("-Instruct") == f"{publisher}/{repository}".removesuffix("-Instruct")
    if experiment.serve[0].engine == "sglang":
        words = render_engine("sglang", experiment.serve[0].engine_args_specific["sglang"])
        assert words[words.index("--tp-size") + 1] == "8"
        return
    words = render_engine("vllm", asked)
    assert words[words.index("--model") + 1] == "/models/m"
    assert words[words.index("--max-model-len") + 1] == str(asked["max_model_len"])


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_fits_its_devices(name):
    family, stem = name.split("/")
    text = (FOLDER / family / "conf" / f"{stem}.yaml").read_text(encoding="utf-8")
    asked = options(served(name))
    tensor = asked.get("tensor_parallel_size") or asked.get("tp_size")
    stages = asked.get("pipeline_parallel_size", 1)
    stated = re.search(r"on (?:(\d+) x )?(\d+|one) devices? of (\d+) GB", text)
    if stated:
        hosts, devices, size = stated.groups()
        assert int(hosts or 1) * int(devices.replace("one", "1")) == tensor * stages
    facts = models.published(MODELS[name][0])
    length = asked.get("max_model_len") or asked["context_length"]
    share = asked.get("gpu_memory_utilization") or asked["mem_fraction_static"]
    needed = weights_gib(name, facts) / (tensor * stages) + cache_gib(facts, length, tensor) / stages
    assert length <= facts.max_positions
    assert needed + RESERVE_GIB < DEVICE_GIB[int(size) if stated else 80] * share
    assert facts.attention.num_heads % tensor == 0


def weights_gib(name, facts):
    return facts.num_parameters * MODELS[name][1] / GIB


def cache_gib(facts, length, tensor):
    """Keys and values of one sequence of full length on one device, as divided by tensor parallelism."""
    whole = facts.kv_cache_bytes_per_token() * length / GIB
    if isinstance(facts.attention, models.LatentAttention):
        return whole  # one compressed vector for all heads
    return whole / min(tensor, facts.attention.num_kv_heads)
