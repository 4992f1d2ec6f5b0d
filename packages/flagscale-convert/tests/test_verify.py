"""Planted faults: each is found, and named."""

from __future__ import annotations

import json

import pytest
import torch

from flagscale_convert import ParallelLayout, SourceDamaged, Unsupported, convert, make_plan, verify
from flagscale_convert.cli import main

LAYER = "decoder.layers.1."


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_gate_and_up(tensors):
    gate, up = tensors[LAYER + "mlp.linear_fc1.weight"].chunk(2)
    tensors[LAYER + "mlp.linear_fc1.weight"] = torch.cat([up, gate])


def plain_qkv_order(tensors):
    """All queries, all keys, all values: the classic mistake with grouped queries."""
    fused = tensors[LAYER + "self_attention.linear_qkv.weight"].reshape(2, 5, 20, 48)
    parts = [fused[:, :3], fused[:, 3:4], fused[:, 4:]]
    tensors[LAYER + "self_attention.linear_qkv.weight"] = torch.cat([part.reshape(-1, 48) for part in parts])


def flip_one_bit(tensors):
    tensors["output_layer.weight"].view(torch.int32)[130, 47] ^= 1


def swap_layers(tensors):
    for name in [name for name in tensors if name.startswith("decoder.layers.0.")]:
        swap(tensors, name, name.replace("layers.0.", "layers.2."))


def swap_norms(tensors):
    swap(
        tensors,
        LAYER + "mlp.linear_fc1.layer_norm_weight",
        LAYER + "self_attention.linear_qkv.layer_norm_weight",
    )


def swap_qk_norms(tensors):
    swap(tensors, LAYER + "self_attention.q_layernorm.weight", LAYER + "self_attention.k_layernorm.weight")


def permute_tokens(tensors):
    rows = tensors["embedding.word_embeddings.weight"]
    tensors["embedding.word_embeddings.weight"] = rows[
        torch.cat([torch.tensor([1, 0]), torch.arange(2, 256)])
    ]


def zero_a_row(tensors):
    tensors[LAYER + "mlp.linear_fc2.weight"][-1] = 0


def zero_a_norm(tensors):
    tensors[LAYER + "mlp.linear_fc1.layer_norm_weight"][:] = 0


def transpose_a_square(tensors):
    """The output projection of 48 rows from its first 48 columns, transposed: same shape, other function."""
    weight = tensors[LAYER + "self_attention.linear_proj.weight"]
    weight[:, :48] = weight[:, :48].T.clone()


def interleave_rotary(tensors):
    """Rows of each query and key head in the order of the other rotary layout."""
    fused = tensors[LAYER + "self_attention.linear_qkv.weight"].reshape(2, 5, 20, 48)
    order = torch.arange(20).reshape(2, 10).T.reshape(-1)
    fused = torch.cat([fused[:, :4][:, :, order], fused[:, 4:]], dim=1)
    tensors[LAYER + "self_attention.linear_qkv.weight"] = fused.reshape(-1, 48)


def shift_layers(tensors):
    """Every layer one later, as a wrong pipeline offset leaves them."""
    names = [name for name in tensors if name.startswith("decoder.layers.0.")]
    for name in names:
        parts = [tensors[name.replace("layers.0.", f"layers.{layer}.")] for layer in range(3)]
        for layer in range(3):
            tensors[name.replace("layers.0.", f"layers.{layer}.")] = parts[layer - 1]


def swap_query_groups(tensors):
    fused = tensors[LAYER + "self_attention.linear_qkv.weight"].reshape(2, 100, 48)
    tensors[LAYER + "self_attention.linear_qkv.weight"] = fused.flip(0).reshape(-1, 48)


def embedding_for_the_head(tensors):
    """A tied model's weights in an untied one."""
    tensors["output_layer.weight"] = tensors["embedding.word_embeddings.weight"].clone()


FAULTS = {
    zero_a_norm: "model.layers.1.post_attention_layernorm.weight: first differs at element [0]",
    transpose_a_square: "model.layers.1.self_attn.o_proj.weight: first differs at element [0, 1]",
    interleave_rotary: "model.layers.1.self_attn.q_proj.weight: first differs at element [1, 0]",
    shift_layers: "model.layers.0.input_layernorm.weight",
    swap_query_groups: "model.layers.1.self_attn.q_proj.weight",
    embedding_for_the_head: "lm_head.weight",
    swap_gate_and_up: "model.layers.1.mlp.gate_proj.weight",
    plain_qkv_order: "model.layers.1.self_attn.q_proj.weight",
    flip_one_bit: "lm_head.weight: first differs at element [130, 47]",
    swap_layers: "model.layers.0.input_layernorm.weight",
    swap_norms: "model.layers.1.input_layernorm.weight",
    swap_qk_norms: "model.layers.1.self_attn.q_norm.weight",
    permute_tokens: "model.embed_tokens.weight: first differs at element [0, 0]",
    zero_a_row: "model.layers.1.mlp.down_proj.weight: first differs at element [47, 0]",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_in_weights(make, shape, fault):
    model = shape()
    tensors = model.megatron_tensors(model.hf_tensors())
    good = make.megatron(model, "good", tensors=dict(tensors))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    fault(tensors)
    report = verify(good, make.megatron(model, "bad", tensors=tensors))
    assert str(report.differences[0]).startswith(FAULTS[fault])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"rotary_base": 10000}, "rope_theta"),
        ({"use_rope_scaling": True}, "rope_scaling"),
        ({"layernorm_epsilon": 1e-5}, "norm_epsilon"),
        ({"max_position_embeddings": 32}, "max_positions"),
        ({"vocab_size": 130}, "vocab_size"),
        ({"kv_channels": 20, "num_layers": 3, "rotary_seq_len_interpolation_factor": 4}, "rope_scaling"),
    ],
)
def test_faults_in_the_configuration(make, shape, args, named):
    report = verify(make.megatron(shape(), "good"), make.megatron(shape(), "bad", args=args))
    assert any(named in found.tensor for found in report.differences)


def test_other_dtypes_and_depths_differ(make, shape):
    one, bf16 = make.hf(shape(), "one"), make.hf(shape(dtype=torch.bfloat16), "bf16")
    assert "F32 [131, 48] against BF16 [131, 48]" in str(verify(one, bf16).differences[0])
    deep = verify(one, make.hf(shape(layers=4), "deep"))
    assert "model.layers.3.input_layernorm.weight: only in the second" in map(str, deep.differences)


def test_padding_is_not_compared_and_the_vocabulary_may_be_known_on_one_side_only(make, shape, tmp_path):
    model = shape()
    hf = make.hf(model)
    tensors = model.megatron_tensors(model.hf_tensors(), pad=5.0)
    root = make.megatron(model, tensors=tensors, args={"vocab_size": None})
    assert verify(hf, root).is_equal
    assert verify(root, hf).is_equal
    convert(make_plan(hf, tmp_path / "converted", to="torch_dist"))
    assert verify(root, tmp_path / "converted").is_equal


def permute_experts(tensors, prefix):
    for name in (prefix + "linear_fc1.weight", prefix + "linear_fc2.weight"):
        tensors[name] = tensors[name].roll(1, 0)


def swap_router_rows(tensors, prefix):
    name = prefix.replace("experts.experts.", "router.weight")
    tensors[name] = tensors[name].flip(0)


def swap_expert_halves(tensors, prefix):
    gate, up = tensors[prefix + "linear_fc1.weight"].chunk(2, dim=1)
    tensors[prefix + "linear_fc1.weight"] = torch.cat([up, gate], dim=1)


def lose_an_expert(tensors, prefix):
    tensors[prefix + "linear_fc2.weight"][4] = 0


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (permute_experts, "experts.0.gate_proj.weight"),
        (swap_router_rows, "mlp.gate.weight"),
        (swap_expert_halves, "experts.0.gate_proj.weight"),
        (lose_an_expert, "experts.4.down_proj.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_faults_in_experts(make, shape, fault, named):
    model = shape(family="qwen3_moe")
    tensors = model.megatron_tensors(model.hf_tensors())
    good = make.megatron(model, "good", tensors=dict(tensors))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    fault(tensors, "decoder.layers.1.mlp.experts.experts.")
    report = verify(good, make.megatron(model, "bad", tensors=tensors))
    assert f"model.layers.1.mlp.{named.removeprefix('mlp.')}" in str(report.differences[0])


def test_faults_that_change_what_is_there(make, shape):
    """Missing, extra, cut, retyped tensors, a wrong tie, a truncated file: refused or named, never equal."""
    model = shape()
    good = make.hf(model, "good")
    tensors = model.hf_tensors()
    missing = {name: value for name, value in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(Unsupported, match=r"`model.layers.1.mlp.up_proj.weight` is missing"):
        verify(good, make.hf(model, "missing", tensors=missing))
    with pytest.raises(Unsupported, match=r"`model.layers.3.extra` has no rule"):
        verify(good, make.hf(model, "extra", tensors={**tensors, "model.layers.3.extra": torch.ones(3)}))
    cut = {**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:-3].clone()}
    with pytest.raises(Unsupported, match=r"`model.embed_tokens.weight` has shape \[128, 48\]"):
        verify(good, make.hf(model, "cut", tensors=cut))
    retyped = {**tensors, "model.norm.weight": tensors["model.norm.weight"].double()}
    assert "model.norm.weight: F32 [48] against F64 [48]" in map(
        str, verify(good, make.hf(model, "retyped", tensors=retyped)).differences
    )
    tied = make.hf(shape(tied=True), "tied")
    assert "configuration `is_tied`: False against True" in map(str, verify(good, tied).differences)
    config = json.loads((good / "config.json").read_text())
    wrong = make.hf(model, "wrong")
    (wrong / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    assert "configuration `rope_theta`: 50000.0 against 10000.0" in map(str, verify(good, wrong).differences)
    torn = make.hf(model, "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(SourceDamaged, match="truncated"):
        verify(good, torn.parent)


def test_cover_reads_no_weights(make, shape):
    one, other = make.hf(shape(), "one"), make.hf(shape(), "other", seed=1)
    assert verify(one, other, mode="cover").is_equal
    assert not verify(one, other).is_equal
    bf16 = make.hf(shape(dtype=torch.bfloat16), "bf16")
    assert "against BF16" in str(verify(one, bf16, mode="cover").differences[0])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_stats_accept_a_cast_and_nothing_more(make, shape, tmp_path, dtype, capsys):
    model = shape()
    source = make.hf(model)
    out = tmp_path / "cast"
    sizes = ParallelLayout(tensor_model_parallel_size=2)
    convert(make_plan(source, out, to="torch", dtype=dtype, parallel=sizes))
    report = verify(source, out, mode="stats")
    assert report.is_equal
    for entry in report.stats:
        assert 0 < entry.max_abs < 0.02
        assert 0 < entry.relative < 2**-8
        assert entry.cosine > 0.99999
    assert not verify(source, out).is_equal
    assert main(["verify", str(source), str(out), "--mode", "stats"]) == 0
    assert "within rounding" in capsys.readouterr().out
    cut = {name: value.to(torch.bfloat16) for name, value in model.hf_tensors().items()}
    cut["lm_head.weight"] = cut["lm_head.weight"] * 1.01
    found = verify(source, make.hf(model, "scaled", tensors=cut), mode="stats").differences
    assert "lm_head.weight" in str(found[0])
    assert "further apart than rounding explains" in str(found[0])


def test_stats_are_numpys(make, shape):
    one, other = shape().hf_tensors(), shape().hf_tensors(seed=1)
    report = verify(make.hf(shape(), "one"), make.hf(shape(), "other", seed=1), mode="stats")
    assert not report.is_equal
    for entry in report.stats:
        left, right = one[entry.tensor].double().flatten(), other[entry.tensor].double().flatten()
        assert entry.max_abs == pytest.approx((left - right).abs().max().item())
        assert entry.rms == pytest.approx((left - right).square().mean().sqrt().item())
        assert entry.relative == pytest.approx(((left - right).norm() / left.norm()).item())
        assert entry.cosine == pytest.approx(torch.cosine_similarity(left, right, dim=0).item(), abs=1e-9)


def test_nan_on_one_side_is_beyond_rounding(make, shape):
    model = shape()
    broken = {name: value.to(torch.bfloat16) for name, value in model.hf_tensors().items()}
    broken["model.norm.weight"][5] = float("nan")
    report = verify(make.hf(model, "one"), make.hf(model, "bad", tensors=broken), mode="stats")
    assert [found.tensor for found in report.differences] == ["model.norm.weight"]


def test_only_the_first_layers(make, shape):
    model = shape()
    tensors = model.hf_tensors()
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    one, other = make.hf(model, "one"), make.hf(model, "other", tensors=tensors)
    assert verify(one, other, num_layers=2).is_equal
    assert not verify(one, other).is_equal


@pytest.mark.transformers
def test_logits_show_what_both_compute(make, shape, tmp_path, capsys):
    model = shape()
    small = {
        name: tensor / 8 if "norm" not in name else tensor for name, tensor in model.hf_tensors().items()
    }
    source = make.hf(model, tensors=small)
    convert(make_plan(source, tmp_path / "ranks", to="torch"))
    argv = ["verify", str(source), str(tmp_path / "ranks"), "--mode", "logits", "--layers", "2"]
    assert main(argv) == 0
    assert "logits within 0.0e+00" in capsys.readouterr().out
    swapped = dict(small)
    swap(swapped, "model.layers.0.self_attn.k_norm.weight", "model.layers.0.self_attn.q_norm.weight")
    report = verify(source, make.hf(model, "swapped", tensors=swapped), mode="logits", num_layers=2)
    assert report.differences[0].tensor == "logits"


DEEPSEEK = {"family": "deepseek_v3", "layers": 3, "plain": (0,), "experts": 8, "per_token": 4, "mtp": 1}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("form", ["hf", "torch_dist"])
def test_a_cut_model_has_no_layers_for_further_tokens(make, shape, tmp_path, layers, form):
    """Else the first layer behind the cut would be taken for one."""
    model = shape(**DEEPSEEK)
    source = make.hf(model)
    convert(make_plan(source, tmp_path / "dist", to="torch_dist"))
    cut = tmp_path / "cut"
    convert(make_plan({"hf": source}.get(form, tmp_path / "dist"), cut, to="hf", num_layers=layers))
    kept = {
        name: tensor
        for name, tensor in model.hf_tensors().items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    make.same(make.load(cut), kept)
    config = json.loads((cut / "config.json").read_text())
    assert config["num_hidden_layers"] == layers
    assert config["num_nextn_predict_layers"] == 0


@pytest.mark.transformers
def test_logits_of_the_first_layers(make, shape, tmp_path):
    """What is behind the cut does not matter, what is before it does."""
    model = shape(**DEEPSEEK)
    small = {
        name: tensor / 8 if "norm" not in name else tensor for name, tensor in model.hf_tensors().items()
    }
    behind, before = dict(small), dict(small)
    for changed, layer in ((behind, 2), (behind, 3), (before, 1)):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        changed[name] = changed[name].flip(0)
    source = make.hf(model, tensors=small)
    convert(make_plan(make.hf(model, "behind", tensors=behind), tmp_path / "dist", to="torch_dist"))
    report = verify(source, tmp_path / "dist", mode="logits", num_layers=2)
    assert report.is_equal
    assert report.logits is not None
    assert report.logits[1] > 0.1
    assert not verify(source, make.hf(model, "before", tensors=before), mode="logits", num_layers=2).is_equal
