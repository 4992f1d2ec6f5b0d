"""Which axis of a Megatron tensor tensor parallelism cuts, by its name; the same for every family.

Source: the parallel layers of megatron-core (`ColumnParallelLinear` cuts outputs,
`RowParallelLinear` inputs). SwiGLU's first projection is cut in both halves, so that a rank has its own
gate and up rows. Heads are not looked at: the fused query-key-value projection is cut into equal runs of
rows even where there are fewer key heads than ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

__all__ = ["EXPERT", "LAYER", "TOWER", "Cut", "cut_of", "is_gated"]


class Cut(Enum):
    """How a tensor is divided among ranks."""

    WHOLE = "every rank has all of it"
    ROWS = "rows"
    HALVES = "rows of the first half, then the same of the second"
    COLUMNS = "columns"


EXPERT = re.compile(r"^(?P<head>.+\.mlp\.experts\.)experts\.(?P<expert>\d+)\.(?P<rest>linear_fc[12]\..+)$")
"""A tensor of one expert, under its logical name; cut by expert-tensor parallelism."""
LAYER = re.compile(r"^(?P<stack>(?:\w+\.)*decoder\.layers\.)(?P<layer>\d+)\.(?P<rest>.+)$")
"""A tensor of a layer: of a language model alone, of one that is a part of a larger model, or of a tower."""
TOWER = re.compile(r"^(?:thinker\.)?(?:vision_model|vision_projection|audio_model)\.")
"""A tensor of a tower or of what joins it to the language model; all of them are on the first stage."""
_FC1 = re.compile(r"linear_fc1\.(?:weight|bias)$")
_ROWS = re.compile(
    r"(?:word_embeddings|output_layer|linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|eh_proj)"
    r"\.(?:weight|bias)$"
)
_LATENT_DOWN = re.compile(r"linear_(?:q|kv)_down_proj\.weight$")
_COLUMNS = re.compile(r"(?:linear_proj|linear_fc2)\.weight$")


def is_gated(logical: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether a network's first projection holds gate and up rows, by what its second one takes.

    Args:
        logical: name of the first projection.
        shapes: of all tensors, whole or one rank's.
    """
    second = shapes.get(_FC1.sub("linear_fc2.weight", logical))
    return second is None or len(second) < 2 or shapes[logical][0] != second[1]


def cut_of(logical: str, implementation: str | None, shapes: Mapping[str, tuple[int, ...]]) -> Cut:
    """Tell how a logical tensor is divided.

    Args:
        logical: its name.
        implementation: Megatron's `--transformer-impl`. Projections to the latents of latent attention are
            whole on every rank with Transformer Engine, and cut by the plain-torch layers (`local`).
        shapes: of all tensors, whole or one rank's.
    """
    if implementation == "local" and _LATENT_DOWN.search(logical):
        return Cut.ROWS
    if _FC1.search(logical):
        return Cut.HALVES if is_gated(logical, shapes) else Cut.ROWS
    for pattern, cut in ((_ROWS, Cut.ROWS), (_COLUMNS, Cut.COLUMNS)):
        if pattern.search(logical):
            return cut
    return Cut.WHOLE
