"""The options against the model: twins of vLLM's `ModelConfig`.

What the model's own numbers decide is checked where they are known; see `VllmOptions.model`.
"""

from __future__ import annotations

from difflib import get_close_matches

from flagscale_config.arithmetic.options import Rule, divisors, listed
from flagscale_config.arithmetic.vllm.options import VllmCheck, VllmOptions

__all__ = ["CHECKS"]

_QUANTIZATIONS = [
    "auto_awq",
    "auto_gptq",
    "awq",
    "awq_marlin",
    "bitsandbytes",
    "compressed-tensors",
    "deepseek_v4_fp8",
    "experts_int8",
    "fbgemm_fp8",
    "fp8",
    "fp8_per_block",
    "fp8_per_channel",
    "fp8_per_tensor",
    "fp_quant",
    "gguf",
    "gpt_oss_mxfp4",
    "gptq",
    "gptq_marlin",
    "humming",
    "inc",
    "int8_per_channel_weight_only",
    "modelopt",
    "modelopt_fp4",
    "modelopt_mixed",
    "modelopt_mxfp8",
    "moe_wna16",
    "mxfp4",
    "mxfp8",
    "nvfp4_per_token",
    "online",
    "petit_nvfp4",
    "quark",
    "torchao",
]
"""Of vLLM 0.25 to 0.33 together: `QuantizationMethods`."""
_DEPRECATED = ("fbgemm_fp8", "fp_quant")


def _check_heads(options: VllmOptions) -> None:
    model, tp = options.model, options.tp
    heads = model.heads if model is not None else None
    if heads and heads % tp:
        allowed = listed(divisors(heads))
        message = f"the model's {heads} attention heads cannot be shared by {tp}; use one of {allowed}"
        options.error("tensor_parallel_size", message)


def _check_context_heads(options: VllmOptions) -> None:
    """Check decode-context parallelism, which cuts the cache of heads that are copied anyway."""
    model, dcp, tp = options.model, options.dcp, options.tp
    if model is None or dcp == 1 or model.is_latent or not model.kv_heads or not model.heads:
        return
    name, heads = "decode_context_parallel_size", model.kv_heads
    if tp <= heads:
        options.error(name, f"needs tensor_parallel_size of more than the model's {heads} key-value heads")
    elif dcp > tp // heads:
        options.error(
            name, f"must be at most {tp // heads}: tensor_parallel_size {tp} / {heads} key-value heads"
        )
    elif (model.heads // heads) % dcp:
        options.error(
            name, f"{dcp} does not divide the {model.heads // heads} query heads per key-value head"
        )


def _check_quantization(options: VllmOptions) -> None:
    """Check the method's name. One that is like no other is let pass: plugins of chips bring their own."""
    name = options["quantization"]
    if not isinstance(name, str):
        return
    name = name.lower()
    if name in _DEPRECATED and options.knows("allow_deprecated_quantization"):
        if not options["allow_deprecated_quantization"]:
            options.error("quantization", f"{name} is deprecated; it needs allow_deprecated_quantization")
    elif name not in _QUANTIZATIONS:
        near = get_close_matches(name, _QUANTIZATIONS, 1, 0.6)
        if near:
            options.error("quantization", f"{name} is no method of vLLM; did you mean {near[0]}?")


CHECKS: tuple[VllmCheck, ...] = (
    _check_heads,
    _check_context_heads,
    _check_quantization,
    Rule(
        "enable_expert_parallel",
        lambda o: o["enable_expert_parallel"] and o.model is not None and not o.model.is_moe,
        "needs a model with experts, which this one has not",
    ),
    Rule(
        "kv_cache_dtype",
        lambda o: (
            str(o["kv_cache_dtype"]).startswith("nvfp4")
            and not str(o["kv_cache_dtype"]).endswith("_ds_mla")
            and o.model is not None
            and o.model.is_latent
        ),
        "{kv_cache_dtype} does not go with latent attention; use fp8 or auto",
    ),
    Rule(
        "default_mm_loras",
        lambda o: o["default_mm_loras"] and o.model is not None and not o.model.is_multimodal,
        "needs a model that takes more than text",
    ),
)
