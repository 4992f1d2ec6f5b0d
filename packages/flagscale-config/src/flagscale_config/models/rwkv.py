"""RWKV-7 read from the options of a training file whose entrypoint is FlagScale's `train_rwkv.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.models.catalogue import names, published
from flagscale_config.models.facts import ModelFacts
from flagscale_config.models.parts import Rwkv7

__all__ = ["read", "write"]

_HEAD_DIM = 64  # of every RWKV-7; FlagScale's script does not read num_attention_heads
_RULE = {"decay_rank": 2.5, "a_rank": 2.5, "v_rank": 1.7, "gate_rank": 5.0}
"""What FlagScale's script multiplies the root of the width with, to round it to a multiple of 32."""


def read(options: Mapping[str, Any], vocab_size: int | None = None) -> ModelFacts:
    """Return the facts of the RWKV-7 that Megatron's options mean to FlagScale's script.

    No option tells the low ranks: those of the released model of this width are taken, or FlagScale's rule
    where none was released.

    Raises:
        ConfigError: a number is missing.
    """
    for name in ("num_layers", "hidden_size"):
        if options.get(name) is None:
            raise ConfigError([Problem(code="config/model", message=f"{name} is needed")])
    hidden = options["hidden_size"]
    return ModelFacts(
        hidden_size=hidden,
        num_layers=options["num_layers"],
        vocab_size=vocab_size or options.get("padded_vocab_size") or options.get("vocab_size"),
        ffn_size=options.get("ffn_hidden_size") or 4 * hidden,
        attention=Rwkv7(num_heads=hidden // _HEAD_DIM, head_dim=_HEAD_DIM, **_ranks(hidden)),
        is_gated=False,
        activation="sqrelu",
        normalization="LayerNorm",
        norm_eps=options.get("norm_epsilon") or 1e-5,
        max_positions=options.get("max_position_embeddings"),
    )


def write(facts: ModelFacts) -> dict[str, Any]:
    """Return the options that FlagScale's script reads, without what is the same for every RWKV-7."""
    options = {
        "num_layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "ffn_hidden_size": facts.ffn_size,
        "norm_epsilon": facts.norm_eps,
    }
    return options if facts.vocab_size is None else {**options, "padded_vocab_size": facts.vocab_size}


def _ranks(hidden: int) -> dict[str, int]:
    for name in names():
        facts = published(name)
        if isinstance(facts.attention, Rwkv7) and facts.hidden_size == hidden:
            return {rank: getattr(facts.attention, rank) for rank in _RULE}
    return {rank: max(32, round(factor * hidden**0.5 / 32) * 32) for rank, factor in _RULE.items()}
