"""The losses of the step being taken: the forward step notes them, the guard judges them."""

from __future__ import annotations

import torch

__all__ = ["forget", "mean_loss", "note_loss"]

_losses: list[torch.Tensor] = []


def note_loss(report: torch.Tensor) -> None:
    """Remember a micro-batch's sum of token losses and number of tokens, [2]."""
    _losses.append(report)


def forget() -> None:
    """Begin a step: what was noted before it, by an evaluation too, does not count."""
    _losses.clear()


def mean_loss() -> float:
    """Return the mean loss per token of this step over all ranks; every rank must take part.

    Only the last pipeline stage has losses; the copies on tensor-parallel ranks leave the mean as it is.
    """
    total = torch.zeros(2, device=torch.cuda.current_device())
    for report in _losses:
        total += report
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1]) if total[1] else 0.0
