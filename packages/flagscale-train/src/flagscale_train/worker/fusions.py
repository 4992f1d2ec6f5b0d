"""Two fusions for NVIDIA GPUs that Megatron has no good form of without Apex.

- The loss of a large vocabulary. Megatron's native fusion turns the logits into float32 and reads and writes
  that copy over and over, an eighth of the step of a small model with 150,000 words; Transformer Engine's is
  fast, but Megatron refuses it as unstable. Here each rank reads its logits once forward, once backward, in
  the type they have, and keeps one number per token beside them: the logarithm of the sum of exponentials.
- Adding a weight's gradient to the float32 buffer inside the matrix product that makes it. Megatron's own
  linear layers want Apex's extension for it and refuse to be built without; the same product is in
  Transformer Engine.

Both are switched on by Megatron's own options (`cross_entropy_loss_fusion`, and no
`no_gradient_accumulation_fusion`).
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

__all__ = ["accumulate_product", "install", "vocab_parallel_cross_entropy"]

_APEX = "fused_weight_gradient_mlp_cuda"
"""Apex's extension, which Megatron imports by this name."""
_INDEXABLE = 2**31
"""Elements that compiled kernels count in 32 bits; counting in 64 is slower."""


def install() -> None:
    """Give Megatron both, on a CUDA device; call once, before Megatron is imported."""
    if not (torch.version.cuda and torch.cuda.is_available()):
        return
    if _is_there("transformer_engine") and not _is_there(_APEX):
        stand_in = ModuleType(_APEX)
        for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
            setattr(stand_in, name, accumulate_product)
        sys.modules[_APEX] = stand_in
    from megatron.core.models.common.language_module import language_module

    language_module.fused_vocab_parallel_cross_entropy = vocab_parallel_cross_entropy


def _is_there(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def accumulate_product(inputs: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """Add a linear layer's weight gradient to a buffer, in the buffer's precision.

    Args:
        inputs: what the layer was given, [tokens, in].
        grad: gradient of what it returned, [tokens, out].
        total: the buffer, [out, in]; changed.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(inputs, grad, out_dtype=total.dtype, layout="NT", out=total, accumulate=True, grad=True)


def vocab_parallel_cross_entropy(logits: torch.Tensor, target: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the loss of each token; sums are float32.

    Args:
        logits: [sequence, batch, this rank's part of the vocabulary], any floating type.
        target: tokens of the whole vocabulary, [sequence, batch].
        group: the ranks that share the vocabulary, in its order.

    Returns:
        Losses in float32, [sequence, batch], the same on all ranks of the group.
    """
    loss: torch.Tensor = _CrossEntropy.apply(logits, target, group)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, group: Any) -> torch.Tensor:
        place = target - group.rank() * logits.shape[-1]
        parts = [
            torch.stack(_log_sum_and_predicted(*both))
            for both in zip(_pieces(logits), _pieces(place, like=logits), strict=True)
        ]
        log_sum, predicted = torch.cat(parts, dim=1)
        if group.size() > 1:
            log_sum, predicted = _over_ranks(log_sum, predicted, group)
        ctx.save_for_backward(logits, place, log_sum)
        return log_sum - predicted

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits = ctx.saved_tensors[0]
        out = torch.empty_like(logits)
        whole = (out, *ctx.saved_tensors, grad.contiguous())
        for piece in zip(*(_pieces(tensor, like=logits) for tensor in whole), strict=True):
            _fill_gradient(*piece)
        return out, None, None


def _pieces(tensor: torch.Tensor, like: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Cut a tensor along the sequence so that each piece of the logits `like` has few enough elements."""
    count, whole = 1, tensor if like is None else like
    while whole.numel() >= count * _INDEXABLE:
        count *= 2  # a power of two divides most sequences, so that all pieces have one shape
    return tensor.chunk(count)


def _over_ranks(
    log_sum: torch.Tensor, predicted: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    largest = log_sum.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    parts = torch.stack([(log_sum - largest).exp(), predicted])
    torch.distributed.all_reduce(parts, group=group)
    return parts[0].log() + largest, parts[1]


@torch.compile
def _log_sum_and_predicted(
    logits_sbv: torch.Tensor, place_sb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithm of the sum of exponentials, and the target's logit, 0 on ranks without it."""
    is_here = (place_sb >= 0) & (place_sb < logits_sbv.shape[-1])
    index = torch.where(is_here, place_sb, 0)
    predicted = logits_sbv.gather(-1, index[..., None])[..., 0].float()
    return logits_sbv.float().logsumexp(-1), torch.where(is_here, predicted, 0.0)


@torch.compile
def _fill_gradient(
    out_sbv: torch.Tensor,
    logits_sbv: torch.Tensor,
    place_sb: torch.Tensor,
    log_sum_sb: torch.Tensor,
    grad_sb: torch.Tensor,
) -> None:
    """Write (softmax - one at the target) * grad."""
    softmax = (logits_sbv.float() - log_sum_sb[..., None]).exp()
    is_target = torch.arange(logits_sbv.shape[-1], device=logits_sbv.device) == place_sb[..., None]
    out_sbv.copy_((softmax - is_target.float()) * grad_sb[..., None])
