"""Memory against time: recomputing, offloading, CUDA graphs.

Twins of Megatron's `validate_args` and `TransformerConfig`.
"""

from __future__ import annotations

from flagscale_config.arithmetic.options import Check, Options, Rule, clashes, listed

__all__ = ["CHECKS"]

_RECOMPUTED = (
    "core_attn",
    "moe_act",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "shared_experts",
    "gdn_norm_out",
)
_OFFLOADED = (
    "core_attn",
    "attn_proj",
    "expert_fc1",
    "fused_group_mlp",
    "moe_act",
    "attn_norm",
    "mlp_norm",
    "qkv_linear",
)
_IN_EXPERTS = {"moe_act", "expert_fc1", "fused_group_mlp"}
_FINE = "fine_grained_activation_offloading"


def _check_recompute(options: Options) -> None:
    kind = options.recompute
    if kind == "full":
        for name in ("recompute_method", "recompute_num_layers"):
            if not options.has(name):
                options.error("recompute_granularity", f"full needs {name}")
    elif kind == "selective":
        for name in ("recompute_method", "recompute_num_layers"):
            if options.has(name):
                options.error(name, "does not go with recompute_granularity selective; remove it or use full")
        _check_modules(options)


def _check_modules(options: Options) -> None:
    """Check what is recomputed by module."""
    modules = options.values("recompute_modules")
    odd = [name for name in modules if name not in _RECOMPUTED]
    if odd:
        options.error("recompute_modules", f"{odd[0]!r} is not one of {listed(_RECOMPUTED)}")
    conditions = {
        "moe_act": (options["moe_grouped_gemm"], "moe_grouped_gemm"),
        "mla_up_proj": (options["multi_latent_attention"], "multi_latent_attention"),
        "gdn_norm_out": (
            options["experimental_attention_variant"] == "gated_delta_net",
            "experimental_attention_variant gated_delta_net",
        ),
    }
    for name, (is_met, words) in conditions.items():
        if name in modules and not is_met:
            options.error("recompute_modules", f"{name} needs {words}")
    if "shared_experts" in modules and _overlaps_shared(options):
        options.error("recompute_modules", "shared_experts does not go with moe_shared_expert_overlap")
    if (
        options["fp8_format"]
        and options["fp8_recipe"] == "delayed"
        and {"moe_act", "layernorm"} & set(modules)
    ):
        options.error("recompute_modules", "moe_act and layernorm do not go with fp8_recipe delayed")


def _overlaps_shared(options: Options) -> bool:
    return bool(options.has("moe_shared_expert_intermediate_size") and options["moe_shared_expert_overlap"])


def _check_distributed(options: Options) -> None:
    name = "distribute_saved_activations"
    if not options[name]:
        return
    if options.tp == 1:
        options.error(name, "needs tensor_model_parallel_size of more than 1")
    elif options["sequence_parallel"]:
        options.error(name, "does not go with sequence_parallel, which divides them already")
    if options.recompute != "full":
        options.error(name, "needs recompute_granularity full")


def _check_offload(options: Options) -> None:
    """Check activations moved to host memory layer by layer."""
    name = "cpu_offloading_num_layers"
    count, layers = options[name], options["num_layers"]
    if count <= 0:
        return
    if layers is not None and count >= layers:
        options.error(name, f"must be less than num_layers {layers} ({count} given)")
    if options.pp > 1:
        options.error(name, "does not go with pipeline parallelism")
    if options.recompute:
        options.error(name, "does not go with recomputing; keep one")
    for other in (_FINE, "moe_paged_stash"):
        if options[other]:
            options.error(name, f"does not go with {other}")
    if options["cuda_graph_impl"] not in {"none", "full_iteration"}:
        options.error(name, f"does not go with cuda_graph_impl {options['cuda_graph_impl']}")


def _check_fine_offload(options: Options) -> None:
    """Check activations moved to host memory module by module."""
    if not options[_FINE]:
        return
    modules = set(options.values("offload_modules"))
    if not modules:
        options.error(_FINE, "needs offload_modules")
    odd = sorted(modules - set(_OFFLOADED))
    if odd:
        options.error("offload_modules", f"{odd[0]!r} is not one of {listed(_OFFLOADED)}")
    if "attn_proj" in modules and "core_attn" not in modules:
        options.error("offload_modules", "attn_proj needs core_attn, whose output it reads")
    inside = sorted(modules & _IN_EXPERTS)
    if inside and options.recompute == "selective" and "moe" in options.values("recompute_modules"):
        options.error("offload_modules", f"{inside[0]} is recomputed with moe in recompute_modules; keep one")
    if "fused_group_mlp" in modules and not options["use_transformer_engine_op_fuser"]:
        options.error("offload_modules", "fused_group_mlp needs use_transformer_engine_op_fuser")
    if "fused_group_mlp" in modules and modules & {"expert_fc1", "moe_act"}:
        options.error("offload_modules", "fused_group_mlp holds expert_fc1 and moe_act already")


def _check_ranges(options: Options) -> None:
    if not options[_FINE]:
        return
    if options["min_offloaded_tensor_size"] < 0:
        options.error("min_offloaded_tensor_size", "must be at least 0")
    if not 0 <= options["activation_offload_fraction"] <= 1:
        options.error("activation_offload_fraction", "must be between 0 and 1")
    if options["delta_offload_bytes_across_pp_ranks"] < 0:
        options.error("delta_offload_bytes_across_pp_ranks", "must be at least 0")


def _graph(options: Options) -> str:
    """Return the implementation of CUDA graphs, old switches read."""
    if options["enable_cuda_graph"]:
        return "local"
    return "transformer_engine" if options["external_cuda_graph"] else str(options["cuda_graph_impl"])


_IMPL = "cuda_graph_impl"

CHECKS: tuple[Check, ...] = (
    _check_recompute,
    _check_distributed,
    _check_offload,
    _check_fine_offload,
    _check_ranges,
    Rule(
        _FINE,
        lambda o: o[_FINE] and o["transformer_impl"] != "transformer_engine",
        "needs transformer_impl transformer_engine ({transformer_impl} given)",
    ),
    Rule(
        "moe_layer_recompute",
        lambda o: o["moe_layer_recompute"] and o.recompute == "full",
        "does not go with recompute_granularity full; the layer is recomputed as it is",
    ),
    Rule(
        "offload_modules",
        lambda o: o["moe_paged_stash"] and _IN_EXPERTS & set(o.values("offload_modules")),
        "must not name expert_fc1, moe_act or fused_group_mlp with moe_paged_stash",
    ),
    Rule(
        _IMPL,
        lambda o: (o["enable_cuda_graph"] or o["external_cuda_graph"]) and o[_IMPL] != "none",
        "replaces enable_cuda_graph and external_cuda_graph; keep it alone",
    ),
    *clashes("enable_cuda_graph", "external_cuda_graph"),
    *clashes("cuda_graph_scope", "cuda_graph_modules"),
    Rule(
        _IMPL,
        lambda o: (
            _graph(o) == "full_iteration" and not o["no_check_for_nan_in_loss_and_grad"] and not _scales(o)
        ),
        "full_iteration needs no_check_for_nan_in_loss_and_grad",
    ),
    Rule(
        _IMPL,
        lambda o: _graph(o) == "full_iteration" and (o["cuda_graph_modules"] or o["cuda_graph_scope"]),
        "full_iteration captures everything; leave cuda_graph_modules out",
    ),
    Rule(
        _IMPL,
        lambda o: _graph(o) in {"local", "transformer_engine"} and o.recompute == "full",
        "{cuda_graph_impl} does not go with recompute_granularity full; use full_iteration",
    ),
    Rule(
        _IMPL,
        lambda o: _graph(o) != "none" and o["inference_batch_times_seqlen_threshold"] > -1,
        "does not go with inference_batch_times_seqlen_threshold",
    ),
)


def _scales(options: Options) -> bool:
    """Whether losses are scaled as training goes, which switches the check for NaN off."""
    return bool(options["fp16"] and not options["loss_scale"])
