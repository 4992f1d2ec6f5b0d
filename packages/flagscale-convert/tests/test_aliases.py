"""Published models that share a table with others, by their configurations; nothing is downloaded."""

from __future__ import annotations

import pytest

from flagscale_convert import Unsupported, convert, make_plan
from flagscale_convert.families import FAMILIES
from flagscale_convert.hf_config import read_config, write_config
from flagscale_convert.megatron_args import read_args, write_args
from flagscale_convert.rules import bind

QWQ_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
AQUILA2_7B = {
    "architectures": ["AquilaForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM"},
    "model_type": "aquila",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 100008,
}
AQUILA2_34B = {
    **AQUILA2_7B,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 60,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
}
PARAMETERS = [
    (QWQ_32B, "qwen2", 32_763_876_352),
    (AQUILA2_7B, "llama", 7_295_537_152),
    (AQUILA2_34B, "llama", 33_693_554_688),
]


@pytest.mark.parametrize(("config", "family", "parameters"), PARAMETERS, ids=["qwq", "aquila", "aquila-gqa"])
def test_shapes_are_those_published(config, family, parameters):
    arch = read_config(config, where="c").architecture
    assert arch.family == family
    shapes = [shape for binding in bind(FAMILIES[family].rules, arch) for shape in binding.part_shapes]
    assert sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes) == parameters
    args = write_args(arch, tokenizer=None, vocab_divisor=128)
    assert args["add_qkv_bias"] is (family == "qwen2")
    again = read_args(args, where="a").architecture
    assert again == arch
    assert read_config(write_config(again, dtype="BF16", tokens={}), where="c").architecture == arch


def test_aquila_comes_back_as_llama_and_says_so(make, shape, tmp_path):
    model = shape(
        family="llama",
        config={"architectures": ["AquilaModel"], "model_type": "aquila", "auto_map": {"a": "b"}},
    )
    plan = make_plan(make.hf(model), tmp_path / "mc", to="torch_dist")
    assert any("taken for LlamaForCausalLM" in note for note in plan.notes)
    convert(plan)
    convert(make_plan(tmp_path / "mc", tmp_path / "back", to="hf"))
    make.same(make.load(tmp_path / "back"), model.hf_tensors())
    assert '"LlamaForCausalLM"' in (tmp_path / "back" / "config.json").read_text()


def test_code_that_comes_with_other_models_is_refused(shape):
    config = {**shape(family="llama").hf_config(), "auto_map": {"AutoModel": "own.Model"}}
    with pytest.raises(Unsupported, match="code of its own"):
        read_config(config, where="c")
