"""A configuration alone: `config.json`, Megatron's options and FlagScale's YAML say the same model."""

from __future__ import annotations

import json

import pytest
import yaml

from flagscale_convert import SourceNotFound, Unsupported, config
from flagscale_convert.cli import main

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama": {"family": "llama", "config": {"rope_scaling": LLAMA3, "rope_theta": 500000.0}},
    "llama-multi-head": {"family": "llama", "groups": 6},
    "qwen2-tied": {"family": "qwen2", "tied": True},
    "qwen2-yarn": {"family": "qwen2", "config": {"rope_scaling": YARN}},
    "qwen3": {"family": "qwen3"},
    "qwen3_moe": {"family": "qwen3_moe", "plain": (1,)},
    "mixtral": {"family": "mixtral"},
    "v3": {
        "family": "deepseek_v3",
        "experts": 8,
        "per_token": 4,
        "expert_groups": 4,
        "groups_per_token": 2,
        "plain": (0,),
        "mtp": 1,
        "config": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    },
    "moonlight": {"family": "deepseek_v3", "query_rank": None},
}


@pytest.fixture(params=MODELS)
def directory(request, shape, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shape(**MODELS[request.param]).hf_config()))
    return tmp_path


def test_there_and_back_through_yaml(directory):
    there = config(directory)
    (directory / "model.yaml").write_text(there.text)
    back = config(directory / "model.yaml")
    assert back.architecture == there.architecture
    (directory / "again.json").write_text(back.text)
    assert config(directory / "again.json").text == there.text


def test_the_words_are_the_options(directory):
    options = yaml.safe_load(config(directory).text)["model"]
    words = config(directory, to="args").text.split()
    flags = {word for word in words if word.startswith("--")}
    assert flags == {f"--{name.replace('_', '-')}" for name in options}
    assert words[words.index("--hidden-size") + 1] == "48"
    assert "--disable-bias-linear" in words


def test_hugging_face_to_hugging_face_keeps_the_model(directory):
    written = config(directory, to="hf")
    (directory / "again.json").write_text(written.text)
    assert config(directory / "again.json").architecture == written.architecture


def test_megatrons_checkpoint_gives_config_json(make, shape, capsys):
    root = make.megatron(shape())
    assert main(["config", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["architectures"] == ["Qwen3ForCausalLM"]
    assert main(["config", str(root), "--to", "yaml", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert yaml.safe_load(text)["model"]["num_layers"] == 3


def test_sections_and_second_spellings_are_read(shape, tmp_path):
    source = tmp_path / "config.json"
    source.write_text(json.dumps(shape(family="qwen3_moe", plain=(0,)).hf_config()))
    options = yaml.safe_load(config(source).text)["model"]
    assert options["moe_layer_freq"] == "[0]*1+[1]*2"
    vocab = {"tokenizer": {"vocab_size": options.pop("vocab_size")}}
    options.pop("padded_vocab_size")
    options["moe-layer-freq"] = [0, 1, 1]
    options.pop("moe_layer_freq")
    train = {"train": {"model": options, "data": vocab, "system": {"tensor_model_parallel_size": 2}}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    found = config(tmp_path / "train.yaml").architecture
    assert found.experts == config(source).architecture.experts
    assert (found.vocab_size, found.padded_vocab_size) == (131, 256)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hiden_size": 48}, "hiden_size: no option of Megatron .* did you mean hidden_size"),
        ({"num_layers": "many"}, "num_layers"),
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"moe_layer_freq": "__import__('os')"}, "moe_layer_freq"),
        ({"vocab_size": None, "padded_vocab_size": None}, "vocab_size: is not given"),
    ],
)
def test_wrong_yaml_is_named(shape, tmp_path, change, text):
    (tmp_path / "config.json").write_text(json.dumps(shape(family="qwen3_moe").hf_config()))
    options = yaml.safe_load(config(tmp_path).text)["model"]
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {**options, **change}}))
    with pytest.raises(Unsupported, match=text):
        config(tmp_path / "model.yaml")


def test_what_megatrons_command_line_cannot_say_is_refused(shape, tmp_path):
    rope = {**YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}  # as Kimi-K2 has it
    given = shape(family="deepseek_v3", config={"rope_scaling": rope}).hf_config()
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(
        Unsupported, match=r"beta_fast \(1\.0\): Megatron .* has no option for it and takes 32"
    ):
        config(tmp_path, to="args")
    assert json.loads(config(tmp_path, to="hf").text)["rope_scaling"]["beta_fast"] == 1.0


def test_other_files_are_wrong_input(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("[1, 2]")
    (tmp_path / "b.yaml").write_text("a: [")
    for name, code in (("a.yaml", 2), ("b.yaml", 2), ("absent.yaml", 3)):
        assert main(["config", str(tmp_path / name)]) == code
        assert f"error: {tmp_path / name}" in capsys.readouterr().err
    with pytest.raises(SourceNotFound):
        config(tmp_path)
    with pytest.raises(Unsupported, match="one of yaml, args, hf"):
        config(tmp_path, to="toml")
