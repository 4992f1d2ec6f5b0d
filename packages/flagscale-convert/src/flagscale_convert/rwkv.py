"""RWKV-7 (x070, arXiv 2503.14456): its rules and its configuration. It has a recurrent state, not attention.

Names on the Hugging Face side are those of flash-linear-attention's `RWKV7ForCausalLM` (`fla.models.rwkv7`),
as published under fla-hub/rwkv7-*. Names on the trainer's side are those of FlagScale's `RWKVModel`
(`flagscale/train/models/rwkv`), which has BlinkDL's modules in dictionaries of its own. There the low-rank
matrices multiply from the right, here they are weights of linear layers: each is the other's transpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_convert.architecture import Architecture, Recurrence
from flagscale_convert.description import Description
from flagscale_convert.errors import Unsupported
from flagscale_convert.rules import Copy, Rule, Size, Vocab, Zeros
from flagscale_convert.tensors import TensorInfo

__all__ = ["RWKV7", "RWKV7_RULES", "RWKV7_UNUSED"]

_HF = "model.layers.{i}."
_MC = "blocks.block_{i}."
_FIRST = "blocks.block_0."
_FAMILY = "rwkv7"
_HEAD_SIZE = 64
_EPSILON = 1e-5
_FFN = 4
"""Width of the channel mix over that of the model; like the two above, fixed in FlagScale's class."""
_RANK_STEP = 32
_RANKS = {
    "w": ("decay_low_rank_dim", "decay_rank", 2.5),
    "a": ("a_low_rank_dim", "rate_rank", 2.5),
    "v": ("v_low_rank_dim", "value_rank", 1.7),
    "g": ("gate_low_rank_dim", "gate_rank", 5.0),
}
"""By letter: field of `config.json`, ours, and what FlagScale's class multiplies the root of the width by."""
RWKV7_UNUSED = tuple(f"model.layers.0.attn.v_lora.lora.{part}" for part in ("0.weight", "2.weight", "2.bias"))
"""The first layer's value is what later ones mix in: it needs no low-rank pair to mix by."""


def _one(_arch: Architecture) -> int:
    return 1


def _hidden(arch: Architecture) -> int:
    return arch.hidden_size


def _heads(arch: Architecture) -> int:
    return arch.num_heads


def _head(arch: Architecture) -> int:
    return arch.head_size


def _ffn(arch: Architecture) -> int:
    return arch.ffn_size


def _wide(arch: Architecture) -> tuple[int, ...]:
    """Axes of a mixing factor: it is applied to (batch, time, width)."""
    return (1, 1, arch.hidden_size)


def _rank(letter: str) -> Size:
    name = _RANKS[letter][1]
    return lambda arch: 0 if arch.recurrence is None else getattr(arch.recurrence, name)


def _vector(hf: str, megatron: str, **options: Any) -> Rule:
    """Give the rule of a vector that FlagScale keeps with two leading axes of one."""
    return Rule((_HF + hf,), _MC + megatron, Copy(_hidden), shape=_wide, **options)


def _matrix(hf: str, megatron: str, rows: Size, columns: Size) -> Rule:
    return Rule((f"{_HF}{hf}.weight",), f"{_MC}{megatron}.weight", Copy(rows), columns)


def _norm(hf: str, megatron: str) -> tuple[Rule, ...]:
    return tuple(Rule((f"{hf}.{kind}",), f"{megatron}.{kind}", Copy(_hidden)) for kind in ("weight", "bias"))


def _low_rank(letter: str, *, has_bias: bool = True) -> tuple[Rule, ...]:
    """Give the rules of a low-rank pair; that of the value is not in the first layer."""
    hf, megatron = f"attn.{letter}_lora.lora.", f"att.{letter}"
    options: dict[str, Any] = {"layers": "later"} if letter == "v" else {}
    rank = _rank(letter)
    return (
        Rule(
            (f"{_HF}{hf}0.weight",), f"{_MC}{megatron}1", Copy(rank), _hidden, is_transposed=True, **options
        ),
        Rule(
            (f"{_HF}{hf}2.weight",), f"{_MC}{megatron}2", Copy(_hidden), rank, is_transposed=True, **options
        ),
        *((_vector(hf + "2.bias", megatron + "0", **options),) if has_bias else ()),
    )


RWKV7_RULES = (
    Rule(("model.embeddings.weight",), "embeddings.word_embeddings.weight", Vocab(), _hidden),
    *_norm("model.layers.0.pre_norm", _FIRST + "ln0"),
    # FlagScale's class has the pair in its first layer too, and demands it when it loads.
    Rule((), _FIRST + "att.v0", Zeros(_one), lambda arch: (1, arch.hidden_size)),
    Rule((), _FIRST + "att.v1", Zeros(_hidden), _rank("v")),
    Rule((), _FIRST + "att.v2", Zeros(_rank("v")), _hidden),
    *_norm(_HF + "attn_norm", _MC + "ln1"),
    *(
        Rule(
            (f"{_HF}attn.x_{letter}",), f"{_MC}att.x_{letter}", Copy(_one), lambda arch: (1, arch.hidden_size)
        )
        for letter in "rwkvag"
    ),
    _vector("attn.k_k", "att.k_k"),
    _vector("attn.k_a", "att.k_a"),
    Rule((_HF + "attn.r_k",), _MC + "att.r_k", Copy(_heads), _head),
    *(
        _matrix(f"attn.{hf}_proj", f"att.{megatron}", _hidden, _hidden)
        for hf, megatron in (("r", "receptance"), ("k", "key"), ("v", "value"), ("o", "output"))
    ),
    *_low_rank("w"),
    *_low_rank("a"),
    *_low_rank("v"),
    *_low_rank("g", has_bias=False),
    *_norm(_HF + "attn.g_norm", _MC + "att.ln_x"),
    *_norm(_HF + "ffn_norm", _MC + "ln2"),
    _vector("ffn.x_k", "ffn.x_k"),
    _matrix("ffn.key", "ffn.key", _ffn, _hidden),
    _matrix("ffn.value", "ffn.value", _hidden, _ffn),
    *_norm("model.norm", "ln_out"),
    Rule(("lm_head.weight",), "head.weight", Vocab(), _hidden),
)


def _size(values: Mapping[str, Any], name: str, where: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Unsupported(f"{where}: {name} ({value!r}): a positive integer is needed")
    return value


def _width(values: Mapping[str, Any], where: str) -> int:
    hidden = _size(values, "hidden_size", where)
    if hidden % _HEAD_SIZE:
        raise Unsupported(
            f"{where}: hidden_size ({hidden}): must be a multiple of {_HEAD_SIZE}, the size of a head"
        )
    return hidden


def _built_rank(letter: str, hidden: int) -> int:
    """Give the width of a low-rank pair in FlagScale's class, which no option changes."""
    rounded = round(_RANKS[letter][2] * hidden**0.5 / _RANK_STEP) * _RANK_STEP
    return max(_RANK_STEP, rounded)


def _compared(found: Recurrence, hidden: int, notes: list[str]) -> Recurrence:
    """Tell when FlagScale's class, as it is, would not have these low ranks."""
    names = {letter: ours for letter, (_, ours, _) in _RANKS.items()}
    differing = [
        f"{names[letter].partition('_')[0]} {getattr(found, names[letter])} (built {built})"
        for letter in _RANKS
        if (built := _built_rank(letter, hidden)) != getattr(found, names[letter])
    ]
    if differing:
        notes.append(
            f"low ranks: {', '.join(differing)}: no option tells them, FlagScale's class derives its own"
            f" from hidden_size ({hidden}) and must be built with these to load the weights"
        )
    return found


def _architecture(**numbers: Any) -> Architecture:
    """Fill in what every RWKV-7 has, or has not."""
    heads = numbers["hidden_size"] // _HEAD_SIZE
    return Architecture(
        family=_FAMILY,
        ffn_size=_FFN * numbers["hidden_size"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=_HEAD_SIZE,
        norm_epsilon=_EPSILON,
        rope_theta=0.0,
        rope_scaling=None,
        is_tied=False,
        has_qkv_bias=False,
        has_qk_norm=False,
        **numbers,
    )


def _init_std(values: Mapping[str, Any], name: str) -> float:
    """Read what weights were drawn with: said by no tensor, used by neither class."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and value > 0 else 0.02


def _read_config(
    config: Mapping[str, Any], *, vocab_divisor: int, where: str, notes: list[str]
) -> Architecture:
    hidden, layers = _width(config, where), _size(config, "num_hidden_layers", where)
    vocab = _size(config, "vocab_size", where)
    # flash-linear-attention derives the widths that are not given from that of the model.
    ffn = "hidden_ratio" if config.get("intermediate_size") is None else "intermediate_size"
    for name, allowed in (
        ("num_heads", (hidden // _HEAD_SIZE,)),
        ("value_dim", (hidden, [hidden] * layers)),
        (ffn, (_FFN,) if ffn == "hidden_ratio" else (_FFN * hidden,)),
    ):
        value = config.get(name)
        if value is not None and value not in allowed:
            raise Unsupported(
                f"{where}: {name} ({value}): FlagScale's RWKVModel of hidden_size {hidden} has {allowed[0]}:"
                " this model cannot be converted"
            )
    ranks = {ours: _size(config, name, where) for name, ours, _ in _RANKS.values()}
    return _architecture(
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocab,
        padded_vocab_size=-(-vocab // vocab_divisor) * vocab_divisor,
        max_positions=_size(config, "max_position_embeddings", where),
        init_std=_init_std(config, "initializer_range"),
        recurrence=_compared(Recurrence(**ranks), hidden, notes),
    )


def _write_config(arch: Architecture) -> dict[str, Any]:
    return {
        "attn": None,
        "attn_mode": "chunk",
        "head_dim": arch.head_size,
        "hidden_act": "sqrelu",
        "hidden_ratio": float(_FFN),
        "hidden_size": arch.hidden_size,
        "initializer_range": arch.init_std,
        "intermediate_size": arch.ffn_size,
        "max_position_embeddings": arch.max_positions,
        "norm_bias": True,
        "norm_eps": arch.norm_epsilon,
        "norm_first": True,
        "num_hidden_layers": arch.num_layers,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": arch.vocab_size,
        **{name: getattr(arch.recurrence, ours) for name, ours, _ in _RANKS.values()},
    }


def _read_args(
    args: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    vocab_size: int,
    padded_vocab_size: int,
    where: str,
    notes: list[str],
) -> Architecture:
    """Read what FlagScale's class reads; all else means nothing to it, the number of heads included."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if (args.get(name) or 1) != 1:
            raise Unsupported(f"{where}: {name} ({args[name]}): FlagScale's RWKVModel has no parallel layers")
    hidden = _width(args, where)
    ranks = {
        ours: _measured(tensors, f".att.{letter}1", _built_rank(letter, hidden))
        for letter, (_, ours, _) in _RANKS.items()
    }
    return _architecture(
        num_layers=_size(args, "num_layers", where),
        hidden_size=hidden,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        max_positions=_size(args, "max_position_embeddings", where),
        init_std=_init_std(args, "init_method_std"),
        recurrence=_compared(Recurrence(**ranks), hidden, notes),
    )


def _measured(tensors: Mapping[str, TensorInfo], end: str, default: int) -> int:
    """Give the columns of the first matrix whose name ends so."""
    shapes = (info.shape for name, info in tensors.items() if name.endswith(end))
    return next((shape[1] for shape in shapes if len(shape) == 2), default)


def _write_args(arch: Architecture) -> dict[str, Any]:
    return {
        "kv_channels": arch.head_size,
        "normalization": "LayerNorm",
        "position_embedding_type": "none",
        "squared_relu": True,
        "swiglu": False,
        "tokenizer_type": None,
    }


RWKV7 = Description(
    trainer="FlagScale's RWKVModel",
    mark=_FIRST + "att.x_r",
    fields=frozenset(
        {
            "hidden_ratio",
            "hidden_size",
            "initializer_range",
            "intermediate_size",
            "max_position_embeddings",
            "num_heads",
            "num_hidden_layers",
            "value_dim",
            "vocab_size",
            *(name for name, _, _ in _RANKS.values()),
        }
    ),
    only={
        "attn": (None,),
        "head_dim": (_HEAD_SIZE,),
        "hidden_act": ("sqrelu",),
        "norm_bias": (True,),
        "norm_eps": (_EPSILON,),
        "norm_first": (True,),
        "tie_word_embeddings": (False, None),
    },
    harmless=frozenset(
        {
            "_attn_implementation_autoset",
            "attn_mode",
            "fuse_cross_entropy",
            "fuse_linear_cross_entropy",
            "fuse_norm",
            "use_l2warp",
        }
    ),
    read_config=_read_config,
    write_config=_write_config,
    read_args=_read_args,
    write_args=_write_args,
    levels=r"(embeddings\.word_embeddings|ln_out|head)\.(.+)|(blocks)\.(block_\d+)\.(.+)",
)
