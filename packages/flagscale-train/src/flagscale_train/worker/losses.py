"""The losses of the step being taken: the forward step notes them, the guard judges them."""

from __future__ import annotations

import torch

__all__ = ["forget", "mean_loss", "note_loss"]

_noted: torch.Tensor | None = None
"""Sum of token losses and number of tokens since `forget()`, [2]; one tensor, for nobody may call that."""


def note_loss(report: torch.Tensor) -> None:
    """Add a micro-batch's sum of token losses and number of tokens, [2]."""
    global _noted  # noqa: PLW0603 -- Megatron's schedules stand between the two ends
    _noted = report.detach() if _noted is None else _noted + report.detach()


def forget() -> None:
    """Begin a step: what was noted before it, by an evaluation too, does not count."""
    global _noted  # noqa: PLW0603
    _noted = None


def mean_loss() -> float:
    """Return the mean loss per token of this step over all ranks; every rank must take part.

    Only the last pipeline stage has losses; the copies on tensor-parallel ranks leave the mean as it is.
    """
    total = torch.zeros(2, device=torch.cuda.current_device()) if _noted is None else _noted.clone()
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1]) if total[1] else 0.0
