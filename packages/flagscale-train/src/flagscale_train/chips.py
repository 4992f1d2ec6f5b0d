"""What Megatron needs to be told on each chip, by Megatron's option names; the plan shows them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flagscale_hw import CHIPS, FlagOSProfile, flagos_env, runtime

if TYPE_CHECKING:
    from flagscale_train.findings import Findings

__all__ = ["MEGATRON_FL", "PLAIN_LAYERS", "PLUGINS", "conflicts", "defaults", "environment"]

MEGATRON_FL = "megatron.plugin.platform"
"""The module by which FlagOS's Megatron-LM-FL is told from megatron-core."""
PLUGINS = frozenset(row.torch_module for row in map(runtime, CHIPS) if row.torch_module)
"""Modules that make torch know a chip."""
_INSTALL: Mapping[str, str] = {
    "torch_npu": "pip install torch-npu, of torch's own version",
    "torch_musa": "take Moore Threads' wheel for this torch, and pip install torchada",
}
_CUDA_HOOKS = {"mthreads": "torchada"}
"""Modules that let torch.cuda mean the chip, where no platform of Megatron-LM-FL imports one."""

PLAIN_LAYERS: Mapping[str, Any] = {
    "transformer_impl": "local",  # plain torch layers in place of Transformer Engine's
    "no_masked_softmax_fusion": True,  # the fused kernels below come with Apex or Transformer Engine
    "no_gradient_accumulation_fusion": True,
    "no_persist_layer_norm": True,
    "no_rope_fusion": True,
}
"""Options for plain torch layers, where Transformer Engine and Apex are absent."""

_CPU: Mapping[str, Any] = {
    **PLAIN_LAYERS,
    "no_bias_swiglu_fusion": True,  # compiled by torch.compile, which is off on the CPU
    "no_bias_gelu_fusion": True,
    "no_bias_dropout_fusion": True,
    "disable_jit_fuser": True,
    "use_cpu_initialization": True,  # weights do not depend on the tensor-parallel size
}
_NEEDS_GPU = (
    "fp8_format",
    "fp4_format",
    "tp_comm_overlap",
    "use_flash_attn",
    "use_precision_aware_optimizer",
    "nccl_ub",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_fusion",
)


def defaults(chip: str, options: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Return the options a chip asks for, whether or not the user gave others.

    Args:
        chip: name as in `flagscale_hw`.
        options: what the user gave, by canonical name.
        findings: which optional packages there are.
    """
    row = runtime(chip)
    chosen: dict[str, Any] = {}
    if row.trains_with == "megatron-core":
        # Elsewhere the platform of Megatron-LM-FL brings its own, which Megatron's option cannot name.
        chosen["distributed_backend"] = row.collective_backend
    if chip == "cpu":
        return {**chosen, **_CPU}
    if not {"bf16", "fp16"} & options.keys():
        chosen["bf16"] = True
    if "transformer_engine" not in findings.installed or options.get("transformer_impl") == "local":
        chosen |= PLAIN_LAYERS
    elif "apex" not in findings.installed and chip != "nvidia":  # there the worker brings it
        chosen["no_gradient_accumulation_fusion"] = True
    if options.get("cross_entropy_loss_fusion"):
        chosen["cross_entropy_fusion_impl"] = "native"
    return chosen


def conflicts(chip: str, options: Mapping[str, Any], findings: Findings) -> list[str]:
    """Say which of the user's options cannot work on a chip, each as one sentence."""
    problems = []
    row = runtime(chip)
    if row.trains_with is None:
        problems.append(
            f"chip: {chip}: neither megatron-core nor Megatron-LM-FL has a platform for {row.title} (torch "
            f"device {row.torch_device}): train on another chip"
        )
    problems += _missing(chip, findings)
    forced = _CPU if chip == "cpu" else {} if "transformer_engine" in findings.installed else PLAIN_LAYERS
    place = "on a CPU" if chip == "cpu" else "without transformer_engine, which is not installed,"
    wanted = (
        {"distributed_backend": runtime(chip).collective_backend, **forced} if chip == "cpu" else dict(forced)
    )
    for name, value in wanted.items():
        if name in options and options[name] != value:
            problems.append(
                f"{name}: {_text(options[name])}: {place} it must be {_text(value)}: remove it or set it so"
            )
    if chip == "cpu":
        problems += [
            f"{name}: {_text(options[name])}: needs a GPU: remove it to train on a CPU"
            for name in _NEEDS_GPU
            if options.get(name)
        ]
    return problems


def _missing(chip: str, findings: Findings) -> Iterator[str]:
    """Say what a chip's processes would import and the interpreter does not have."""
    row, found = runtime(chip), findings.vendor_modules
    if found is None or row.trains_with is None:
        return
    if row.torch_module and row.torch_module not in found:
        cure = _INSTALL.get(row.torch_module, f"take the one that {row.title} has for this torch")
        yield f"chip: {chip}: {row.torch_module}, which makes torch know it, is not installed: {cure}"
    if row.trains_with == "megatron-lm-fl" and MEGATRON_FL not in found:
        yield (
            f"chip: {chip}: megatron-core has no platform for {row.title}, Megatron-LM-FL has: put its "
            "source tree on PYTHONPATH"
        )


def environment(chip: str) -> dict[str, str]:
    """Return the variables that the training processes need on a chip, beside the selection of devices.

    On a chip that torch does not know they name the modules that make it known, and its collectives, which
    Megatron's option cannot name. On all chips other than NVIDIA's they tell Megatron-LM-FL and
    TransformerEngine-FL which vendor's operators to take, because a chip whose torch imitates CUDA cannot be
    told from it inside torch.
    """
    row = runtime(chip)
    if chip in ("cpu", "nvidia") or row.trains_with is None:
        return {}
    rendered = flagos_env(FlagOSProfile(), chip)
    chosen = {name: value for name, value in rendered.items() if name.startswith(("TE_FL_", "MG_FL_"))}
    told = {"FLAGSCALE_PLUGIN": row.torch_module, "FLAGSCALE_CUDA_HOOK": _CUDA_HOOKS.get(chip)}
    if row.trains_with == "megatron-lm-fl":
        told["FLAGSCALE_COLLECTIVES"] = row.collective_backend
    return {**dict(row.settings), **chosen, **{name: value for name, value in told.items() if value}}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
