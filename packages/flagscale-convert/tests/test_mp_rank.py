"""Per-rank checkpoints against slices taken by tensor operations, and every layout there and back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flagscale_convert import ParallelLayout, SourceDamaged, Unsupported, convert, inspect, make_plan, verify
from flagscale_convert.manifest import MANIFEST

SLOW = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def to_torch(source, out, *, flavour=None, **sizes):
    convert(make_plan(source, out, to="torch", parallel=ParallelLayout(**sizes), **(flavour or {})))
    return out


def rank_file(root, name):
    return torch.load(root / "release" / f"mp_rank_{name}" / "model_optim_rng.pt", weights_only=False)


def test_slices_are_megatrons(make, shape, tmp_path):
    model = shape(family="qwen2", layers=4, heads=8, groups=4)
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    out = to_torch(make.hf(model), tmp_path / "out", virtual_pipeline_model_parallel_size=2, **sizes)
    whole = model.megatron_tensors(model.hf_tensors())
    layers = {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}
    for (stage, chunk), layer in layers.items():
        for rank in range(2):
            state = rank_file(out, f"{rank:02d}_{stage:03d}")
            assert state["args"].virtual_pipeline_model_parallel_size == 2
            found = state[f"model{chunk}"]
            prefix = f"decoder.layers.{layer}."
            for name in [name for name in whole if name.startswith(prefix)]:
                ours = found.pop("decoder.layers.0." + name.removeprefix(prefix))
                assert torch.equal(ours, expected_slice(name, whole[name], rank)), name
            left = {name for name in found if not name.endswith("_extra_state")}
            outside = {"embedding.word_embeddings.weight"} if (stage, chunk) == (0, 0) else set()
            if (stage, chunk) == (1, 1):
                outside = {"decoder.final_layernorm.weight", "output_layer.weight"}
            assert left == outside
            for name in outside:
                assert torch.equal(found[name], expected_slice(name, whole[name], rank)), name


def expected_slice(name, tensor, rank):
    if "linear_fc1.weight" in name:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(2, dim=1)[rank]
    if "norm" in name or "router" in name:
        return tensor
    return tensor.chunk(2)[rank]


def test_experts_are_numbered_locally(make, shape, tmp_path):
    model = shape(family="qwen3_moe", experts=4, layers=2)
    sizes = {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    }
    source = make.hf(model)
    hf = model.hf_tensors()
    out = to_torch(source, tmp_path / "local", flavour={"transformer_impl": "local"}, **sizes)
    assert sorted(path.name for path in (out / "release").iterdir()) == ["mp_rank_00_000", "mp_rank_01_001"]
    state = rank_file(out, "01_001")["model"]
    assert torch.equal(
        state["decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"],
        hf["model.layers.1.mlp.experts.3.down_proj.weight"],
    )
    assert "decoder.layers.0.input_layernorm.weight" in state
    grouped = to_torch(source, tmp_path / "grouped", flavour={"moe_grouped_gemm": True}, **sizes)
    state = rank_file(grouped, "00_000")["model"]
    assert torch.equal(
        state["decoder.layers.0.mlp.experts.linear_fc1.weight1"],
        torch.cat([hf[f"model.layers.0.mlp.experts.1.{name}_proj.weight"] for name in ("gate", "up")]),
    )
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in state
    assert verify(out, grouped).is_equal
    assert inspect(out).dialect == "TP 2, PP 1, EP 2, ETP 1"


FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3"]
LAYOUTS = st.fixed_dictionaries(
    {
        "tensor_model_parallel_size": st.sampled_from([1, 2, 3, 4]),
        "pipeline_model_parallel_size": st.sampled_from([1, 2, 3, 4]),
        "expert_model_parallel_size": st.sampled_from([1, 2, 3, 4]),
        "expert_tensor_parallel_size": st.sampled_from([None, 1, 2, 3, 4]),
        "virtual_pipeline_model_parallel_size": st.sampled_from([None, None, 2]),
        "num_layers_in_first_pipeline_stage": st.sampled_from([None, None, 2, 4]),
        "num_layers_in_last_pipeline_stage": st.sampled_from([None, None, 2]),
    }
)


@SLOW
@given(data=st.data())
def test_every_layout_there_and_back(make, shape, tmp_path_factory, data):
    """Families x layouts x sizes, key heads fewer than ranks among them: bitwise identical at the end."""
    family = data.draw(st.sampled_from(FAMILIES), "family")
    sizes = data.draw(LAYOUTS, "layout")
    has_experts = family in ("qwen3_moe", "mixtral", "deepseek_v3")
    tensor, expert = sizes["tensor_model_parallel_size"], sizes["expert_model_parallel_size"]
    expert_tensor = sizes["expert_tensor_parallel_size"] or tensor
    if not has_experts:
        sizes |= {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}
    groups = data.draw(st.sampled_from([1, 2, tensor]), "groups")
    heads = groups * tensor * data.draw(st.sampled_from([1, 2]), "heads per group and rank")
    head = tensor * data.draw(st.sampled_from([2, 4]), "head")
    layers = data.draw(st.integers(1, 9), "layers")
    has_plain = family in ("qwen3_moe", "deepseek_v3")
    model = shape(
        family=family,
        tied=data.draw(st.booleans(), "tied"),
        layers=layers,
        plain=tuple(range(data.draw(st.integers(0, layers - 1), "plain layers"))) if has_plain else (),
        mtp=data.draw(st.integers(0, 2), "further tokens") if family == "deepseek_v3" else 0,
        query_rank=data.draw(st.sampled_from([None, 20]), "query rank"),
        value_head=tensor * data.draw(st.integers(1, 3), "value head"),
        hidden=data.draw(st.sampled_from([8, 24]), "hidden"),
        ffn=tensor * data.draw(st.integers(1, 7), "ffn"),
        heads=heads,
        groups=groups,
        head=head,
        vocab=data.draw(st.sampled_from([7, 131, 257]), "vocabulary"),
        experts=expert * data.draw(st.integers(2, 3), "experts"),
        # Of shared experts every tensor-parallel rank has a part, of the others every expert-tensor one.
        expert_ffn=math.lcm(expert_tensor, tensor) * data.draw(st.integers(1, 5), "expert ffn"),
        dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float32]), "dtype"),
    )
    root = tmp_path_factory.mktemp("layout")
    make.root = root
    source = make.hf(model)
    flavour = {
        "transformer_impl": data.draw(st.sampled_from(["local", "transformer_engine"]), "flavour"),
        "moe_grouped_gemm": data.draw(st.booleans(), "grouped"),
        "megatron_version": data.draw(st.sampled_from(["0.16", "0.18", "0.19"]), "version"),
    }
    try:
        plan = make_plan(
            source, root / "ranks", to="torch", vocab_divisor=8, parallel=ParallelLayout(**sizes), **flavour
        )
    except Unsupported as error:
        # Layers or experts that do not divide: said before anything is written.
        assume("layers" not in str(error) and "parallel_size" not in str(error))
        raise
    convert(plan)
    assert verify(source, root / "ranks").is_equal
    convert(make_plan(root / "ranks", root / "back", to="hf"))
    make.same(make.load(source), make.load(root / "back"))
    other = ParallelLayout(tensor_model_parallel_size=tensor)
    convert(make_plan(root / "ranks", root / "dist", to="torch_dist", parallel=other))
    convert(make_plan(root / "dist", root / "again", to="torch", parallel=ParallelLayout(**sizes), **flavour))
    for path in (root / "ranks").rglob("*.pt"):
        theirs = torch.load(root / "again" / path.relative_to(root / "ranks"), weights_only=False)
        for name, state in torch.load(path, weights_only=False).items():
            if name.startswith("model"):
                make.same(tensors_of(state), tensors_of(theirs[name]))


def tensors_of(state):
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def test_layouts_that_overwrite_their_own_files_are_refused(make, shape, tmp_path):
    source = make.hf(shape(family="mixtral", experts=4))
    with pytest.raises(Unsupported, match="slices of experts would"):
        to_torch(source, tmp_path / "out", expert_tensor_parallel_size=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_model_parallel_size": 5}, r"tensor_model_parallel_size \(5\): must divide the 6 attention"),
        ({"pipeline_model_parallel_size": 2}, "3 of 3 layers do not divide by 2 stages"),
        ({"expert_model_parallel_size": 2}, "the model has no experts"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs a pipeline"),
        ({"tensor_model_parallel_size": 0}, "must be at least 1"),
    ],
)
def test_impossible_sizes_are_told_before_anything_is_written(make, shape, tmp_path, sizes, message):
    with pytest.raises(Unsupported, match=message):
        to_torch(make.hf(shape()), tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


def written(make, shape, tmp_path):
    source = make.hf(shape(tied=True, layers=4))
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    return source, to_torch(source, tmp_path / "out", **sizes)


def test_a_missing_rank_is_named(make, shape, tmp_path):
    _, out = written(make, shape, tmp_path)
    (out / "release" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(SourceDamaged, match=r"mp_rank_01_001: has no model_optim_rng.pt"):
        inspect(out / "release")


def test_a_truncated_rank_is_named(make, shape, tmp_path):
    _, out = written(make, shape, tmp_path)
    path = out / "release" / "mp_rank_01_000" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SourceDamaged, match="mp_rank_01_000"):
        inspect(out / "release")


def test_copies_that_drifted_apart_are_suspicious(make, shape, tmp_path):
    _, out = written(make, shape, tmp_path)
    assert not inspect(out, values=True).suspicions
    path = out / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    assert torch.equal(state["model"]["output_layer.weight"], rank_file(out, "00_000")["model"][EMBEDDING])
    state["model"]["output_layer.weight"][3, 3] += 1
    torch.save(state, path)
    assert f"`{EMBEDDING}`: ranks have different copies" in inspect(out, values=True).suspicions


EMBEDDING = "embedding.word_embeddings.weight"


def test_a_hostile_rank_file_is_refused(make, shape, tmp_path):
    from flagscale_convert import UnsafePickle

    class Payload:
        def __reduce__(self):
            return print, ("executed",)

    _, out = written(make, shape, tmp_path)
    torch.save({"args": Payload()}, out / "release" / "mp_rank_00_000" / "model_optim_rng.pt")
    with pytest.raises(UnsafePickle, match=r"__builtin__.print"):
        inspect(out / "release")


def test_optimizer_states_of_ranks_are_counted_and_skipped(make, shape, tmp_path):
    source, out = written(make, shape, tmp_path)
    torch.save({"exp_avg": torch.ones(9)}, out / "release" / "mp_rank_00_000" / "distrib_optim.pt")
    assert inspect(out).optimizer_tensors == 1
    assert verify(source, out).is_equal
    assert json.dumps(inspect(out).to_dict())


def test_state_dicts_of_modules_are_read(make, shape, tmp_path):
    """Torch's own are ordered dicts with attributes, which Megatron saves as they are."""
    source, out = written(make, shape, tmp_path)
    for path in out.rglob("*.pt"):
        state = torch.load(path, weights_only=False)
        module = torch.nn.Linear(1, 1).state_dict()
        assert module._metadata
        module.clear()
        module.update(state["model"])
        torch.save({**state, "model": module}, path)
    assert "the manifest says" in str(verify(source, out).differences)
    (out / MANIFEST).unlink()
    assert verify(source, out).is_equal
