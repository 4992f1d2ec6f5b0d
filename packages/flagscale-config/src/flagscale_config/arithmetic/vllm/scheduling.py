"""Batches, cache, LoRA and memory: twins of vLLM's `SchedulerConfig`, `CacheConfig`, `LoRAConfig` and others.

Limits that vLLM chooses by the size of the device are not known here and take part in nothing.
"""

from __future__ import annotations

from flagscale_config.arithmetic.options import Rule
from flagscale_config.arithmetic.vllm.options import VllmCheck, VllmOptions

__all__ = ["CHECKS"]

_TOKENS, _SEQS, _LENGTH = "max_num_batched_tokens", "max_num_seqs", "max_model_len"


def _check_batches(options: VllmOptions) -> None:
    tokens, seqs = options.number(_TOKENS), options.given.get(_SEQS)
    length, active = options.max_length, options["max_num_active_seqs"]
    if options["enable_chunked_prefill"] is False and tokens and length and tokens < length:
        message = f"{tokens} is less than {_LENGTH} {length}; raise it, or switch enable_chunked_prefill on"
        options.error(_TOKENS, message)
    if tokens and seqs and tokens < seqs:
        options.error(_TOKENS, f"{tokens} is less than {_SEQS} {seqs}; raise it or lower that")
    if active and seqs and active > seqs:
        options.error("max_num_active_seqs", f"{active} is more than {_SEQS} {seqs}")
    threshold = options["long_prefill_token_threshold"]
    if threshold and length and threshold > length:
        options.error("long_prefill_token_threshold", f"{threshold} is more than {_LENGTH} {length}")


def _check_length(options: VllmOptions) -> None:
    """Check the length of sequences against what the model was made for."""
    given, model = options.number(_LENGTH), options.model
    if given == 0:
        options.error(_LENGTH, "must be at least 1, or -1 or auto for what fits (0 given)")
    limit = model.max_length if model is not None else None
    if given and limit is not None and given > limit and not options.env("VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        message = (
            f"{given} is more than the model's {limit:.0f}; lower it, or set hf_overrides to scale positions"
        )
        options.error(_LENGTH, message)


def _check_lora(options: VllmOptions) -> None:
    if not options["enable_lora"]:
        return
    kept, loaded = options["max_cpu_loras"], options["max_loras"]
    if kept and 0 < kept < loaded:
        options.error("max_cpu_loras", f"{kept} is less than max_loras {loaded}; every one is kept there too")


def _check_offload(options: VllmOptions) -> None:
    group, part = options["offload_group_size"] or 0, options["offload_num_in_group"] or 1
    step = options["offload_prefetch_step"]
    if options["offload_backend"] != "prefetch" and not group:
        return
    if part > group:
        options.error("offload_num_in_group", f"{part} is more than offload_group_size {group}")
    if step is not None and step < 1:
        options.error(
            "offload_prefetch_step", f"must be at least 1 where weights are prefetched ({step} given)"
        )


def _check_cuda_graphs(options: VllmOptions) -> None:
    """Check what is said twice: as an option, and in a JSON option."""
    compilation = options.part("compilation_config")
    for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size"):
        if options[name] is not None and compilation.get(name) is not None:
            options.error(name, f"is in compilation_config too; keep one ({compilation[name]} there)")
    if options["attention_backend"] and options.part("attention_config").get("backend"):
        options.error("attention_backend", "is in attention_config as backend too; keep one")
    name = "enable_flashinfer_autotune"
    if options.given.get(name) is not None and options.part("kernel_config").get(name) is not None:
        options.error(name, "is in kernel_config too; keep one")


CHECKS: tuple[VllmCheck, ...] = (
    _check_batches,
    _check_length,
    _check_lora,
    _check_offload,
    _check_cuda_graphs,
    Rule(
        "mamba_block_size",
        lambda o: (
            o["mamba_block_size"] is not None
            and o["enable_prefix_caching"] is False
            and o["mamba_block_size"] != o.max_length
        ),
        "needs enable_prefix_caching",
    ),
    Rule(
        "mamba_ssu_algorithm",
        lambda o: o["mamba_ssu_algorithm"] is not None and o["mamba_backend"] != "flashinfer",
        "needs mamba_backend flashinfer ({mamba_backend} given)",
    ),
)
