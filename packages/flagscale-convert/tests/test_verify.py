"""Planted faults: each is found, and named."""

from __future__ import annotations

import pytest
import torch

from flagscale_convert import convert, make_plan, verify

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


FAULTS = {
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
