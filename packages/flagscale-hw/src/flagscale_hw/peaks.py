"""Published peak rates of accelerators: dense, without sparsity, each with its source.

A number is given for exactly the name that the driver reports. No number is better than a wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Peak", "peak"]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """One published rate of one device."""

    model: str
    dtype: str
    flops_per_s: float
    """Dense operations per second; for int8 these are integer operations."""
    source: str
    """Where the number was published."""


_NANOCHAT = "github.com/karpathy/nanochat common.py"
_TITAN = "github.com/pytorch/torchtitan"
_VERL = "github.com/volcengine/verl flops_counter.py"
_PROF = "github.com/citsjtu2020/LLM-Prof hardware_spec.md"
_ANALYSIS = "github.com/cli99/llm-analysis gpu_configs"

_DTYPES = {
    "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16", "fp8": "fp8",
    "float8": "fp8", "int8": "int8",
}  # fmt: skip

# Driver's name -> (source, {dtype: tera-operations per second}).
_TERA: dict[str, tuple[str, dict[str, float]]] = {
    "Tesla V100-PCIE-32GB": (_ANALYSIS, {"fp16": 112.0}),
    "Tesla V100-SXM2-32GB": (_ANALYSIS, {"fp16": 125.0}),
    "NVIDIA A10": (_PROF, {"bf16": 125.0, "fp16": 125.0, "int8": 250.0}),
    "NVIDIA A10G": (_ANALYSIS, {"bf16": 70.0, "fp16": 70.0}),
    "NVIDIA A30": (_NANOCHAT, {"bf16": 165.0, "fp16": 165.0}),
    "NVIDIA A40": (_NANOCHAT, {"bf16": 149.7, "fp16": 149.7}),
    "NVIDIA RTX A6000": (_TITAN, {"bf16": 154.85}),
    "NVIDIA A100-PCIE-40GB": (_NANOCHAT, {"bf16": 312.0, "fp16": 312.0}),
    "NVIDIA A100-SXM4-40GB": (_PROF, {"bf16": 312.0, "fp16": 312.0, "int8": 624.0}),
    "NVIDIA A100 80GB PCIe": (_NANOCHAT, {"bf16": 312.0, "fp16": 312.0}),
    "NVIDIA A100-SXM4-80GB": (_PROF, {"bf16": 312.0, "fp16": 312.0, "int8": 624.0}),
    "NVIDIA A800-SXM4-80GB": (_NANOCHAT, {"bf16": 312.0, "fp16": 312.0}),
    "NVIDIA A800 80GB PCIe": (_NANOCHAT, {"bf16": 312.0, "fp16": 312.0}),
    "NVIDIA L4": (_NANOCHAT, {"bf16": 121.0, "fp16": 121.0}),
    "NVIDIA L20": (_PROF, {"bf16": 119.5, "fp16": 119.5, "int8": 239.0}),
    "NVIDIA L40": (_VERL, {"bf16": 181.05}),
    "NVIDIA L40S": (_NANOCHAT, {"bf16": 362.0, "fp16": 362.0}),
    "NVIDIA GeForce RTX 3090": (_NANOCHAT, {"bf16": 71.0}),
    "NVIDIA GeForce RTX 4090": (_NANOCHAT, {"bf16": 165.2, "fp16": 165.2}),
    "NVIDIA GeForce RTX 5090": (_NANOCHAT, {"bf16": 209.5, "fp16": 209.5}),
    "NVIDIA H100 PCIe": (_NANOCHAT, {"bf16": 756.0, "fp16": 756.0}),
    "NVIDIA H100 NVL": (_NANOCHAT, {"bf16": 835.0, "fp16": 835.0}),
    "NVIDIA H100 80GB HBM3": (_PROF, {"bf16": 989.0, "fp16": 989.0, "fp8": 1979.0, "int8": 1979.0}),
    "NVIDIA H800": (_PROF, {"bf16": 989.0, "fp16": 989.0, "fp8": 1979.0}),
    "NVIDIA H800 PCIe": (_NANOCHAT, {"bf16": 756.0}),
    "NVIDIA H200": (_PROF, {"bf16": 989.0, "fp16": 989.0, "fp8": 1979.0, "int8": 1979.0}),
    "NVIDIA H20": (_PROF, {"bf16": 148.0, "fp16": 148.0, "fp8": 296.0, "int8": 296.0}),
    "NVIDIA B200": (_PROF, {"bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0}),
}


def peak(model_name: str | None, dtype: str) -> Peak | None:
    """Return the published peak of a device, or None when none is known.

    Args:
        model_name: exactly as the driver reports it (`Device.name`).
        dtype: `bf16`, `fp16`, `fp8`, `int8`, or torch's names for them.
    """
    wanted = _DTYPES.get(dtype.removeprefix("torch."))
    source, rates = _TERA.get(model_name or "", ("", {}))
    if wanted is None or model_name is None or wanted not in rates:
        return None
    return Peak(model=model_name, dtype=wanted, flops_per_s=rates[wanted] * 1e12, source=source)
