"""The package as it is installed, or on the path."""

from importlib.resources import files

import pytest

import flagscale_train
from flagscale_config import load


def test_every_public_name_is_there():
    for name in flagscale_train.__all__:
        assert getattr(flagscale_train, name) is not None
    assert callable(flagscale_train.plan), "the function, whatever was imported before"


def test_it_is_typed():
    assert (files("flagscale_train") / "py.typed").is_file()


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen3/0_6b", 596_049_920), ("llama3/8b", 8_030_261_248), ("qwen3/tiny", None)]
)
def test_a_recipe_has_the_published_number_of_parameters(name, parameters):
    family, stem = name.split("/")
    path = files("flagscale_train.recipes") / family / "conf" / f"{stem}.yaml"
    given = ["train.data.data_path=/d", "train.data.tokenizer.tokenizer_model=/t"]
    options = load(path, given).train.options
    hidden, layers, ffn = options["hidden_size"], options["num_layers"], options["ffn_hidden_size"]
    heads, groups, head = options["num_attention_heads"], options["num_query_groups"], options["kv_channels"]
    vocab = options.get("vocab_size", 4096)
    norms = 2 * hidden + (2 * head if options.get("qk_layernorm") else 0)
    layer = hidden * head * (heads + 2 * groups) + heads * head * hidden + 3 * hidden * ffn + norms
    embeddings = vocab * hidden * (2 if options.get("untie_embeddings_and_output_weights") else 1)
    total = embeddings + layers * layer + hidden
    assert total == (parameters or total)
    assert name != "qwen3/tiny" or 5e6 < total < 15e6
