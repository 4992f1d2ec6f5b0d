"""Tensors through both directions, against merges made by tensor operations."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp

from flagscale_convert import Unsupported, convert, make_plan, verify

FAMILIES = ["llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_equal(make, shape, tmp_path, family, tied):
    source = make.hf(shape(family=family, tied=tied, dtype=torch.bfloat16), shards=3)
    convert(make_plan(source, tmp_path / "mc", to="torch_dist"))
    convert(make_plan(tmp_path / "mc", tmp_path / "back", to="hf"))
    make.same(make.load(source), make.load(tmp_path / "back"))
    assert verify(source, tmp_path / "mc").is_equal
    assert verify(tmp_path / "mc", tmp_path / "back").is_equal


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("family", FAMILIES)
def test_written_tensors_are_megatrons(make, shape, tmp_path, family):
    model = shape(family=family)
    convert(make_plan(make.hf(model), tmp_path / "mc", to="torch_dist"))
    expected = model.megatron_tensors(model.hf_tensors())
    layered = {name for name in expected if name.startswith("decoder.layers.")}
    for layer in range(model.layers):
        names = {name.replace("layers.0.", "layers."): name for name in layered if ".layers.0." in name}
        state = {stored: torch.empty(model.layers, *expected[name].shape) for stored, name in names.items()}
        dcp.load(state, checkpoint_id=tmp_path / "mc" / "release", no_dist=True)
        make.same(
            {name: value[layer] for name, value in state.items()},
            {
                stored: expected[name.replace("layers.0.", f"layers.{layer}.")]
                for stored, name in names.items()
            },
        )
    flat = {name: torch.empty_like(value) for name, value in expected.items() if name not in layered}
    dcp.load(flat, checkpoint_id=tmp_path / "mc" / "release", no_dist=True)
    make.same(flat, {name: expected[name] for name in flat})


def by_axis(**cuts):
    """Cut as tensor parallelism of 2 does: first axis or second, layers apart."""

    def grid(name, size):
        is_layered = name.removeprefix("model.").startswith("decoder.layers.") and len(size) > 1
        parts = [1] * len(size)
        if is_layered and cuts.get("stacked", True):
            parts[0] = size[0]
        axis = 1 if ("linear_proj" in name or "linear_fc2" in name) else 0
        offset = 1 if is_layered and cuts.get("stacked", True) else 0
        if axis + offset < len(size) and "norm" not in name:
            parts[axis + offset] = cuts.get("parts", 2)
        return tuple(parts)

    return grid


@pytest.mark.parametrize(
    ("stacked", "prefix", "parts"),
    [(True, "", 1), (True, "", 2), (True, "model.", 4), (False, "", 2), (False, "model.", 3)],
)
def test_every_dialect_reads_the_same(make, shape, tmp_path, stacked, prefix, parts):
    model = shape(family="qwen3")
    root = make.megatron(model, stacked=stacked, prefix=prefix, grid=by_axis(stacked=stacked, parts=parts))
    convert(make_plan(root, tmp_path / "out", to="hf"))
    make.same(make.load(tmp_path / "out"), model.hf_tensors())


def test_local_names_of_norms_are_read(make, shape, tmp_path):
    model = shape(family="llama")
    live = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }

    def rename(name):
        for written, local in live.items():
            name = name.replace(written, local)
        return name

    root = make.megatron(model, stacked=False, rename=rename)
    convert(make_plan(root, tmp_path / "out", to="hf"))
    make.same(make.load(tmp_path / "out"), model.hf_tensors())


def test_common_pt_of_older_versions_is_read(make, shape, tmp_path):
    model = shape(family="llama")
    root = make.megatron(model, common={"iteration": 5})
    from argparse import Namespace

    torch.save({"args": Namespace(**model.args()), "iteration": 5}, root / "iter_0000005" / "common.pt")
    convert(make_plan(root, tmp_path / "out", to="hf"))
    make.same(make.load(tmp_path / "out"), model.hf_tensors())


def test_small_shards_hold_everything_once(make, shape, tmp_path):
    model = shape(layers=4)
    plan = make_plan(make.megatron(model), tmp_path / "out", to="hf", shard_bytes=60_000)
    convert(plan)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.hf_tensors().values())
    make.same(make.load(tmp_path / "out"), model.hf_tensors())
    assert [path.stat().st_size for path in shards] == [file.size_bytes for file in plan.files]


def test_small_data_files_hold_everything_once(make, shape, tmp_path):
    model = shape(layers=4)
    convert(make_plan(make.hf(model), tmp_path / "mc", to="torch_dist", shard_bytes=60_000))
    assert len(list((tmp_path / "mc" / "release").glob("*.distcp"))) > 4
    convert(make_plan(tmp_path / "mc", tmp_path / "back", to="hf"))
    make.same(make.load(tmp_path / "back"), model.hf_tensors())


def test_a_tied_copy_of_the_head_is_dropped_only_if_equal(make, shape, tmp_path):
    model = shape(tied=True)
    embedding = model.hf_tensors()["model.embed_tokens.weight"]
    good = make.hf(model, "good", lm_head__weight=embedding.clone())
    convert(make_plan(good, tmp_path / "mc", to="torch_dist"))
    bad = make.hf(model, "bad", lm_head__weight=embedding + 1)
    with pytest.raises(Unsupported, match=r"differs from `model\.embed_tokens\.weight`"):
        convert(make_plan(bad, tmp_path / "mc2", to="torch_dist"))
    assert not (tmp_path / "mc2").exists()


def test_rotary_frequencies_are_left_out(make, shape, tmp_path):
    model = shape(family="llama")
    source = make.hf(model, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(10))
    plan = make_plan(source, tmp_path / "mc", to="torch_dist")
    assert any("rotary frequencies" in note for note in plan.notes)
    convert(plan)
    convert(make_plan(tmp_path / "mc", tmp_path / "back", to="hf"))
    make.same(make.load(tmp_path / "back"), model.hf_tensors())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_casts_round_as_torch_does(make, shape, tmp_path, dtype):
    target = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    model = shape(family="qwen2", dtype=torch.float32)
    convert(make_plan(make.megatron(model), tmp_path / "out", to="hf", dtype=dtype))
    make.same(
        make.load(tmp_path / "out"), {name: tensor.to(target) for name, tensor in model.hf_tensors().items()}
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(target)[6:]


def test_rounding_is_torchs_for_every_kind_of_value(make, shape, tmp_path):
    model = shape(family="llama", hidden=256, heads=1, groups=1, head=2)
    edges = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), 1e-40, 65504.0, 3e38])
    halves = (torch.arange(256, dtype=torch.int32) << 15 | 0x3F800000).view(torch.float32)
    for dtype, values in (("bf16", torch.cat([edges, halves])[:256]), ("fp16", halves)):
        source = make.hf(model, dtype, model__norm__weight=values)
        convert(make_plan(source, tmp_path / f"{dtype}-out", to="hf", dtype=dtype))
        ours = make.load(tmp_path / f"{dtype}-out")["model.norm.weight"]
        assert torch.equal(ours.view(torch.int16), values.to(ours.dtype).view(torch.int16))


def test_not_a_number_stays_one(make, shape, tmp_path):
    values = torch.full((48,), float("nan"))
    values.view(torch.int32)[1::2] = 0x7F800001  # its payload is in the bits that are cut off
    source = make.hf(shape(), model__norm__weight=values)
    convert(make_plan(source, tmp_path / "out", to="hf", dtype="bf16"))
    assert make.load(tmp_path / "out")["model.norm.weight"].isnan().all()


def test_values_beyond_the_range_are_refused(make, shape, tmp_path):
    huge = torch.full((48,), 1e6)
    source = make.hf(shape(), model__norm__weight=huge)
    with pytest.raises(
        Unsupported, match=r"`model.norm.weight`: a value \(1e\+06\) is beyond the range of F16"
    ):
        convert(make_plan(source, tmp_path / "out", to="hf", dtype="fp16"))
    convert(make_plan(source, tmp_path / "out", to="hf", dtype="bf16"), overwrite=True)


def test_same_source_gives_the_same_bytes(make, shape, tmp_path):
    source = make.hf(shape())
    for name in ("one", "two"):
        convert(make_plan(source, tmp_path / name, to="torch_dist"), workers=1 if name == "one" else 3)
    for path in sorted((tmp_path / "one").rglob("*.distcp")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size_round_trips(make, shape, tmp_path_factory, data):
    groups = data.draw(st.integers(1, 3))
    model = shape(
        family=data.draw(st.sampled_from(FAMILIES)),
        tied=data.draw(st.booleans()),
        layers=data.draw(st.integers(1, 3)),
        hidden=data.draw(st.integers(1, 9)),
        ffn=data.draw(st.integers(1, 9)),
        groups=groups,
        heads=groups * data.draw(st.integers(1, 3)),
        head=data.draw(st.sampled_from([1, 2, 6])),
        vocab=data.draw(st.sampled_from([1, 127, 128, 131])),
    )
    root = tmp_path_factory.mktemp("any")
    make.root = root
    source = make.hf(model)
    convert(make_plan(source, root / "mc", to="torch_dist"))
    convert(make_plan(root / "mc", root / "back", to="hf"))
    make.same(make.load(source), make.load(root / "back"))
