"""Parameter counts equal the published ones, exactly; work per token equals Megatron's own count."""

import argparse

import pytest

from flagscale_config import ConfigError
from flagscale_config.models import flops_per_token, num_parameters

LLAMA = {
    "swiglu": True,
    "disable_bias_linear": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "untie_embeddings_and_output_weights": True,
}


def model(layers, hidden, heads, groups, ffn, **more):
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
    }
    return {**LLAMA, **sizes, **more}


QWEN3 = {"qk_layernorm": True, "kv_channels": 128}

# Counts of the published checkpoints: the sum of the shapes of all their tensors.
PUBLISHED = {
    "qwen3-0.6b": (
        model(28, 1024, 16, 8, 3072, **QWEN3, untie_embeddings_and_output_weights=False),
        151936,
        596_049_920,
    ),
    "qwen3-4b": (
        model(36, 2560, 32, 8, 9728, **QWEN3, untie_embeddings_and_output_weights=False),
        151936,
        4_022_468_096,
    ),
    "qwen3-32b": (model(64, 5120, 64, 8, 25600, **QWEN3), 151936, 32_762_123_264),
    "qwen2.5-7b": (model(28, 3584, 28, 4, 18944, add_qkv_bias=True), 152064, 7_615_616_512),
    "llama3.1-8b": (model(32, 4096, 32, 8, 14336), 128256, 8_030_261_248),
    "llama2-7b": (model(32, 4096, 32, 32, 11008), 32000, 6_738_415_616),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    options, vocab, expected = PUBLISHED[name]
    assert num_parameters(options, vocab) == expected
    assert num_parameters({**options, "padded_vocab_size": vocab}) == expected


def test_gpt2s_shape_counts_biases_and_positions():
    gpt2 = {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "vocab_size": 50257,
    }
    assert num_parameters(gpt2) == 124_439_808


def test_other_kinds_are_refused():
    options, vocab, _ = PUBLISHED["llama2-7b"]
    with pytest.raises(ConfigError, match=r"dense decoders only \(num_experts is set\)"):
        num_parameters({**options, "num_experts": 8}, vocab)
    with pytest.raises(ConfigError, match="the size of the vocabulary is needed"):
        num_parameters(options)
    with pytest.raises(ConfigError, match="hidden_size is needed"):
        num_parameters({"num_layers": 1}, vocab)
    with pytest.raises(ConfigError, match="seq_length is needed"):
        flops_per_token(options, vocab)


def test_work_is_about_six_operations_per_parameter():
    options, vocab, count = PUBLISHED["llama3.1-8b"]
    matrices = count - vocab * 4096  # looking up an embedding is no product
    short = flops_per_token({**options, "seq_length": 1}, vocab)
    assert short == pytest.approx(6 * matrices, rel=1e-3)
    longer = flops_per_token({**options, "seq_length": 8192}, vocab)
    assert longer - short == pytest.approx(6 * 32 * 4096 * 8191)


@pytest.mark.megatron
@pytest.mark.parametrize("name", PUBLISHED)
def test_work_is_megatrons_count(name):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.arguments import add_megatron_arguments
        from megatron.training.training import num_floating_point_operations
    from flagscale_config import render_megatron

    options, vocab, _ = PUBLISHED[name]
    options = {**options, "seq_length": 4096, "padded_vocab_size": vocab}
    parser = argparse.ArgumentParser(allow_abbrev=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_megatron_arguments(parser)
    args = parser.parse_args(render_megatron(options))
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    assert flops_per_token(options) * 4096 * 8 == pytest.approx(
        num_floating_point_operations(args, 8), rel=1e-12
    )
