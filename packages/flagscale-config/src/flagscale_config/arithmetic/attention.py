"""Attention and positions: latent attention, rotary embeddings, multi-token prediction, kernels.

Twins of Megatron's `validate_args`, `core_transformer_config_from_args`, `TransformerConfig` and
`MLATransformerConfig`.
"""

from __future__ import annotations

from typing import Any

from flagscale_config.arithmetic.options import Check, Options, Rule, clashes, divisors, listed, needs
from flagscale_config.arithmetic.patterns import layer_pattern

__all__ = ["CHECKS"]

_VARIANT = "experimental_attention_variant"
_MTP_POSITIONS = ("rope", "none")


def _check_mtp(options: Options) -> None:
    depth, kind = options["mtp_num_layers"], options.given.get("position_embedding_type", "learned_absolute")
    if depth and kind not in _MTP_POSITIONS:
        # Megatron compares the option as it stands, before use_rotary_position_embeddings is read into it.
        message = f"needs position_embedding_type rope or none ({kind} given)"
        options.error("mtp_num_layers", message)


def _check_latent(options: Options) -> None:
    """Check multi-latent attention and the kind of rotary embedding."""
    is_latent, kind = options["multi_latent_attention"], options["rope_type"]
    is_fused = options.position == "rope" and not options["no_rope_fusion"]
    if not is_latent:
        if kind == "yarn":
            options.error("rope_type", "yarn needs multi_latent_attention; use position_embedding_type yarn")
        return
    if kind == "rope" and is_fused:
        options.error("rope_type", "rope needs no_rope_fusion where attention is latent; or use yarn")
    if options["cache_mla_latents"] and is_fused:
        options.error("cache_mla_latents", "needs no_rope_fusion")


def _check_rope_layers(options: Options) -> None:
    """Check which layers have no rotary embedding."""
    pattern, layers = options["no_rope_freq"], options["num_layers"]
    if pattern is None or layers is None:
        return
    try:
        found = layer_pattern(str(pattern))
    except ValueError as error:
        options.error("no_rope_freq", str(error))
        return
    if isinstance(found, list):
        if found and len(found) != layers:
            options.error("no_rope_freq", f"has {len(found)} layers of {layers}")
    elif found and layers % found:
        message = f"{found} does not divide {layers} layers; use one of {listed(divisors(layers))}"
        options.error("no_rope_freq", message)
    if found and options["flash_decode"]:
        options.error("flash_decode", "does not go with no_rope_freq")


def _check_linear(options: Options) -> None:
    """Check the heads of gated delta nets, which context parallelism divides as well."""
    if options[_VARIANT] != "gated_delta_net":
        return
    if options["linear_attention_freq"] is None:
        options.error(_VARIANT, "gated_delta_net needs linear_attention_freq")
    keys, values, size = (
        options["linear_num_key_heads"],
        options["linear_num_value_heads"],
        options.tp * options.cp,
    )
    if values % keys:
        allowed = listed(divisors(values))
        message = f"{values} value heads are not a multiple of {keys} key heads; use one of {allowed}"
        options.error("linear_num_key_heads", message)
    for name, heads in (("linear_num_key_heads", keys), ("linear_num_value_heads", values)):
        if heads % size:
            message = f"{heads} is not a multiple of tensor {options.tp} x context {options.cp} = {size}"
            options.error(name, message)


def _check_sparse(options: Options) -> None:
    """Check DeepSeek's sparse attention."""
    if options[_VARIANT] != "dsa":
        return
    if not options["disable_bias_linear"]:
        options.error(_VARIANT, "dsa needs disable_bias_linear")
    if options["dsa_indexer_topk_freq"] < 1:
        options.error(
            "dsa_indexer_topk_freq", "must be at least 1 ({dsa_indexer_topk_freq} given)".format_map(options)
        )
    kinds = {str(kind).replace("_", "").lower() for kind in options.values("cp_comm_type")}
    if options.cp > 1 and kinds != {"allgather"}:
        options.error("cp_comm_type", "dsa needs allgather")
    if options.position == "rope" and not options["no_rope_fusion"]:
        options.error(_VARIANT, "dsa needs no_rope_fusion")


def _is_invariant(options: Options, *wrong: Any) -> bool:
    return bool(options["batch_invariant_mode"]) and any(wrong)


_EXACT = "batch_invariant_mode"

CHECKS: tuple[Check, ...] = (
    _check_mtp,
    _check_latent,
    _check_rope_layers,
    _check_linear,
    _check_sparse,
    Rule(
        "position_embedding_type",
        lambda o: o.position == "mrope" and not o.has("mrope_section"),
        "mrope needs mrope_section",
    ),
    Rule(
        "position_embedding_type",
        lambda o: o.position == "relative" and o["transformer_impl"] != "transformer_engine",
        "relative needs transformer_impl transformer_engine ({transformer_impl} given)",
    ),
    Rule(
        "no_position_embedding",
        lambda o: o["no_position_embedding"] and o.position != "rope",
        "is the old form of position_embedding_type none; write that",
    ),
    *clashes("multi_latent_attention", "group_query_attention", "rotary_interleaved"),
    Rule(
        "multi_latent_attention",
        lambda o: o["multi_latent_attention"] and o["attention_output_gate"],
        "does not go with attention_output_gate",
    ),
    Rule(
        "multi_latent_attention",
        lambda o: o["multi_latent_attention"] and o.has("heterogeneous_layers_config_path"),
        "does not go with heterogeneous_layers_config_path",
    ),
    *needs("mla_down_proj_fusion", "multi_latent_attention"),
    Rule(
        "attention_backend",
        lambda o: o["attention_backend"] == "local" and o.values("spec")[:1] != ("local",),
        "local needs spec: [local]",
    ),
    Rule(
        _EXACT, lambda o: _is_invariant(o, o["attention_backend"] != "flash"), "needs attention_backend flash"
    ),
    Rule(
        _EXACT,
        lambda o: _is_invariant(o, o["flash_attention_version"] not in {3, 4}),
        "needs flash_attention_version 3 or 4",
    ),
    Rule(_EXACT, lambda o: _is_invariant(o, o.cp != 1), "does not go with context parallelism"),
    Rule(_EXACT, lambda o: _is_invariant(o, o["attention_dropout"]), "needs attention_dropout 0"),
    Rule(
        "qk_clip_alpha",
        lambda o: o["qk_clip"] and not 0 < o["qk_clip_alpha"] < 1,
        "must be between 0 and 1 ({qk_clip_alpha} given)",
    ),
    Rule(
        "qk_clip_threshold",
        lambda o: o["qk_clip"] and o["qk_clip_threshold"] <= 0,
        "must be more than 0 ({qk_clip_threshold} given)",
    ),
    Rule(
        "fused_residual_rmsnorm",
        lambda o: o["fused_residual_rmsnorm"] and o["normalization"] != "RMSNorm",
        "needs normalization RMSNorm ({normalization} given)",
    ),
)
