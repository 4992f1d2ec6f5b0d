"""What users hand over when something went wrong: one clear sentence and the right exit code."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from flagscale_convert import (
    ConvertError,
    DestinationRefused,
    SourceDamaged,
    SourceNotFound,
    Unsupported,
    convert,
    inspect,
    make_plan,
    verify,
)


def test_nothing_there(tmp_path):
    with pytest.raises(SourceNotFound, match="does not exist") as caught:
        inspect(tmp_path / "nowhere")
    assert caught.value.exit_code == 3


def test_an_empty_directory_and_a_near_miss(make, shape, tmp_path):
    make.megatron(shape(), "checkpoints")
    with pytest.raises(SourceNotFound, match=r"did you mean .*checkpoints\?"):
        inspect(tmp_path)


def test_a_file_instead_of_a_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SourceNotFound, match="is a file"):
        inspect(tmp_path / "file")


def test_bin_files_are_refused_with_advice(make, shape):
    source = make.hf(shape())
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(Unsupported, match="save_pretrained") as caught:
        inspect(source)
    assert caught.value.exit_code == 2


def test_git_lfs_pointers_are_recognised(make, shape):
    source = make.hf(shape())
    (source / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(SourceNotFound, match="git lfs pull"):
        inspect(source)


def test_a_missing_shard(make, shape):
    source = make.hf(shape(), shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceNotFound, match=r"model-00002-of-00003\.safetensors"):
        inspect(source)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_safetensors(make, shape, keep):
    path = make.hf(shape()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceDamaged, match=r"model\.safetensors"):
        inspect(path.parent)


def test_a_half_written_iteration_is_passed_over(make, shape, tmp_path):
    model = shape()
    root = make.megatron(model, iteration=5)
    shutil.copytree(root / "iter_0000005", root / "iter_0000009")
    (root / "iter_0000009" / "metadata.json").unlink()
    found = inspect(root)
    assert found.iteration == 5
    assert any("iter_0000009 passed over" in note for note in found.notes)
    with pytest.raises(SourceDamaged, match="the save did not finish") as caught:
        inspect(root / "iter_0000009")
    assert caught.value.exit_code == 3
    convert(make_plan(root, tmp_path / "out", to="hf"))
    make.same(make.load(tmp_path / "out"), model.hf_tensors())


def test_a_truncated_data_file(make, shape):
    root = make.megatron(shape())
    path = root / "iter_0000005" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceDamaged, match=r"has \d+ bytes, `.*` ends at \d+: the file is truncated"):
        inspect(root / "iter_0000005")
    with pytest.raises(SourceDamaged, match="no iteration is whole"):
        inspect(root)


def test_a_missing_data_file(make, shape):
    root = make.megatron(shape())
    (root / "iter_0000005" / "__0_0.distcp").unlink()
    with pytest.raises(SourceNotFound, match=r"__0_0\.distcp"):
        inspect(root / "iter_0000005")


def test_the_newest_whole_iteration_wins_and_a_differing_tracker_is_told(make, shape):
    root = make.megatron(shape(), iteration=5)
    shutil.copytree(root / "iter_0000005", root / "iter_0000012")
    found = inspect(root)
    assert found.path.name == "iter_0000012"
    assert any("names iter_0000005" in note for note in found.notes)


def test_missing_unknown_and_misshaped_tensors_are_all_named(make, shape, tmp_path):
    model = shape(family="llama")
    tensors = model.megatron_tensors(model.hf_tensors())
    del tensors["decoder.final_layernorm.weight"]
    tensors["decoder.surprise.weight"] = torch.zeros(3)
    tensors["output_layer.weight"] = torch.zeros(4, model.hidden)
    plan = make_plan(make.megatron(model, tensors=tensors), tmp_path / "out", to="hf")
    assert len(plan.problems) == 3
    with pytest.raises(Unsupported) as caught:
        convert(plan)
    text = str(caught.value)
    assert "`decoder.final_layernorm.weight` is missing" in text
    assert "`decoder.surprise.weight` has no rule" in text
    assert "`output_layer.weight` has shape [4, 48]" in text
    assert not (tmp_path / "out").exists()


def test_parts_of_different_dtypes_are_not_merged(make, shape, tmp_path):
    source = make.hf(shape(family="llama"), model__layers__0__mlp__up_proj__weight=torch.zeros(80, 48).half())
    plan = make_plan(source, tmp_path / "out", to="torch_dist")
    assert any("dtypes (F16, F32) differ" in problem for problem in plan.problems)


def test_chunks_that_leave_a_gap_are_found(make, shape, reference_writer, tmp_path):
    import pickle

    root = make.megatron(shape())
    path = root / "iter_0000005" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()
    path.write_bytes(pickle.dumps(metadata))
    assert any("do not tile" in finding for finding in inspect(root).suspicions)
    with pytest.raises(Unsupported, match="do not tile"):
        convert(make_plan(root, tmp_path / "out", to="hf"))


def test_weights_that_are_not_numbers_are_found(make, shape):
    model = shape(family="llama")
    tensors = model.megatron_tensors(model.hf_tensors())
    tensors["decoder.layers.1.mlp.linear_fc2.weight"][3, 4] = float("nan")
    tensors["decoder.layers.2.mlp.linear_fc2.weight"].zero_()
    findings = inspect(make.megatron(model, tensors=tensors), values=True).suspicions
    assert any("layers.1.mlp.linear_fc2" in found and "NaN" in found for found in findings)
    assert any("layers.2.mlp.linear_fc2" in found and "zeros" in found for found in findings)


def test_a_destination_that_holds_something(make, shape, tmp_path):
    source = make.megatron(shape())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    plan = make_plan(source, tmp_path / "out", to="hf")
    with pytest.raises(DestinationRefused, match=r"thesis\.tex"):
        convert(plan)
    convert(plan, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", ["", "iter_0000005", "iter_0000005/inside"])
def test_the_source_is_never_written_to(make, shape, place):
    root = make.megatron(shape())
    with pytest.raises(DestinationRefused, match="overlaps the source"):
        convert(make_plan(root, root / place, to="hf"), overwrite=True)


def test_a_training_directory_is_never_written_to(make, shape, tmp_path):
    run = make.megatron(shape(), "run")
    with pytest.raises(DestinationRefused, match="training run"):
        convert(make_plan(make.hf(shape()), run, to="torch_dist"), overwrite=True)


def test_overwriting_leaves_nothing_of_the_old_model(make, shape, tmp_path):
    old, new = make.hf(shape(layers=5), "old"), make.hf(shape(layers=2), "new")
    out = tmp_path / "out"
    convert(make_plan(old, out, to="hf", shard_bytes=50_000))
    with pytest.raises(DestinationRefused, match="--overwrite"):
        convert(make_plan(new, out, to="hf"))
    convert(make_plan(new, out, to="hf"), overwrite=True)
    make.same(make.load(out), make.load(new))
    assert verify(new, out).is_equal


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"num_experts": 8}, "moe_router_topk"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"swiglu": False}, "swiglu"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"rotary_percent": 0.5}, "rotary_percent"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"add_qkv_bias": True}, "add_qkv_bias"),
        ({"num_query_groups": 4}, "num_query_groups"),
        ({"vocab_size": 999}, "vocabulary"),
        ({"num_layers": None}, "num_layers"),
    ],
)
def test_arguments_of_other_models_are_refused(make, shape, tmp_path, args, named):
    root = make.megatron(shape(), args=args)
    with pytest.raises(Unsupported, match=named):
        make_plan(root, tmp_path / "out", to="hf")
    assert any(named in finding for finding in inspect(root).suspicions)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2}}, "low_freq_factor"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ],
)
def test_configurations_of_other_models_are_refused(make, shape, tmp_path, config, named):
    with pytest.raises(Unsupported, match=named):
        make_plan(make.hf(shape(config=config)), tmp_path / "out", to="torch_dist")


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff\xfe", '{"a":' * 5000])
def test_a_broken_config(make, shape, text):
    source = make.hf(shape())
    (source / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConvertError, match=r"config\.json"):
        make_plan(source, source.parent / "out", to="torch_dist")


def test_a_checkpoint_without_arguments(make, shape, tmp_path):
    with pytest.raises(Unsupported, match="carries no arguments"):
        make_plan(make.megatron(shape(), common={"iteration": 5}), tmp_path / "out", to="hf")


def test_an_index_that_points_elsewhere(make, shape):
    source = make.hf(shape(), shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../../outside.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(SourceDamaged, match="only plain names"):
        inspect(source)
