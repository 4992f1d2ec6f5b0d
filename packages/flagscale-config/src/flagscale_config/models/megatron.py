"""A model read from Megatron options, as `GPTModel` builds it, and written as such."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.models.facts import ModelFacts
from flagscale_config.models.parts import Attention, Experts, GroupedAttention, LatentAttention, Rwkv7
from flagscale_config.options import option_table

__all__ = [
    "ffn_size_by_multiple",
    "flops_per_token",
    "kv_cache_bytes_per_token",
    "num_active_parameters",
    "num_parameters",
    "read",
    "write",
]

_OTHER_KINDS = {
    "hybrid_layer_pattern": "hybrid models",
    "hybrid_override_pattern": "hybrid models",
    "is_hybrid_model": "hybrid models",
    "experimental_attention_variant": "linear and sparse attention",
    "heterogeneous_layers_config_path": "models with different layers",
    "heterogeneous_layers_config_encoded_json": "models with different layers",
    "moe_latent_size": "experts in a latent space",
    "mtp_use_repeated_layer": "repeated prediction layers",
}
_ACTIVATIONS = {"swiglu": "silu", "quick_geglu": "quick_gelu", "squared_relu": "sqrelu"}
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads")


def num_parameters(options: Mapping[str, Any], vocab_size: int | None = None) -> int:
    """Return the exact number of parameters of the model that Megatron options describe.

    All that Megatron builds: modules for multi-token prediction are counted; the bias that balances experts
    is a buffer and is not. Where latent attention does not compress queries, Megatron 0.19.2 with
    Transformer Engine has one more norm of `hidden_size` per layer than published models have and than is
    counted here. `vocab_size` counts the rows of the embedding where the options do not say it.

    Raises:
        ConfigError: the model is of a kind not described here, or a number is missing.
    """
    facts = read(options, vocab_size)
    return facts.num_parameters + facts.num_mtp_parameters


def num_active_parameters(options: Mapping[str, Any], vocab_size: int | None = None) -> int:
    """Return the parameters that one token meets, embeddings included, multi-token prediction not.

    Raises:
        ConfigError: the model is of a kind not described here, or a number is missing.
    """
    return read(options, vocab_size).num_active_parameters


def flops_per_token(options: Mapping[str, Any], vocab_size: int | None = None) -> float:
    """Return the floating-point operations of one training step per token.

    See `ModelFacts.flops_per_token`; the length is `seq_length`.

    Raises:
        ConfigError: the model is of a kind not described here, or a number is missing.
    """
    length = options.get("seq_length")
    if length is None:
        read(options, vocab_size)
        raise _problem("seq_length is needed; attention grows with it")
    return read(options, vocab_size).flops_per_token(int(length))


def kv_cache_bytes_per_token(options: Mapping[str, Any], bytes_per_element: float = 2) -> float:
    """Return the bytes of keys and values that serving the trained model takes per token.

    Raises:
        ConfigError: the model is of a kind not described here, or a number is missing.
    """
    return read(options).kv_cache_bytes_per_token(bytes_per_element)


def ffn_size_by_multiple(hidden_size: int, multiple_of: int, multiplier: float = 1.0) -> int:
    """Return the feed-forward width that FlagScale's `multiple_of` and `hidden_dim_multiplier` mean.

    Two thirds of four hidden sizes, times the multiplier, rounded up to a multiple; FlagScale applies it
    where `ffn_hidden_size` is not given (Aquila: 4096 by 256 is 11008).
    """
    width = int(int(4 * hidden_size * 2 / 3) * multiplier)
    return multiple_of * -(-width // multiple_of)


Get = Callable[[str], Any]


def read(options: Mapping[str, Any], vocab_size: int | None = None) -> ModelFacts:
    """Return the facts of the model that `GPTModel` would be; see `ModelFacts.from_megatron`."""
    get = _getter(options)
    _check_kind(get)
    has_bias = not get("disable_bias_linear")
    is_gated = bool(get("swiglu") or get("quick_geglu"))
    ffn = get("ffn_hidden_size") or _default_ffn(options, get("hidden_size"), is_gated=get("swiglu"))
    mtp = get("mtp_num_layers") or 0
    return ModelFacts(
        hidden_size=get("hidden_size"),
        num_layers=get("num_layers"),
        vocab_size=vocab_size or _vocabulary(get),
        ffn_size=ffn,
        attention=_attention(get, has_bias=has_bias),
        experts=_experts(get, ffn, has_bias=has_bias),
        num_mtp_layers=mtp,
        is_gated=is_gated,
        activation=_activation(get),
        has_ffn_bias=has_bias,
        normalization=get("normalization"),
        norm_eps=get("norm_epsilon"),
        is_tied=not get("untie_embeddings_and_output_weights"),
        max_positions=get("max_position_embeddings"),
        **_positions(get),
    )


def write(facts: ModelFacts) -> dict[str, Any]:
    """Return the Megatron options that describe a language model; see `ModelFacts.to_megatron`."""
    attention = facts.attention
    if isinstance(attention, Rwkv7) or facts.linear_attention or facts.norms_per_layer != 2:
        raise _problem(f"{facts.name or 'the model'}: Megatron's GPTModel cannot be this model")
    options: dict[str, Any] = {
        "num_layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "num_attention_heads": attention.num_heads,
        **(_write_latent(attention) if isinstance(attention, LatentAttention) else _write_grouped(attention)),
        "normalization": facts.normalization,
        "norm_epsilon": facts.norm_eps,
        **{name: True for name, activation in _ACTIVATIONS.items() if facts.activation == activation},
        "disable_bias_linear": not facts.has_ffn_bias,
        "untie_embeddings_and_output_weights": not facts.is_tied,
        **_write_positions(facts),
    }
    if facts.experts is None or facts.experts.dense_layers:
        options["ffn_hidden_size"] = facts.ffn_size
    if facts.experts is not None:
        options |= _write_experts(facts.experts, facts.num_layers)
    if facts.num_mtp_layers:
        options["mtp_num_layers"] = facts.num_mtp_layers
    if facts.vocab_size is not None:
        options["padded_vocab_size"] = facts.vocab_size
    return options


def _write_grouped(attention: GroupedAttention) -> dict[str, Any]:
    return {
        "group_query_attention": attention.num_kv_heads != attention.num_heads,
        "num_query_groups": attention.num_kv_heads,
        "kv_channels": attention.head_dim,
        "add_qkv_bias": attention.has_qkv_bias,
        "qk_layernorm": attention.has_qk_norm,
    }


def _write_latent(attention: LatentAttention) -> dict[str, Any]:
    options = {
        "multi_latent_attention": True,
        "kv_lora_rank": attention.kv_rank,
        "qk_head_dim": attention.nope_dim,
        "qk_pos_emb_head_dim": attention.rope_dim,
        "v_head_dim": attention.v_dim,
        "qk_layernorm": attention.has_latent_norm,
    }
    return options if attention.q_rank is None else {"q_lora_rank": attention.q_rank, **options}


def _write_experts(experts: Experts, num_layers: int) -> dict[str, Any]:
    pattern = [int(layer not in experts.dense_layers) for layer in range(num_layers)]
    options: dict[str, Any] = {
        "num_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_layer_freq": "+".join(f"[{kind}]*{len(list(run))}" for kind, run in groupby(pattern))
        if experts.dense_layers
        else "1",
        "moe_router_score_function": experts.score_function,
        "moe_router_enable_expert_bias": experts.has_expert_bias,
    }
    if experts.shared_size:
        options["moe_shared_expert_intermediate_size"] = experts.shared_size
        options["moe_shared_expert_gate"] = experts.has_shared_gate
    if experts.scaling_factor != 1:
        options["moe_router_topk_scaling_factor"] = experts.scaling_factor
    if experts.num_groups != 1:
        options["moe_router_num_groups"] = experts.num_groups
        options["moe_router_group_topk"] = experts.groups_per_token
    return options


def _write_positions(facts: ModelFacts) -> dict[str, Any]:
    if facts.rope_theta is None:
        return {"position_embedding_type": "learned_absolute" if facts.num_learned_positions else "none"}
    is_latent = isinstance(facts.attention, LatentAttention)
    options: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": int(facts.rope_theta)}
    if facts.rope_percent != 1:
        options["rotary_percent"] = facts.rope_percent
    scaling = facts.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind == "mrope":
        options |= {"position_embedding_type": "mrope", "mrope_section": tuple(scaling["mrope_section"])}
    elif kind == "llama3":
        options |= {"use_rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}
    elif kind == "yarn":
        options |= {"rotary_scaling_factor": float(scaling["factor"])}
        options |= {key: scaling[key] for key in ("mscale", "mscale_all_dim") if is_latent and key in scaling}
        options |= {} if is_latent else {"position_embedding_type": "yarn"}
    if is_latent:
        options["rope_type"] = "yarn" if kind == "yarn" else "rope"
    return options


def _getter(options: Mapping[str, Any]) -> Get:
    """Return a function that gives an option's value, or Megatron's default; switches not given are off."""
    table = option_table("megatron").options

    def get(name: str) -> Any:
        value = options.get(name)
        if value is not None or name not in table:
            return value
        return False if table[name].is_switch else table[name].default

    return get


def _check_kind(get: Get) -> None:
    """Refuse models these formulae do not describe."""
    for name, kind in _OTHER_KINDS.items():
        if get(name):
            raise _problem(f"sizes of {kind} are not known ({name} is set)")
    for name in _NEEDED:
        if get(name) is None:
            raise _problem(f"{name} is needed")


def _vocabulary(get: Get) -> int | None:
    """Return the rows of the embedding, padded as Megatron pads them, where options say how many."""
    if get("padded_vocab_size"):
        return int(get("padded_vocab_size"))
    if not get("vocab_size"):
        return None
    multiple = get("make_vocab_size_divisible_by") * (get("tensor_model_parallel_size") or 1)
    return int(multiple * math.ceil(get("vocab_size") / multiple))


def _default_ffn(options: Mapping[str, Any], hidden: int, *, is_gated: bool) -> int:
    """Return the feed-forward width when none is given: FlagScale's rule, else Megatron's."""
    if options.get("multiple_of"):
        return ffn_size_by_multiple(
            hidden, options["multiple_of"], options.get("hidden_dim_multiplier") or 1.0
        )
    return int((4 * hidden * 2 / 3) / 64) * 64 if is_gated else 4 * hidden


def _attention(get: Get, *, has_bias: bool) -> Attention:
    heads = get("num_attention_heads")
    if get("multi_latent_attention"):
        return LatentAttention(
            num_heads=heads,
            q_rank=get("q_lora_rank"),
            kv_rank=get("kv_lora_rank"),
            nope_dim=get("qk_head_dim"),
            rope_dim=get("qk_pos_emb_head_dim"),
            v_dim=get("v_head_dim"),
            has_latent_norm=bool(get("qk_layernorm")),
            has_out_bias=has_bias,
        )
    return GroupedAttention(
        num_heads=heads,
        num_kv_heads=get("num_query_groups") if get("group_query_attention") else heads,
        head_dim=get("kv_channels") or get("hidden_size") // heads,
        has_qkv_bias=bool(has_bias or get("add_qkv_bias")),
        has_out_bias=has_bias,
        has_qk_norm=bool(get("qk_layernorm")),
        has_gate=bool(get("attention_output_gate")),
    )


def _experts(get: Get, ffn: int, *, has_bias: bool) -> Experts | None:
    if not get("num_experts"):
        return None
    layers, pattern = get("num_layers"), get("moe_layer_freq")
    if isinstance(pattern, str):
        pattern = _pattern(pattern)
    if isinstance(pattern, int):
        pattern = [int(layer % pattern == 0) for layer in range(layers)]
    if len(pattern) != layers:
        raise _problem(f"moe_layer_freq describes {len(pattern)} layers; num_layers is {layers}")
    coefficient = get("moe_aux_loss_coeff")
    return Experts(
        num_experts=get("num_experts"),
        experts_per_token=get("moe_router_topk"),
        ffn_size=get("moe_ffn_hidden_size") or ffn,
        shared_size=get("moe_shared_expert_intermediate_size") or 0,
        has_shared_gate=bool(get("moe_shared_expert_intermediate_size") and get("moe_shared_expert_gate")),
        dense_layers=tuple(layer for layer, is_moe in enumerate(pattern) if not is_moe),
        score_function=get("moe_router_score_function"),
        scaling_factor=get("moe_router_topk_scaling_factor") or 1.0,
        num_groups=get("moe_router_num_groups") or 1,
        groups_per_token=get("moe_router_group_topk") or 1,
        has_expert_bias=bool(get("moe_router_enable_expert_bias")),
        aux_loss_coeff=coefficient[0] if isinstance(coefficient, (list, tuple)) else coefficient,
        has_bias=has_bias,
    )


def _pattern(text: str) -> Any:
    """Return the number or list that a layer pattern such as `([0]+[1]*26)` means."""
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        value = 0
    if not value:
        raise _problem(f"moe_layer_freq: {text!r} is neither a number nor a list of 0 and 1")
    return value


def _value(node: ast.expr) -> Any:
    """Evaluate numbers, lists, sums of lists and multiples of lists, and nothing else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and {type(left), type(right)} == {int, list}:
            count, items = (left, right) if isinstance(left, int) else (right, left)
            if count * len(items) <= 100_000:
                return count * items
    raise ValueError


def _activation(get: Get) -> str:
    return next((activation for name, activation in _ACTIVATIONS.items() if get(name)), "gelu")


def _positions(get: Get) -> dict[str, Any]:
    """Return the fields of `ModelFacts` about positions."""
    kind = get("position_embedding_type")
    if get("use_rotary_position_embeddings"):
        kind = "rope"
    if kind == "learned_absolute":
        count = 0 if get("no_position_embedding") else get("max_position_embeddings")
        return {"num_learned_positions": count or 0}
    if kind not in {"rope", "yarn", "mrope"}:
        return {}
    fields: dict[str, Any] = {"rope_theta": float(get("rotary_base")), "rope_percent": get("rotary_percent")}
    return {**fields, "rope_scaling": _scaling(get, kind)}


def _scaling(get: Get, kind: str) -> dict[str, Any] | None:
    """Return how positions are scaled, in the words of `config.json`."""
    if kind == "mrope":
        return {"rope_type": "mrope", "mrope_section": list(get("mrope_section") or ())}
    if get("use_rope_scaling"):
        return {"rope_type": "llama3", "factor": get("rope_scaling_factor")}
    is_latent = get("multi_latent_attention")
    is_yarn = kind == "yarn" or (is_latent and (get("rope_type") or "yarn") == "yarn")
    if is_yarn and get("rotary_scaling_factor") != 1:
        scales = {"mscale": get("mscale"), "mscale_all_dim": get("mscale_all_dim")} if is_latent else {}
        return {"rope_type": "yarn", "factor": get("rotary_scaling_factor"), **scales}
    return None


def _problem(message: str) -> ConfigError:
    return ConfigError([Problem(code="config/model", message=message)])
