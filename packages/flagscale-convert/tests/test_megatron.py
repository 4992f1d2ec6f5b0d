"""Real Megatron and real transformers: the same numbers on both sides of a conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flagscale_convert import FAMILIES, convert, inspect, make_plan, verify

pytestmark = pytest.mark.megatron

TOLERANCE = 1e-4
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
LLAMA3 = {
    "rope_theta": 20.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MODELS = {
    "qwen3-tied": {"family": "qwen3", "tied": True, "heads": 4, "groups": 2},
    "qwen3": {"family": "qwen3", "heads": 6, "groups": 2},
    "llama-llama3-rope": {"family": "llama", "heads": 4, "groups": 2, "config": LLAMA3},
    "llama-multi-head": {"family": "llama", "heads": 4, "groups": 4},
    "qwen2-linear-rope": {"family": "qwen2", "heads": 4, "groups": 2, "config": LINEAR},
}

EXPERTS = {
    "mixtral": {"family": "mixtral", "experts": 4, "groups": 2},
    "qwen3_moe": {"family": "qwen3_moe", "experts": 6, "per_token": 3, "tied": True},
    "qwen3_moe-not-renormalised": {"family": "qwen3_moe", "experts": 4, "renormalised": False},
    "qwen3_moe-plain-layer": {"family": "qwen3_moe", "experts": 4, "plain": (1,)},
    "qwen3_moe-per-layer": {"family": "qwen3_moe", "experts": 4},
}


def transformers_logits(folder, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def from_transformers(model, folder):
    """A model as transformers itself writes it, in its own newest form of config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.hf_config())
    torch.manual_seed(5)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise / 4 if "norm" in name else noise / 8)
    made.save_pretrained(folder)


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def results(request, shape, tmp_path_factory):
    """Every model both ways through one Megatron job of one or two tensor-parallel ranks."""
    return run_all(shape, request.param, tmp_path_factory.mktemp(f"tp{request.param}"))


@pytest.fixture(scope="module", params=[1, 2], ids=["ep1", "ep2"])
def expert_results(request, shape, tmp_path_factory):
    """The models of experts, their experts on one rank or on two."""
    return run_all(shape, request.param, tmp_path_factory.mktemp(f"ep{request.param}"), EXPERTS)


def run_all(shape, size, root: Path, models=MODELS):
    tokens = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(9))
    save_file({"tokens": tokens}, root / "tokens")
    jobs = []
    for name, options in models.items():
        model = shape(**options)
        from_transformers(model, root / f"{name}-hf")
        layers = "per-layer" if "per-layer" in name else "auto"
        convert(make_plan(root / f"{name}-hf", root / f"{name}-converted", to="torch_dist", layers=layers))
        jobs += [
            {"do": "load", "path": f"{root}/{name}-converted", "logits": f"{root}/{name}-loaded"},
            {
                "do": "save",
                "path": f"{root}/{name}-trained",
                "logits": f"{root}/{name}-saved",
                "args": model.trainer_args(per_layer=layers == "per-layer"),
            },
        ]
    (root / "request").write_text(
        json.dumps({"tokens": str(root / "tokens"), "has_experts": models is EXPERTS, "jobs": jobs})
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)),
            str(Path(__file__).with_name("megatron_process.py")),
            str(root / "request"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return root, tokens


@pytest.mark.parametrize("name", MODELS)
def test_megatron_loads_what_was_converted(results, name):
    check_loaded(*results, name)


@pytest.mark.parametrize("name", EXPERTS)
def test_megatron_loads_experts_that_were_converted(expert_results, name):
    check_loaded(*expert_results, name)


def test_families_claim_what_was_run():
    run = {options["family"] for options in (*MODELS.values(), *EXPERTS.values())}
    assert run == {family.name for family in FAMILIES.values() if "logits" in family.proven_by}


def check_loaded(root, tokens, name):
    ours = load_file(root / f"{name}-loaded")["logits"][..., :131]
    theirs = transformers_logits(root / f"{name}-hf", tokens)
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_megatron_saved(results, name):
    check_saved(*results, name)


@pytest.mark.parametrize("name", EXPERTS)
def test_transformers_loads_experts_that_megatron_saved(expert_results, name):
    check_saved(*expert_results, name)


def check_saved(root, tokens, name):
    found = inspect(root / f"{name}-trained")
    assert found.iteration == 7
    assert not found.suspicions
    convert(make_plan(root / f"{name}-trained", root / f"{name}-out", to="hf"))
    theirs = transformers_logits(root / f"{name}-out", tokens)
    ours = load_file(root / f"{name}-saved")["logits"][..., :131]
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() < TOLERANCE
    assert verify(root / f"{name}-trained", root / f"{name}-out").is_equal
