"""Mixture of experts: how many, where they live, how tokens are routed and moved.

Twins of Megatron's `validate_args`, `TransformerConfig` and of its router, which would fail at the first
step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flagscale_config.arithmetic.options import Check, Options, Rule, divisors, listed, needs
from flagscale_config.arithmetic.patterns import layer_pattern
from flagscale_config.arithmetic.pipeline import is_interleaved

__all__ = ["CHECKS", "is_mixed"]

_DISPATCHER, _ALLGATHER, _FLEX = "moe_token_dispatcher_type", "allgather", "flex"
_BALANCED = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}


def _check_counts(options: Options) -> None:
    experts, ep = options["num_experts"], options.ep
    if experts is not None and experts < 0:
        options.error("num_experts", f"must be at least 1 ({experts} given)")
    elif ep > 1 and not experts:
        message = f"is {ep}, but the model has no experts; set num_experts or 1"
        options.error("expert_model_parallel_size", message)
    elif experts and experts % ep:
        message = f"{experts} experts cannot be shared by {ep}; use one of {listed(divisors(experts))}"
        options.error("expert_model_parallel_size", message)


def _check_router(options: Options) -> None:
    """Check how many experts, and of how many groups, a token goes to."""
    experts, topk = options["num_experts"], options["moe_router_topk"]
    if not experts:
        return
    if not 1 <= topk <= experts:
        options.error("moe_router_topk", f"must be between 1 and num_experts {experts} ({topk} given)")
    is_soft = options["moe_router_score_function"] == "softmax" and not options["moe_router_pre_softmax"]
    if topk == 1 and is_soft and "sinkhorn" not in options.values("moe_router_load_balancing_type"):
        options.error(
            "moe_router_topk", "1 needs moe_router_pre_softmax: softmax of one value has no gradient"
        )
    if options["moe_router_group_topk"]:
        _check_router_groups(options, experts, topk)


def _check_router_groups(options: Options, experts: int, topk: int) -> None:
    groups, chosen = options["moe_router_num_groups"], options["moe_router_group_topk"]
    if not groups:
        options.error("moe_router_group_topk", "needs moe_router_num_groups")
    elif experts % groups:
        message = f"{experts} experts cannot form {groups} groups; use one of {listed(divisors(experts))}"
        options.error("moe_router_num_groups", message)
    elif chosen > groups:
        options.error("moe_router_group_topk", f"{chosen} is more than moe_router_num_groups {groups}")
    elif topk // chosen > experts // groups:
        message = f"{topk} of {chosen} groups is more than the {experts // groups} experts of a group"
        options.error("moe_router_topk", message)


def _check_losses(options: Options) -> None:
    kinds, weights = options.values("moe_router_load_balancing_type"), options.values("moe_aux_loss_coeff")
    if len(kinds) > 1 and len(weights) != len(kinds):
        message = f"has {len(weights)} values for {len(kinds)} of moe_router_load_balancing_type"
        options.error("moe_aux_loss_coeff", message)
    if kinds == ("sinkhorn",) and any(weights):
        # The router finds out at the first step.
        options.error("moe_aux_loss_coeff", "must be 0 with moe_router_load_balancing_type sinkhorn")
    factor = options["moe_expert_capacity_factor"]
    odd = [kind for kind in kinds if kind not in _BALANCED]
    if factor is not None and odd:
        allowed = ", ".join(sorted(_BALANCED))
        message = f"does not go with moe_router_load_balancing_type {odd[0]}; use one of {allowed}"
        options.error("moe_expert_capacity_factor", message)


def _check_layers(options: Options) -> None:
    """Check which layers have experts; Megatron finds out while it builds the model."""
    pattern, layers = options.given.get("moe_layer_freq"), options["num_layers"]
    if pattern is None:
        return
    try:
        found = layer_pattern(str(pattern))
    except ValueError as error:
        options.error("moe_layer_freq", str(error))
        return
    if options["num_experts"] and layers is not None and isinstance(found, list) and len(found) != layers:
        options.error("moe_layer_freq", f"has {len(found)} layers of {layers}")


def is_mixed(options: Options) -> bool:
    """Whether some layers are dense by intent."""
    try:
        found = layer_pattern(str(options["moe_layer_freq"]))
    except ValueError:
        return True
    return 0 in found if isinstance(found, list) else found > 1


def _check_shared(options: Options) -> None:
    width = options["moe_shared_expert_intermediate_size"]
    if width is None:
        return
    if width <= 0:
        size = options["moe_ffn_hidden_size"] or options["ffn_hidden_size"]
        near = f", such as {size}" if size else ""
        options.error(
            "moe_shared_expert_intermediate_size", f"must be at least 1: shared experts x width{near}"
        )
    kind = options[_DISPATCHER]
    if options["moe_shared_expert_overlap"] and kind == _ALLGATHER:
        message = f"needs moe_token_dispatcher_type alltoall or flex ({kind} given)"
        options.error("moe_shared_expert_overlap", message)


_OVERLAP = "overlap_moe_expert_parallel_comm"
_NOT_OVERLAPPED: tuple[tuple[Callable[[Options], Any], str], ...] = (
    (lambda o: o.ep == 1, "needs expert_model_parallel_size of more than 1"),
    (lambda o: o[_DISPATCHER] == _ALLGATHER, f"needs {_DISPATCHER} alltoall or flex"),
    (lambda o: o.recompute == "full", "does not go with recompute_granularity full"),
    (lambda o: o["recompute_method"], "does not go with recompute_method"),
    (lambda o: o.has("recompute_num_layers"), "does not go with recompute_num_layers"),
    (lambda o: "moe" in o.values("recompute_modules"), "does not go with moe in recompute_modules"),
    (lambda o: o["moe_layer_recompute"], "does not go with moe_layer_recompute"),
    (lambda o: not (o["bf16"] or o["fp16"]), "needs bf16 or fp16"),
    (lambda o: o["moe_shared_expert_overlap"], "does not go with moe_shared_expert_overlap"),
    (lambda o: (o["mtp_num_layers"] or 0) > 1, "allows one MTP layer at most ({mtp_num_layers} given)"),
    (lambda o: o.pp > 1 and not is_interleaved(o), "needs interleaved stages where there is more than one"),
)


def _while_overlapping(is_odd: Callable[[Options], Any]) -> Callable[[Options], Any]:
    return lambda options: options[_OVERLAP] and is_odd(options)


def _is_quantized(options: Options) -> bool:
    return bool(options["fp8_format"] or options["fp4_format"])


def _pads(options: Options) -> bool:
    names = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")
    return any(bool(options[name]) for name in names)


CHECKS: tuple[Check, ...] = (
    _check_counts,
    _check_router,
    _check_losses,
    _check_layers,
    _check_shared,
    *(Rule(_OVERLAP, _while_overlapping(is_odd), words) for is_odd, words in _NOT_OVERLAPPED),
    Rule(
        "moe_ffn_hidden_size",
        lambda o: o.has("moe_ffn_hidden_size") and not o["num_experts"] and not is_mixed(o),
        "is given, but the model has no experts; set num_experts or remove it",
    ),
    Rule(
        "moe_router_enable_expert_bias",
        lambda o: o["moe_router_enable_expert_bias"] and o["moe_router_score_function"] == "softmax",
        "needs moe_router_score_function sigmoid or sqrtsoftplus ({moe_router_score_function} given)",
    ),
    Rule(
        "expert_tensor_parallel_size",
        lambda o: o["num_experts"] and not o["disable_bias_linear"] and o.etp != 1,
        "must be 1 where experts have a bias; set disable_bias_linear, as MoE models have none",
    ),
    Rule(
        "moe_pad_expert_input_to_capacity",
        lambda o: (
            o["moe_pad_expert_input_to_capacity"]
            and (o["moe_expert_capacity_factor"] is None or o["moe_expert_capacity_factor"] < 0)
        ),
        "needs moe_expert_capacity_factor of at least 0",
    ),
    Rule(
        "moe_pad_expert_input_to_capacity",
        lambda o: (
            o["moe_pad_expert_input_to_capacity"]
            and o[_DISPATCHER] == _FLEX
            and (o["moe_enable_deepep"] or o["moe_flex_dispatcher_backend"] == "deepep")
        ),
        "does not go with the deepep backend of the flex dispatcher",
    ),
    Rule(
        "moe_enable_deepep",
        lambda o: o["moe_enable_deepep"] and o[_DISPATCHER] != _FLEX,
        "needs moe_token_dispatcher_type flex ({moe_token_dispatcher_type} given)",
    ),
    Rule(
        "moe_enable_deepep",
        lambda o: o["moe_enable_deepep"] and o["moe_flex_dispatcher_backend"] == "hybridep",
        "does not go with moe_flex_dispatcher_backend hybridep",
    ),
    Rule(
        "moe_flex_dispatcher_backend",
        lambda o: o["moe_flex_dispatcher_backend"] == "ncclep" and o[_DISPATCHER] != _FLEX,
        "ncclep needs moe_token_dispatcher_type flex ({moe_token_dispatcher_type} given)",
    ),
    Rule(
        "moe_expert_rank_capacity_factor",
        lambda o: o.has("moe_expert_rank_capacity_factor") and o["moe_flex_dispatcher_backend"] == "deepep",
        "needs moe_flex_dispatcher_backend hybridep or ncclep",
    ),
    Rule(
        "moe_expert_rank_capacity_factor",
        lambda o: (
            o.has("moe_expert_rank_capacity_factor")
            and o["moe_flex_dispatcher_backend"] == "hybridep"
            and not o["use_transformer_engine_op_fuser"]
        ),
        "with hybridep needs use_transformer_engine_op_fuser",
    ),
    Rule(
        "moe_hybridep_num_sms",
        lambda o: (
            o.knows("moe_flex_dispatcher_num_sms")
            and o.has("moe_deepep_num_sms", "moe_hybridep_num_sms")
            and not o.has("moe_flex_dispatcher_num_sms")
            and o["moe_deepep_num_sms"] != o["moe_hybridep_num_sms"]
        ),
        "differs from moe_deepep_num_sms {moe_deepep_num_sms}; write moe_flex_dispatcher_num_sms once",
    ),
    Rule(
        "moe_router_padding_for_quantization",
        lambda o: _pads(o) and not _is_quantized(o),
        "needs fp8_format or fp4_format",
    ),
    Rule(
        "moe_router_padding_for_quantization",
        lambda o: _pads(o) and o[_DISPATCHER] == _ALLGATHER,
        "needs moe_token_dispatcher_type alltoall or flex ({moe_token_dispatcher_type} given)",
    ),
    *needs("moe_single_grouped_weight", "moe_grouped_gemm", "use_transformer_engine_op_fuser"),
    *needs("moe_single_grouped_bias", "moe_grouped_gemm"),
    Rule(
        "moe_single_grouped_bias",
        lambda o: o["moe_single_grouped_bias"] and o["disable_bias_linear"],
        "does not go with disable_bias_linear",
    ),
    Rule(
        "moe_single_grouped_weight",
        lambda o: (
            o["moe_single_grouped_weight"]
            and (
                (o["fp8_format"] and o["fp8_recipe"] != "mxfp8")
                or (o["fp4_format"] and o["fp4_recipe"] != "nvfp4")
            )
        ),
        "needs fp8_recipe mxfp8 or fp4_recipe nvfp4 where weights are quantized",
    ),
    *needs("moe_paged_stash", "moe_expert_rank_capacity_factor"),
    Rule("moe_latent_size", lambda o: o["moe_latent_size"] == 0, "must be at least 1 (0 given)"),
    *needs("moe_latent_size", "num_experts"),
    *needs("moe_use_upcycling", "save"),
    *needs("delay_wgrad_compute", _OVERLAP),
    *needs("ep_overlap_early_attn_memory_release", _OVERLAP),
    Rule(
        "overlap_dispatch_backward_with_experts_wgrad",
        lambda o: (
            o["overlap_dispatch_backward_with_experts_wgrad"] and (o[_OVERLAP] or o["delay_wgrad_compute"])
        ),
        f"does not go with {_OVERLAP} or delay_wgrad_compute",
    ),
    Rule(
        "delay_wgrad_compute",
        lambda o: o["delay_wgrad_compute"] and o["transformer_impl"] != "transformer_engine",
        "needs transformer_impl transformer_engine ({transformer_impl} given)",
    ),
)
