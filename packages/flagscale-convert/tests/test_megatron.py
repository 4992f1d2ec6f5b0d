"""Real Megatron and real transformers: the same numbers on both sides of a conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flagscale_convert import FAMILIES, ParallelLayout, convert, inspect, make_plan, verify

pytestmark = pytest.mark.megatron

TOLERANCE = 1e-5
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
PLAIN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "qwen3-tied": {"family": "qwen3", "tied": True, "heads": 4, "groups": 2},
    "qwen3": {"family": "qwen3", "heads": 6, "groups": 2},
    "llama-llama3-rope": {"family": "llama", "heads": 4, "groups": 2, "config": LLAMA3},
    "llama-multi-head": {"family": "llama", "heads": 4, "groups": 4},
    "llama-one-key-head": {"family": "llama", "heads": 4, "groups": 1},
    "qwen2-linear-rope": {"family": "qwen2", "heads": 4, "groups": 2, "config": LINEAR},
    "qwen2-yarn": {"family": "qwen2", "heads": 4, "groups": 2, "config": {"rope_scaling": PLAIN_YARN}},
}

EXPERTS = {
    "mixtral": {"family": "mixtral", "experts": 4, "groups": 2},
    "qwen3_moe": {"family": "qwen3_moe", "experts": 6, "per_token": 3, "tied": True},
    "qwen3_moe-not-renormalised": {"family": "qwen3_moe", "experts": 4, "renormalised": False},
    "qwen3_moe-plain-layer": {"family": "qwen3_moe", "experts": 4, "plain": (1,)},
    "qwen3_moe-per-layer": {"family": "qwen3_moe", "experts": 4},
}

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
V3 = {"family": "deepseek_v3", "heads": 4, "plain": (0,), "experts": 8, "per_token": 4}
GROUPS = {"expert_groups": 4, "groups_per_token": 2}
LATENT = {
    "deepseek_v3": {**V3, **GROUPS, "mtp": 1, "config": {"rope_scaling": YARN}},
    "deepseek_v3-moonlight": {**V3, "query_rank": None},
    "deepseek_v3-uniform-mtp2": {**V3, "plain": (), "mtp": 2},
    "deepseek_v3-tied-kimi": {**V3, "tied": True, "config": {"rope_scaling": {**YARN, "beta_fast": 1.0}}},
}


def transformers_logits(folder, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        found = [out.logits]
        hidden = out.hidden_states[-1]
        for depth in range(getattr(model.config, "num_mtp_layers", 0)):
            hidden = further_token_layer(model, folder, depth)(hidden, tokens, depth)
            found.append(model.lm_head(hidden))
    return torch.stack(found)


def further_token_layer(model, folder, depth):
    """Run transformers' own layer for a further token, with the weights in a directory."""
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as source

    layers = model.config.num_hidden_layers
    layer = MtpLayer(model.config, source.DeepseekV3DecoderLayer, source.DeepseekV3RMSNorm, layers + depth)
    layer.eval()
    prefix = f"model.layers.{layers + depth}."
    held = {}
    for file in folder.glob("*.safetensors"):
        held |= {
            name.removeprefix(prefix): t for name, t in load_file(file).items() if name.startswith(prefix)
        }
    state = {name: held.pop(name) for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight")}
    state["post_norm.weight"] = held.pop("shared_head.norm.weight")
    held.pop("embed_tokens.weight"), held.pop("shared_head.head.weight", None)
    experts = range(model.config.n_routed_experts)
    parts = {
        n: [held.pop(f"mlp.experts.{e}.{n}_proj.weight") for e in experts] for n in ("gate", "up", "down")
    }
    state["mtp_block.mlp.experts.gate_up_proj"] = torch.cat(
        [torch.stack(parts["gate"]), torch.stack(parts["up"])], dim=1
    )
    state["mtp_block.mlp.experts.down_proj"] = torch.stack(parts["down"])
    layer.load_state_dict(state | {f"mtp_block.{name}": value for name, value in held.items()}, strict=True)

    def run(hidden, tokens, depth):
        ahead = torch.cat([tokens[:, depth + 1 :], torch.zeros_like(tokens[:, : depth + 1])], dim=1)
        positions = torch.arange(tokens.shape[1])[None]
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        embedded = model.model.embed_tokens(ahead)
        rope = model.model.rotary_emb(embedded, positions)
        return layer(embedded, hidden, rope, mask, positions, None)

    return run


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
        for name, buffer in made.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(torch.randn_like(buffer) / 4)
    made.save_pretrained(folder)
    if model.mtp:  # which transformers does not save
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name, like in model.hf_tensors().items():
            if name not in tensors:
                noise = torch.randn_like(like)
                tensors[name] = 1 + noise / 4 if "norm" in name else noise / 8
        for layer in range(model.layers, model.layers + model.mtp):
            tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors[
                "model.embed_tokens.weight"
            ].clone()
            tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, file, {"format": "pt"})


ALL = {**MODELS, **EXPERTS, **LATENT}
TOKENS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(9))
ONE_OF_EACH = (
    "qwen3-tied",
    "llama-multi-head",
    "qwen2-linear-rope",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3-tied-kimi",
)
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_tensor_parallel_size")
LAYOUTS = {
    "one": (1, 1, 1, 1, {name: ALL[name] for name in ONE_OF_EACH}),
    # Stages are uneven: three layers, of which the first stage has one.
    "tp2-pp2": (4, 2, 2, 2, ALL),
    "pp2-ep2": (4, 1, 2, 1, {**EXPERTS, **LATENT, "qwen3": MODELS["qwen3"]}),
    # Experts divided by more ranks than the rest of the layer.
    "etp2-ep2": (4, 1, 1, 2, {name: ALL[name] for name in ("mixtral", "deepseek_v3")}),
}
"""Ranks, the three sizes (what is left are groups of experts), and the models run so."""
CASES = [
    pytest.param(layout, name, id=f"{layout}-{name}") for layout in LAYOUTS for name in LAYOUTS[layout][-1]
]


@pytest.fixture(scope="module")
def run(shape, tmp_path_factory):
    """Give where results are, and transformers' logits; all layouts of as many ranks run at once."""
    root = tmp_path_factory.mktemp("megatron")
    save_file({"tokens": TOKENS}, root / "tokens")
    for name, options in ALL.items():
        make_both(shape(**options), root, name)

    @cache
    def run_ranks(ranks):
        groups = [
            group(shape, root, layout, sizes, models)
            for layout, (of, *sizes, models) in LAYOUTS.items()
            if of == ranks
        ]
        request = root / f"request-{ranks}"
        request.write_text(json.dumps({"tokens": str(root / "tokens"), "groups": groups}))
        run_megatron(request, ranks)

    @cache
    def logits(name):
        return transformers_logits(root / f"{name}-hf", TOKENS)

    def results(layout, name):
        run_ranks(LAYOUTS[layout][0])
        return root / f"{layout}-{name}", logits(name)

    return results


def make_both(model, root, name):
    """Write a model by transformers, and convert it."""
    from_transformers(model, root / f"{name}-hf")
    plan = make_plan(
        root / f"{name}-hf",
        root / f"{name}-converted",
        to="torch_dist",
        layers="per-layer" if "per-layer" in name else "auto",
        megatron_version=".".join(version("megatron-core").split(".")[:2]),
        # A padding that every layout divides.
        parallel=ParallelLayout(tensor_model_parallel_size=2),
        vocab_divisor=64,
    )
    convert(plan)


def group(shape, root, layout, sizes, models):
    """Give the jobs of one layout: load what was converted, save what was made."""
    jobs = []
    for name, options in models.items():
        place = f"{root}/{layout}-{name}"
        args = shape(**options).trainer_args(per_layer="per-layer" in name)
        jobs += [
            {"do": "load", "path": f"{root}/{name}-converted", "logits": f"{place}-loaded"},
            {"do": "save", "path": f"{place}-trained", "logits": f"{place}-saved", "args": args},
        ]
    return {"sizes": dict(zip(SIZES, sizes, strict=True)), "jobs": jobs}


def run_megatron(request, ranks):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            str(Path(__file__).with_name("megatron_process.py")),
            str(request),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_megatron_loads_what_was_converted(run, layout, name):
    """With default strictness, and its logits are transformers'."""
    place, theirs = run(layout, name)
    check_logits(load_file(f"{place}-loaded")["logits"], theirs)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_transformers_loads_what_megatron_saved(run, tmp_path, layout, name):
    place, _ = run(layout, name)
    saved = f"{place}-trained"
    found = inspect(saved)
    assert found.iteration == 7
    assert not found.suspicions
    convert(make_plan(saved, tmp_path / "out", to="hf"))
    theirs = transformers_logits(tmp_path / "out", TOKENS)
    check_logits(load_file(f"{place}-saved")["logits"], theirs)
    assert verify(saved, tmp_path / "out").is_equal


def check_logits(ours, theirs):
    assert theirs.abs().max() > 1
    assert (ours[..., :131] - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("layout", ["one", "tp2-pp2", "pp2-ep2"])
def test_families_claim_what_was_run(layout):
    run = {options["family"] for options in LAYOUTS[layout][-1].values()}
    claim = {"one": "1 rank", "tp2-pp2": "TP2 x PP2", "pp2-ep2": "PP2 x EP2"}[layout]
    assert {family.name for family in FAMILIES.values() if claim in family.proven_by} <= run


def test_every_family_was_run():
    run = {options["family"] for options in ALL.values()}
    assert run == {family.name for family in FAMILIES.values() if "logits" in family.proven_by}
