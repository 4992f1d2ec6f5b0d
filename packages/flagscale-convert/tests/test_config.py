"""Configurations both ways: nothing guessed silently, every form read."""

from __future__ import annotations

import json

import pytest

from flagscale_convert import RopeScaling, Unsupported, convert, make_plan
from flagscale_convert.hf_config import read_config, write_config
from flagscale_convert.megatron_args import read_args, write_args
from flagscale_convert.torch_dist import TorchDistSource


def test_there_and_back_keeps_every_field(shape):
    for family in ("llama", "qwen2", "qwen3"):
        for tied in (True, False):
            arch = read_config(shape(family=family, tied=tied).hf_config(), where="c").architecture
            args = write_args(arch, tokenizer=None, vocab_divisor=128)
            again = read_args(args, where="a").architecture
            assert again == arch
            written = write_config(again, dtype="BF16", tokens={})
            assert read_config(written, where="c").architecture == arch


@pytest.mark.parametrize(
    "scaling",
    [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 32.0)],
)
@pytest.mark.parametrize("form", ["classic", "parameters"])
def test_rope_forms(shape, scaling, form):
    rope = {} if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = shape(family="llama").hf_config()
    if form == "classic":
        config["rope_scaling"] = rope or None
    else:
        del config["rope_theta"]
        config["rope_parameters"] = {"rope_theta": 50000.0, "rope_type": "default", **rope}
    arch = read_config(config, where="c").architecture
    assert (arch.rope_theta, arch.rope_scaling) == (50000.0, scaling)
    args = write_args(arch, tokenizer=None, vocab_divisor=128)
    assert args["use_rope_scaling"] is (scaling is not None and scaling.kind == "llama3")
    assert read_args(args, where="a").architecture == arch
    assert read_config(write_config(arch, dtype="F32", tokens={}), where="c").architecture == arch


def test_old_type_key_of_rope_scaling(shape):
    config = shape(config={"rope_scaling": {"type": "linear", "factor": 2}}).hf_config()
    assert read_config(config, where="c").architecture.rope_scaling == RopeScaling("linear", 2.0)


def test_defaults_are_reported(shape):
    config = shape(family="llama", head=8).hf_config()
    for name in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        del config[name]
    read = read_config({**config, "brand_new_field": 3}, where="c")
    assert read.architecture.head_size == 8
    assert read.architecture.num_kv_heads == 6
    for name in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        assert any(note.startswith(f"{name}: absent") for note in read.notes)
    assert "brand_new_field (3): unknown field, left out" in read.notes


@pytest.mark.parametrize(
    ("vocab", "divisor", "padded"), [(131, 128, 256), (128, 128, 128), (151936, 128, 151936), (7, 3, 9)]
)
def test_padding(shape, vocab, divisor, padded):
    config = shape(vocab=vocab).hf_config()
    assert read_config(config, where="c", vocab_divisor=divisor).architecture.padded_vocab_size == padded


def test_multi_head_attention_is_megatrons_default(shape):
    arch = read_config(shape(family="llama", groups=6).hf_config(), where="c").architecture
    args = write_args(arch, tokenizer=None, vocab_divisor=128)
    assert (args["group_query_attention"], args["num_query_groups"]) == (False, 1)
    assert read_args(args, where="a").architecture.num_kv_heads == 6


def write_tokenizer(folder, *, tokens=131, **named):
    folder.mkdir(exist_ok=True)
    vocabulary = {f"t{index}": index for index in range(tokens - 1)}
    added = [{"id": tokens - 1, "content": "<end>"}]
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", **named}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_the_tokenizer_goes_along_both_ways(make, shape, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tok", pad_token={"content": "t3"})
    root = make.megatron(shape(), args={"vocab_size": None})
    convert(make_plan(root, tmp_path / "out", to="hf", tokenizer=tokenizer))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (131, 130, 3)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 130
    convert(make_plan(tmp_path / "out", tmp_path / "mc", to="torch_dist"))
    assert (tmp_path / "mc" / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
    args = TorchDistSource(tmp_path / "mc" / "release").common.args
    assert args["tokenizer_model"] == str(tmp_path / "mc" / "tokenizer")
    (tmp_path / "mc").rename(tmp_path / "moved")
    convert(make_plan(tmp_path / "moved", tmp_path / "back", to="hf"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_the_tokenizer_the_run_names_is_found(make, shape, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tok")
    root = make.megatron(shape(), args={"vocab_size": None, "tokenizer_model": str(tokenizer)})
    plan = make_plan(root, tmp_path / "out", to="hf")
    assert plan.architecture.vocab_size == 131
    assert any(note.startswith("vocab_size: 131, from the tokenizer") for note in plan.notes)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(make, shape, tmp_path):
    root = make.megatron(shape(), args={"vocab_size": None})
    with pytest.raises(Unsupported, match="give the tokenizer it was trained with"):
        make_plan(root, tmp_path / "out", to="hf", tokenizer=write_tokenizer(tmp_path / "tok", tokens=300))


def test_an_unknown_vocabulary_keeps_padding_and_says_so(make, shape, tmp_path):
    root = make.megatron(shape(), args={"vocab_size": None})
    plan = make_plan(root, tmp_path / "out", to="hf")
    assert plan.architecture.vocab_size == 256
    assert any("all 256 padded rows are kept" in note for note in plan.notes)
    assert make_plan(root, tmp_path / "out", to="hf", vocab_size=131).architecture.vocab_size == 131
