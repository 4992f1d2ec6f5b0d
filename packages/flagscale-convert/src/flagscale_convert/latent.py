"""Latent attention and the layers that predict further tokens, in `config.json` and in Megatron's arguments.

Both come with the DeepSeek-V3 family (DeepSeek-V3, R1, Moonlight, Kimi-K2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_convert.architecture import Architecture, LatentAttention
from flagscale_convert.errors import Unsupported

__all__ = [
    "LATENT_FIELDS",
    "read_args_latent",
    "read_args_mtp_layers",
    "read_config_latent",
    "read_mtp_layers",
    "write_args_latent",
    "write_config_latent",
]

_SIZES = {
    "kv_lora_rank": ("kv_lora_rank", "kv_rank"),
    "qk_nope_head_dim": ("qk_head_dim", "plain_size"),
    "qk_rope_head_dim": ("qk_pos_emb_head_dim", "rotary_size"),
    "v_head_dim": ("v_head_dim", "value_size"),
}
"""Hugging Face name to Megatron's name and ours."""
LATENT_FIELDS: Mapping[str, frozenset[str]] = {
    "deepseek_v3": frozenset(
        {*_SIZES, "q_lora_rank", "num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim"}
    )
}
"""Fields of `config.json` read here, by family."""
_LATENT_EPSILON = 1e-6


def read_config_latent(
    config: Mapping[str, Any], family: str, *, where: str, notes: list[str]
) -> LatentAttention | None:
    """Read the latent attention of a `config.json`; None for families without.

    Raises:
        Unsupported: a size is missing, or heads are grouped.
    """
    if family not in LATENT_FIELDS:
        return None
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise Unsupported(
            f"{where}: num_key_value_heads ({kv_heads}): latent attention has as many as"
            f" num_attention_heads ({heads})"
        )
    epsilon = config.get("rms_norm_eps")
    if epsilon not in (None, _LATENT_EPSILON):
        notes.append(
            f"rms_norm_eps ({epsilon}): transformers keeps {_LATENT_EPSILON} in the norms of the latents,"
            " Megatron has one value for all norms: outputs differ by about as much"
        )
    rank = config.get("q_lora_rank")
    return LatentAttention(
        query_rank=None if rank is None else _size(config, "q_lora_rank", where),
        **{ours: _size(config, name, where) for name, (_, ours) in _SIZES.items()},
    )


def _size(values: Mapping[str, Any], name: str, where: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Unsupported(f"{where}: {name} ({value!r}): a positive integer is needed")
    return value


def read_mtp_layers(config: Mapping[str, Any], *, where: str) -> int:
    """Read how many layers predict further tokens, by the published name or by transformers 5's.

    Raises:
        Unsupported: not a count.
    """
    value = config.get("num_nextn_predict_layers", config.get("num_mtp_layers")) or 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Unsupported(f"{where}: num_nextn_predict_layers ({value!r}): 0 or a positive integer is needed")
    return value


def write_config_latent(arch: Architecture) -> dict[str, Any]:
    """Write the fields of `config.json` about latent attention; empty without."""
    if arch.latent is None:
        return {}
    return {
        "num_nextn_predict_layers": arch.mtp_layers,
        "q_lora_rank": arch.latent.query_rank,
        **{name: getattr(arch.latent, ours) for name, (_, ours) in _SIZES.items()},
    }


def read_args_latent(args: Mapping[str, Any], *, where: str) -> LatentAttention | None:
    """Read the latent attention of saved arguments; None when there is none.

    Raises:
        Unsupported: a size is missing, heads are grouped, or the latents have no norm.
    """
    if not args.get("multi_latent_attention"):
        return None
    for name, needed in (("group_query_attention", False), ("qk_layernorm", True), ("add_qkv_bias", False)):
        if bool(args.get(name)) is not needed:
            raise Unsupported(
                f"{where}: {name} ({args.get(name)}) with multi_latent_attention: only {needed} can be"
                " converted: no Hugging Face family computes this"
            )
    rank = args.get("q_lora_rank")
    return LatentAttention(
        query_rank=None if rank is None else _size(args, "q_lora_rank", where),
        **{ours: _size(args, name, where) for _, (name, ours) in _SIZES.items()},
    )


def read_args_mtp_layers(args: Mapping[str, Any], latent: LatentAttention | None, *, where: str) -> int:
    """Read how many layers predict further tokens.

    Raises:
        Unsupported: a count no Hugging Face family has.
    """
    layers = args.get("mtp_num_layers") or 0
    if not layers:
        return 0
    if latent is None or args.get("mtp_use_repeated_layer"):
        what = "mtp_use_repeated_layer" if latent is not None else "mtp_num_layers"
        raise Unsupported(
            f"{where}: {what} ({args[what]}): cannot be converted: of the families here only DeepSeek-V3"
            " has layers that predict further tokens, each with weights of its own"
        )
    return _size(args, "mtp_num_layers", where)


def write_args_latent(arch: Architecture) -> dict[str, Any]:
    """Write Megatron's arguments about latent attention and further-token layers."""
    written: dict[str, Any] = {
        "mtp_num_layers": arch.mtp_layers or None,
        "multi_latent_attention": arch.latent is not None,
    }
    if arch.latent is None:
        return written
    return written | {
        "q_lora_rank": arch.latent.query_rank,
        **{name: getattr(arch.latent, ours) for _, (name, ours) in _SIZES.items()},
        "qk_layernorm": True,
    }
