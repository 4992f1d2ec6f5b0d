"""Number formats: 16-bit, 8-bit and 4-bit training, activations, formats of the optimizer's state.

Twins of Megatron's `validate_args`, `TransformerConfig`, `OptimizerConfig` and
`DistributedDataParallelConfig`.
"""

from __future__ import annotations

from flagscale_config.arithmetic.options import Check, Options, Rule, clashes, needs

__all__ = ["CHECKS"]


def _check_edges(options: Options) -> None:
    """Check the first and last layers that stay in bf16 while the others are in 8 bits."""
    if not options["fp8_format"] or not options["first_last_layers_bf16"]:
        return
    if options["fp8_recipe"] == "delayed":
        options.error("first_last_layers_bf16", "does not go with fp8_recipe delayed; use another recipe")
    if not options.has("num_layers"):
        return
    most = options["num_layers"] // options.pp
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if not 0 <= options[name] <= most:
            options.error(name, f"must be between 0 and the {most} layers of a stage ({options[name]} given)")


def _check_activation(options: Options) -> None:
    """Check the activation function against its fused kernels."""
    is_swiglu, is_quick = options["swiglu"], options["quick_geglu"] and not options["squared_relu"]
    if is_swiglu:
        fused = not options["no_bias_swiglu_fusion"]
    else:
        fused = not (options["no_bias_gelu_fusion"] or options["disable_bias_linear"])
    if not fused:
        return
    if options["squared_relu"] and not is_swiglu:
        options.error("squared_relu", "needs no_bias_gelu_fusion or disable_bias_linear")
    if options["glu_linear_offset"] and not is_quick:
        options.error("glu_linear_offset", "needs quick_geglu, or no fused activation")
    if options["use_te_activation_func"]:
        name = "no_bias_swiglu_fusion" if is_swiglu else "no_bias_gelu_fusion"
        options.error("use_te_activation_func", f"needs {name}: one of the two fuses the activation")


_STATE = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
_AWARE = "use_precision_aware_optimizer"


def _check_state(options: Options) -> None:
    """Check the formats of gradients, parameters and moments."""
    for name in _STATE:
        if options[name] != "fp32" and not options[_AWARE]:
            options.error(name, f"{options[name]} needs {_AWARE}")
    if (
        options["bf16"]
        and options["accumulate_allreduce_grads_in_fp32"]
        and options["main_grads_dtype"] != "fp32"
    ):
        options.error("main_grads_dtype", "must be fp32 with accumulate_allreduce_grads_in_fp32")


CHECKS: tuple[Check, ...] = (
    _check_edges,
    _check_activation,
    _check_state,
    *clashes("fp16", "bf16"),
    Rule(
        "fp32_residual_connection",
        lambda o: o["fp32_residual_connection"] and not (o["fp16"] or o["bf16"]),
        "needs fp16 or bf16",
    ),
    *needs("fp16_lm_cross_entropy", "fp16"),
    *clashes("fp4_format", "fp8_format"),
    *needs("fp4_param_gather", "fp4_format"),
    *needs("fp8_param_gather", "fp8_format"),
    *needs("fp8_output_proj", "fp8_format"),
    Rule(
        "fp8_output_proj",
        lambda o: o["fp8_output_proj"] and o["fp8_recipe"] != "mxfp8",
        "needs fp8_recipe mxfp8 ({fp8_recipe} given)",
    ),
    Rule(
        "fp8_param_gather",
        lambda o: (
            o["fp8_param_gather"]
            and not (o["use_distributed_optimizer"] or o["use_torch_fsdp2"] or o["use_megatron_fsdp"])
        ),
        "needs use_distributed_optimizer, use_torch_fsdp2 or use_megatron_fsdp",
    ),
    Rule(
        "fp8_recipe",
        lambda o: o["fp8_format"] and o["fp8_recipe"] == "custom" and not o["fp8_quantizer_factory"],
        "custom needs fp8_quantizer_factory, such as my_package.my_module.factory",
    ),
    Rule(
        "fp4_recipe",
        lambda o: o["fp4_format"] and o["fp4_recipe"] == "custom" and not o["fp4_quantizer_factory"],
        "custom needs fp4_quantizer_factory, such as my_package.my_module.factory",
    ),
    *clashes("swiglu", "squared_relu"),
    Rule(
        "swiglu",
        lambda o: o["swiglu"] and o["quick_geglu"] and not o["squared_relu"],
        "does not go with quick_geglu; keep one",
    ),
    Rule(
        "use_te_activation_func",
        lambda o: o["use_te_activation_func"] and (o["squared_relu"] or o["quick_geglu"]) and not o["swiglu"],
        "knows gelu, silu and relu; not squared_relu or quick_geglu",
    ),
    *clashes("reuse_grad_buf_for_mxfp8_param_ag", "overlap_param_gather_with_optimizer_step"),
    Rule(
        "reuse_grad_buf_for_mxfp8_param_ag",
        lambda o: (
            o["reuse_grad_buf_for_mxfp8_param_ag"]
            and not o["fp8_param_gather"]
            and not (o["use_megatron_fsdp"] or o["use_torch_fsdp2"])
        ),
        "needs fp8_param_gather",
    ),
    Rule(
        _AWARE, lambda o: o[_AWARE] and o["optimizer"] != "adam", "needs optimizer adam ({optimizer} given)"
    ),
    Rule(
        _AWARE,
        lambda o: o[_AWARE] and not (o["use_distributed_optimizer"] or o["use_megatron_fsdp"]),
        "needs use_distributed_optimizer",
    ),
    *needs("optimizer_cpu_offload", _AWARE),
    Rule(
        "optimizer_cpu_offload",
        lambda o: o["optimizer_cpu_offload"] and o["fp8_param_gather"] and o["fp8_recipe"] != "delayed",
        "with fp8_param_gather needs fp8_recipe delayed ({fp8_recipe} given)",
    ),
    Rule(
        "cross_entropy_fusion_impl",
        lambda o: o["cross_entropy_loss_fusion"] and o["cross_entropy_fusion_impl"] == "te",
        "te is switched off in Megatron for being unstable; use native",
    ),
)
