"""DeepSeek-V3's form: latent attention, a router with bias and groups, layers that predict further tokens."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.distributed import checkpoint as dcp

from flagscale_convert import FAMILIES, Unsupported, convert, inspect, make_plan, verify
from flagscale_convert.hf_config import read_config, write_config
from flagscale_convert.megatron_args import read_args, write_args
from flagscale_convert.rules import bind

YARN = {
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    }
}
SHAPES = {
    "v3": {"plain": (0,), "mtp": 1, "experts": 8, "per_token": 4, "expert_groups": 4, "groups_per_token": 2},
    "moonlight": {"plain": (0,), "query_rank": None},
    "uniform": {"mtp": 2, "config": YARN},
    "tied": {"tied": True, "mtp": 1, "plain": (0, 1)},
}


@pytest.fixture(params=SHAPES)
def model(request, shape):
    return shape(family="deepseek_v3", **SHAPES[request.param])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_equal(make, model, tmp_path, dtype):
    model.dtype = dtype
    source = make.hf(model, shards=2)
    plan = make_plan(source, tmp_path / "mc", to="torch_dist")
    convert(plan)
    convert(make_plan(tmp_path / "mc", tmp_path / "back", to="hf"))
    make.same(make.load(source), make.load(tmp_path / "back"))
    assert verify(source, tmp_path / "mc").is_equal
    found = inspect(tmp_path / "mc")
    assert (found.suspicions, found.family) == ((), "deepseek_v3")
    assert json.loads(json.dumps(found.to_dict()))["architecture"]["latent_kv_rank"] == 24
    copies = model.mtp * (1 if model.tied else 2) * model.vocab * model.hidden
    total = sum(tensor.numel() for tensor in model.hf_tensors().values())
    assert plan.num_parameters == found.num_parameters == total - copies


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_written_tensors_are_megatrons(make, model, tmp_path):
    convert(make_plan(make.hf(model), tmp_path / "mc", to="torch_dist", layers="per-layer"))
    expected = model.megatron_tensors(model.hf_tensors())
    local = {
        "linear_q_up_proj.layer_norm_weight": "q_layernorm.weight",
        "linear_kv_up_proj.layer_norm_weight": "kv_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    for engine, plain in local.items():
        expected |= {name.replace(engine, plain): value for name, value in expected.items() if engine in name}
    found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=tmp_path / "mc" / "release", no_dist=True)
    make.same(found, expected)


@pytest.mark.parametrize("names", ["engine", "local", "live"])
def test_every_dialect_reads_the_same(make, model, tmp_path, names):
    def rename(name):
        if names == "live":
            return name.replace("transformer_layer", "mtp_model_layer")
        if names == "local":
            name = name.replace("linear_q_up_proj.layer_norm_weight", "q_layernorm.weight")
            name = name.replace("linear_kv_up_proj.layer_norm_weight", "kv_layernorm.weight")
            return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        return name

    root = make.megatron(model, stacked=not model.plain, rename=rename)
    convert(make_plan(root, tmp_path / "out", to="hf"))
    make.same(make.load(tmp_path / "out"), model.hf_tensors())


# Layers, hidden, ffn, heads, query rank, vocabulary, expert ffn, experts, per token, shared, plain layers.
PUBLISHED = {
    "deepseek-v3": ((61, 7168, 18432, 128, 1536, 129280, 2048, 256, 8, 1, 3), 671026404352, 58 * 256),
    "kimi-k2": ((61, 7168, 18432, 64, 1536, 163840, 2048, 384, 8, 1, 1), 1026408209408, 60 * 384),
    "moonlight": ((27, 2048, 11264, 16, None, 163840, 1408, 64, 6, 2, 1), 15960108544, 26 * 64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_published_parameters(shape, name):
    (
        (layers, hidden, ffn, heads, rank, vocab, expert_ffn, experts, per_token, shared, plain),
        total,
        biases,
    ) = PUBLISHED[name]
    model = shape(
        family="deepseek_v3",
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        query_rank=rank,
        kv_rank=512,
        plain_head=128,
        rotary_head=64,
        value_head=128,
        vocab=vocab,
        expert_ffn=expert_ffn,
        experts=experts,
        per_token=per_token,
        shared=shared,
        plain=tuple(range(plain)),
    )
    bindings = bind(FAMILIES["deepseek_v3"].rules, read_config(model.hf_config(), where="c").architecture)
    counted = sum(math.prod(size) for binding in bindings for size in binding.part_shapes)
    assert counted - biases == total  # published counts leave out the bias per expert


def test_configurations_there_and_back(model):
    arch = read_config(model.hf_config(), where="c").architecture
    assert (arch.mtp_layers, arch.latent.query_rank) == (model.mtp, model.query_rank)
    assert read_args(model.args(), where="a").architecture == arch
    for is_stacked in (True, False) if not model.plain else (False,):
        args = write_args(arch, tokenizer=None, vocab_divisor=128, is_stacked=is_stacked)
        assert read_args(args, where="a").architecture == arch
    assert read_config(write_config(arch, dtype="BF16", tokens={}), where="c").architecture == arch


@pytest.mark.parametrize("dtype", ["bf16", "fp16", None])
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_the_expert_bias_stays_float32(make, model, tmp_path, dtype, to):
    tensors = model.hf_tensors()
    biases = {name for name in tensors if name.endswith("e_score_correction_bias")}
    stored = {name: value.bfloat16() if name in biases else value for name, value in tensors.items()}
    source = make.hf(model, tensors=stored) if to == "torch_dist" else None
    if source is None:
        source = make.megatron(model, stacked=not model.plain)
    else:
        tensors |= {name: stored[name].float() for name in biases}
    convert(make_plan(source, tmp_path / "out", to=to, dtype=dtype))
    convert(make_plan(tmp_path / "out", tmp_path / "back", to="hf"))
    found = make.load(tmp_path / "back")
    target = {"bf16": torch.bfloat16, "fp16": torch.float16, None: model.dtype}[dtype]
    make.same(found, {name: value if name in biases else value.to(target) for name, value in tensors.items()})


def test_copies_of_the_embedding_must_be_copies(make, shape, tmp_path):
    model = shape(family="deepseek_v3", mtp=1)
    for name in ("embed_tokens", "shared_head.head"):
        tensors = model.hf_tensors()
        tensors[f"model.layers.3.{name}.weight"][5, 7] += 1
        source = make.hf(model, name, tensors=tensors)
        with pytest.raises(Unsupported, match=rf"layers\.3\.{name}\.weight` differs from"):
            convert(make_plan(source, tmp_path / "mc", to="torch_dist"))
        assert not (tmp_path / "mc").exists()


def test_copies_may_be_absent(make, shape, tmp_path):
    model = shape(family="deepseek_v3", mtp=1)
    tensors = model.hf_tensors()
    fewer = {
        name: value for name, value in tensors.items() if ".3.embed" not in name and ".head." not in name
    }
    assert len(fewer) == len(tensors) - 2
    convert(make_plan(make.hf(model, tensors=fewer), tmp_path / "mc", to="torch_dist"))
    convert(make_plan(tmp_path / "mc", tmp_path / "back", to="hf"))
    make.same(make.load(tmp_path / "back"), tensors)


def test_further_token_layers_that_are_only_counted(make, shape, tmp_path):
    model = shape(family="deepseek_v3", mtp=1)
    tensors = {name: value for name, value in model.hf_tensors().items() if ".layers.3." not in name}
    plan = make_plan(make.hf(model, tensors=tensors), tmp_path / "mc", to="torch_dist")
    assert any("the weights hold no such layer: 0 assumed" in note for note in plan.notes)
    convert(plan)
    convert(make_plan(tmp_path / "mc", tmp_path / "back", to="hf"))
    make.same(make.load(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_half_a_further_token_layer_is_refused(make, shape, tmp_path):
    model = shape(family="deepseek_v3", mtp=1)
    tensors = model.hf_tensors()
    del tensors["model.layers.3.eh_proj.weight"]
    with pytest.raises(Unsupported, match=r"`model\.layers\.3\.eh_proj\.weight` is missing"):
        convert(make_plan(make.hf(model, tensors=tensors), tmp_path / "mc", to="torch_dist"))


def test_fused_experts_of_transformers_are_read(make, model, tmp_path):
    tensors = model.hf_tensors()
    fused = dict(tensors)
    for i in range(model.layers + model.mtp):
        if i in model.plain:
            continue
        p = f"model.layers.{i}.mlp.experts."
        parts = [[fused.pop(f"{p}{e}.{n}_proj.weight") for n in ("gate", "up")] for e in range(model.experts)]
        fused[p + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in parts])
        fused[p + "down_proj"] = torch.stack(
            [fused.pop(f"{p}{e}.down_proj.weight") for e in range(model.experts)]
        )
    convert(make_plan(make.hf(model, tensors=fused), tmp_path / "out", to="hf"))
    make.same(make.load(tmp_path / "out"), tensors)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"n_group": 2, "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 3},
            "its best 3 experts",
        ),
        ({"n_group": 4}, "groups must be of equal size"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"auto_map": {"AutoModel": "modeling_other.X"}}, "auto_map"),
        ({"rope_scaling": {**YARN["rope_scaling"], "mscale_all_dim": 0}, "x": 0}, None),
        ({"rope_scaling": {**YARN["rope_scaling"], "mscale": 0.7, "mscale_all_dim": 0}}, "mscale"),
        ({"rope_scaling": {**YARN["rope_scaling"], "attention_factor": 2}}, "attention_factor"),
        ({"auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3ForCausalLM"}}, None),
    ],
)
def test_configurations(shape, config, text):
    given = {**shape(family="deepseek_v3").hf_config(), **config}
    if text is None:
        read_config(given, where="c")
        return
    with pytest.raises(Unsupported, match=text):
        read_config(given, where="c")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias"),
        ({"moe_router_score_function": "softmax"}, "sigmoid"),
        ({"num_experts": None}, "num_experts"),
        ({"moe_layer_freq": [1, 0, 1]}, "must be the first ones"),
        ({"moe_shared_expert_intermediate_size": 30}, "must be a multiple"),
        ({"moe_shared_expert_gate": True}, "moe_shared_expert_gate"),
        ({"qk_layernorm": False}, "qk_layernorm"),
        ({"group_query_attention": True, "num_query_groups": 2}, "group_query_attention"),
        ({"rotary_scaling_factor": 40.0, "mscale_all_dim": 1.0}, "set rotary_scaling_factor to 1"),
        ({"mtp_num_layers": 1, "mtp_use_repeated_layer": True}, "mtp_use_repeated_layer"),
        ({"use_rope_scaling": True}, "use_rope_scaling"),
    ],
)
def test_arguments_that_nothing_computes_are_refused(shape, args, text):
    with pytest.raises(Unsupported, match=text):
        read_args({**shape(family="deepseek_v3").args(), **args}, where="a")


def test_further_token_layers_of_other_families_are_refused(shape):
    with pytest.raises(Unsupported, match="mtp_num_layers"):
        read_args({**shape().args(), "mtp_num_layers": 1}, where="a")
