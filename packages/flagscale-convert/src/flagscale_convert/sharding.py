"""Which axis of a Megatron tensor tensor parallelism cuts, by its name; the same for every family.

Source: the parallel layers of megatron-core (`ColumnParallelLinear` cuts outputs,
`RowParallelLinear` inputs). SwiGLU's first projection is cut in both halves, so that a rank has its own
gate and up rows. Heads are not looked at: the fused query-key-value projection is cut into equal runs of
rows even where there are fewer key heads than ranks.
"""

from __future__ import annotations

import re
from enum import Enum

__all__ = ["EXPERT", "Cut", "cut_of"]


class Cut(Enum):
    """How a tensor is divided among ranks."""

    WHOLE = "every rank has all of it"
    ROWS = "rows"
    HALVES = "rows of the first half, then the same of the second"
    COLUMNS = "columns"


EXPERT = re.compile(r"^(?P<head>.+\.mlp\.experts\.)experts\.(?P<expert>\d+)\.(?P<rest>linear_fc[12]\..+)$")
"""A tensor of one expert, under its logical name; cut by expert-tensor parallelism."""
_ROWS = re.compile(
    r"(?:word_embeddings|output_layer|linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|eh_proj)"
    r"\.(?:weight|bias)$"
)
_LATENT_DOWN = re.compile(r"linear_(?:q|kv)_down_proj\.weight$")
_HALVES = re.compile(r"linear_fc1\.(?:weight|bias)$")
_COLUMNS = re.compile(r"(?:linear_proj|linear_fc2)\.weight$")


def cut_of(logical: str, implementation: str | None) -> Cut:
    """Tell how a logical tensor is divided.

    Args:
        logical: its name.
        implementation: Megatron's `--transformer-impl`. Projections to the latents of latent attention are
            whole on every rank with Transformer Engine, and cut by the plain-torch layers (`local`).
    """
    if implementation == "local" and _LATENT_DOWN.search(logical):
        return Cut.ROWS
    for pattern, cut in ((_ROWS, Cut.ROWS), (_HALVES, Cut.HALVES), (_COLUMNS, Cut.COLUMNS)):
        if pattern.search(logical):
            return cut
    return Cut.WHOLE
