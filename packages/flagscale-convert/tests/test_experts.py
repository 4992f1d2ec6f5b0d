"""Mixtures of experts: every form of the weights, and a router that computes the same."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import checkpoint as dcp

from flagscale_convert import Unsupported, convert, inspect, make_plan, verify
from flagscale_convert.hf_config import read_config, write_config
from flagscale_convert.megatron_args import read_args, write_args
from flagscale_convert.torch_dist import TorchDistSource

SHAPES = {
    "mixtral": {"family": "mixtral"},
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe-plain-layer": {"family": "qwen3_moe", "plain": (1,)},
}
FC1 = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


@pytest.fixture(params=SHAPES)
def model(request, shape):
    return shape(**SHAPES[request.param])


def test_there_and_back_is_bit_equal(make, model, tmp_path):
    source = make.hf(model, shards=2)
    convert(make_plan(source, tmp_path / "mc", to="torch_dist"))
    convert(make_plan(tmp_path / "mc", tmp_path / "back", to="hf"))
    make.same(make.load(source), make.load(tmp_path / "back"))
    assert verify(source, tmp_path / "mc").is_equal
    assert not inspect(tmp_path / "mc").suspicions


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("layers", ["auto", "per-layer"])
def test_written_tensors_are_megatrons(make, model, tmp_path, layers):
    convert(make_plan(make.hf(model), tmp_path / "mc", to="torch_dist", layers=layers))
    expected = model.megatron_tensors(model.hf_tensors())
    norm = {
        name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"): tensor
        for name, tensor in expected.items()
        if "pre_mlp_layernorm" in name
    }
    assert norm
    expected |= norm  # what the plain-torch layers ask for, beside Transformer Engine's name
    if layers == "auto" and not model.plain:
        stacked = {name: tensor for name, tensor in expected.items() if ".layers." not in name}
        for name in [name for name in expected if ".layers.0." in name]:
            parts = [expected[name.replace(".0.", f".{layer}.", 1)] for layer in range(model.layers)]
            stacked[name.replace(".0.", ".", 1)] = torch.stack(parts)
        expected = stacked
    found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=tmp_path / "mc" / "release", no_dist=True)
    make.same(found, expected)


def by_experts(name, size):
    """Cut as expert parallelism of 2 with tensor-parallel experts does."""
    return tuple(min(length, 2) for length in size) if ".experts." in name else (1,) * len(size)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("local_norm", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_every_dialect_reads_the_same(make, shape, tmp_path, stacked, local_norm, family):
    model = shape(family=family, layers=4)

    def rename(name):
        return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_") if local_norm else name

    args = {} if stacked else {"moe_layer_freq": [1] * 4}
    root = make.megatron(model, stacked=stacked, rename=rename, grid=by_experts, args=args)
    convert(make_plan(root, tmp_path / "out", to="hf"))
    make.same(make.load(tmp_path / "out"), model.hf_tensors())


def test_both_norms_with_different_bytes_are_refused(make, shape, tmp_path):
    model = shape(family="mixtral")
    tensors = model.megatron_tensors(model.hf_tensors())
    for layer in range(model.layers):
        tensors[f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"] = torch.ones(model.hidden)
    root = make.megatron(model, tensors=tensors)
    with pytest.raises(Unsupported, match=r"linear_fc1\.layer_norm_weight` has no rule"):
        convert(make_plan(root, tmp_path / "out", to="hf"))


def test_fused_experts_of_transformers_are_read(make, shape, tmp_path):
    for family in ("qwen3_moe", "mixtral"):
        model = shape(family=family)
        fused = make.hf(model, f"{family}-fused", tensors=model.fused_tensors(model.hf_tensors()))
        convert(make_plan(fused, tmp_path / f"{family}-mc", to="torch_dist"))
        convert(make_plan(tmp_path / f"{family}-mc", tmp_path / family, to="hf"))
        make.same(make.load(tmp_path / family), model.hf_tensors())
        assert verify(fused, tmp_path / family).is_equal


def test_fused_experts_of_another_size_are_named(make, shape, tmp_path):
    model = shape(family="qwen3_moe")
    tensors = model.fused_tensors(model.hf_tensors())
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, model.hidden, model.expert_ffn)
    with pytest.raises(Unsupported, match=r"layers\.0\.mlp\.experts\.down_proj` has no rule"):
        convert(make_plan(make.hf(model, tensors=tensors), tmp_path / "mc", to="torch_dist"))


def test_a_copy_of_a_checkpoint_is_in_the_canonical_dialect(make, shape, tmp_path):
    model = shape(family="qwen3_moe")
    root = make.megatron(
        model, rename=lambda name: name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    )
    convert(make_plan(root, tmp_path / "mc", to="torch_dist"))
    assert (
        "decoder.layers.pre_mlp_layernorm.weight"
        in TorchDistSource(tmp_path / "mc" / "release").metadata.tensors
    )
    assert verify(root, tmp_path / "mc").is_equal


def test_every_module_has_its_state(make, shape, tmp_path):
    source = make.hf(shape(family="qwen3_moe"))
    prefix = "mlp.experts.experts.linear_fc2._extra_state/shard_"
    for layers, expert, norm in (
        (
            "stacked",
            f"decoder.layers.{prefix}2.4_3.5",
            "decoder.layers.pre_mlp_layernorm._extra_state/shard_1_3",
        ),
        (
            "per-layer",
            f"decoder.layers.2.{prefix}4_5",
            "decoder.layers.1.pre_mlp_layernorm._extra_state/shard_0_1",
        ),
    ):
        convert(make_plan(source, tmp_path / layers, to="torch_dist", layers=layers))
        states = TorchDistSource(tmp_path / layers / "release").extra_states
        assert {expert, norm} <= set(states)
        assert sum("experts.experts" in state for state in states) == 3 * 5 * 2


def test_layers_that_differ_cannot_be_stacked(make, shape, tmp_path):
    source = make.hf(shape(family="qwen3_moe", plain=(0,)))
    with pytest.raises(Unsupported, match="use auto or per-layer"):
        make_plan(source, tmp_path / "mc", to="torch_dist", layers="stacked")


def test_configurations_there_and_back(shape):
    for options in (*SHAPES.values(), {"family": "qwen3_moe", "renormalised": False, "tied": True}):
        model = shape(**options)
        arch = read_config(model.hf_config(), where="c").architecture
        assert arch.experts.count == 5
        assert arch.experts.is_renormalised is model.renormalised
        assert read_args(model.args(), where="a").architecture.experts == arch.experts
        for is_stacked in (True, False) if not model.plain else (False,):
            args = write_args(arch, tokenizer=None, vocab_divisor=128, is_stacked=is_stacked)
            again = read_args(args, where="a").architecture
            assert again == arch
            assert again.experts.aux_loss == 0.01
        assert read_config(write_config(arch, dtype="BF16", tokens={}), where="c").architecture == arch


def test_every_second_layer(shape):
    config = shape(family="qwen3_moe", layers=4, config={"decoder_sparse_step": 2}).hf_config()
    assert read_config(config, where="c").architecture.experts.dense_layers == (0, 2)
    args = {**shape(family="qwen3_moe", layers=4).args(), "moe_layer_freq": 2}
    assert read_args(args, where="a").architecture.experts.dense_layers == (1, 3)


@pytest.mark.parametrize(
    ("family", "changed", "text"),
    [
        ("mixtral", {"moe_router_pre_softmax": True}, "moe_router_pre_softmax"),
        ("mixtral", {"moe_layer_freq": [1, 0, 1]}, "layers without experts"),
        ("mixtral", {"add_qkv_bias": True}, "add_qkv_bias"),
        ("qwen3_moe", {"moe_router_score_function": "sigmoid"}, r"moe_router_score_function \(sigmoid\)"),
        ("qwen3_moe", {"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
        ("qwen3_moe", {"moe_shared_expert_intermediate_size": 64}, "moe_shared_expert"),
        ("qwen3_moe", {"moe_layer_freq": [1, 0]}, "a list of 3 zeros and ones"),
        ("qwen3_moe", {"moe_router_topk": 6}, "at most the number of experts"),
        ("qwen3_moe", {"moe_router_topk": 1}, "router cannot learn"),
    ],
)
def test_arguments_without_an_equal_are_refused(shape, family, changed, text):
    with pytest.raises(Unsupported, match=text):
        read_args({**shape(family=family).args(), **changed}, where="a")


@pytest.mark.parametrize(
    ("family", "changed", "text"),
    [
        ("mixtral", {"sliding_window": 32}, r"sliding_window \(32\)"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "at most the number of experts"),
    ],
)
def test_configurations_without_an_equal_are_refused(shape, family, changed, text):
    with pytest.raises(Unsupported, match=text):
        read_config({**shape(family=family).hf_config(), **changed}, where="c")


def swap_experts(tensors):
    tensors[FC1][[0, 3]] = tensors[FC1][[3, 0]]


def swap_gate_and_up(tensors):
    gate, up = tensors[FC1].chunk(2, dim=1)
    tensors[FC1] = torch.cat([up, gate], dim=1)


def shift_the_router(tensors):
    tensors["decoder.layers.2.mlp.router.weight"] = tensors["decoder.layers.2.mlp.router.weight"].roll(1, 0)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (swap_experts, "model.layers.1.mlp.experts.0.gate_proj.weight"),
        (swap_gate_and_up, "model.layers.1.mlp.experts.0.gate_proj.weight"),
        (shift_the_router, "model.layers.2.mlp.gate.weight"),
    ],
)
def test_faults_are_found(make, shape, fault, named):
    model = shape(family="qwen3_moe")
    tensors = model.megatron_tensors(model.hf_tensors())
    good = make.megatron(model, "good", tensors=dict(tensors))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    fault(tensors)
    report = verify(good, make.megatron(model, "bad", tensors=tensors))
    assert str(report.differences[0]).startswith(named)
