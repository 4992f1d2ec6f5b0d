"""Sizes of dense decoder models: parameters and floating-point work, from their Megatron options.

Formulae count what Megatron builds for `GPTModel`: attention with grouped keys, gated or plain feed-forward
layers, LayerNorm or RMSNorm, tied or untied embeddings. Mixture-of-experts, latent attention and hybrid
models are refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.options import option_table

__all__ = ["Dimensions", "flops_per_token", "num_parameters"]

_OTHER_KINDS = ("num_experts", "multi_latent_attention", "hybrid_layer_pattern", "mtp_num_layers")
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The numbers that define a dense decoder; all counts in elements."""

    num_layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    """Rows of the embedding, padding included when the options pad it."""
    is_gated: bool
    """Whether the feed-forward layer has a gate (SwiGLU)."""
    is_tied: bool
    """Whether embedding and output layer share one matrix."""
    has_bias: bool
    has_qkv_bias: bool
    has_qk_norm: bool
    has_norm_bias: bool
    num_positions: int
    """Learned position vectors, 0 with rotary positions."""

    @classmethod
    def of(cls, options: Mapping[str, Any], vocab_size: int | None = None) -> Dimensions:
        """Read the numbers from Megatron options by canonical name.

        `vocab_size` counts the rows of the embedding where the options do not say it (a tokenizer decides it
        then).

        Raises:
            ConfigError: the model is of another kind, or a number is missing.
        """
        get = _getter(options)
        _check_kind(get)
        hidden, heads = get("hidden_size"), get("num_attention_heads")
        vocab = vocab_size or get("padded_vocab_size") or get("vocab_size")
        if vocab is None:
            raise _problem("the size of the vocabulary is needed; set padded_vocab_size or vocab_size")
        is_rotary = get("position_embedding_type") != "learned_absolute" or get(
            "use_rotary_position_embeddings"
        )
        has_positions = not is_rotary and not get("no_position_embedding")
        has_bias = not get("disable_bias_linear")
        return cls(
            num_layers=get("num_layers"),
            hidden=hidden,
            heads=heads,
            groups=get("num_query_groups") if get("group_query_attention") else heads,
            head_dim=get("kv_channels") or hidden // heads,
            ffn=get("ffn_hidden_size") or _default_ffn(hidden, is_gated=get("swiglu")),
            vocab=vocab,
            is_gated=get("swiglu"),
            is_tied=not get("untie_embeddings_and_output_weights"),
            has_bias=has_bias,
            has_qkv_bias=has_bias or get("add_qkv_bias"),
            has_qk_norm=get("qk_layernorm"),
            has_norm_bias=get("normalization") == "LayerNorm",
            num_positions=get("max_position_embeddings") if has_positions else 0,
        )

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Elements of one layer's weight matrices."""
        queries_and_keys = self.hidden * (self.attention_width + 2 * self.groups * self.head_dim)
        feed_forward = (3 if self.is_gated else 2) * self.hidden * self.ffn
        return queries_and_keys + self.attention_width * self.hidden + feed_forward

    @property
    def layer_vectors(self) -> int:
        """Elements of one layer's biases and norms."""
        norm = 2 if self.has_norm_bias else 1
        count = 2 * norm * self.hidden
        if self.has_qk_norm:
            count += 2 * norm * self.head_dim
        if self.has_qkv_bias:
            count += self.attention_width + 2 * self.groups * self.head_dim
        if self.has_bias:
            count += 2 * self.hidden + (2 if self.is_gated else 1) * self.ffn
        return count


def num_parameters(options: Mapping[str, Any], vocab_size: int | None = None) -> int:
    """Return the exact number of parameters of the model that Megatron options describe.

    Raises:
        ConfigError: the model is not a dense decoder, or a number is missing.
    """
    sizes = Dimensions.of(options, vocab_size)
    embedding = sizes.vocab * sizes.hidden * (1 if sizes.is_tied else 2) + sizes.num_positions * sizes.hidden
    final_norm = sizes.hidden * (2 if sizes.has_norm_bias else 1)
    return sizes.num_layers * (sizes.layer_matrices + sizes.layer_vectors) + embedding + final_norm


def flops_per_token(options: Mapping[str, Any], vocab_size: int | None = None) -> float:
    """Return the floating-point operations of one training step per token.

    Forward and backward without recomputation, matrix products only, two operations per multiply-add, the
    causal half of the attention: the same count as Megatron's own.

    Raises:
        ConfigError: the model is not a dense decoder, or a number is missing.
    """
    sizes = Dimensions.of(options, vocab_size)
    length = options.get("seq_length")
    if length is None:
        raise _problem("seq_length is needed; attention grows with it")
    products = sizes.num_layers * sizes.layer_matrices + sizes.hidden * sizes.vocab
    attention = sizes.num_layers * sizes.attention_width * int(length)
    return 6.0 * (products + attention)


def _getter(options: Mapping[str, Any]) -> Any:
    """Return a function that gives an option's value, or Megatron's default; switches not given are off."""
    table = option_table("megatron").options

    def get(name: str) -> Any:
        value = options.get(name)
        if value is None:
            return False if table[name].is_switch else table[name].default
        return value

    return get


def _check_kind(get: Any) -> None:
    """Refuse models these formulae do not describe."""
    for name in _OTHER_KINDS:
        if get(name):
            raise _problem(f"sizes are known for dense decoders only ({name} is set)")
    for name in _NEEDED:
        if get(name) is None:
            raise _problem(f"{name} is needed")


def _default_ffn(hidden: int, *, is_gated: bool) -> int:
    """Return the feed-forward width Megatron takes when none is given."""
    return int((4 * hidden * 2 / 3) / 64) * 64 if is_gated else 4 * hidden


def _problem(message: str) -> ConfigError:
    return ConfigError([Problem(code="config/model", message=message)])
