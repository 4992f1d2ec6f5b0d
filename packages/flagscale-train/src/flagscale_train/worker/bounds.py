"""Where the documents of sequences begin, as Transformer Engine's attention is told it (its `thd` format).

Its causal attention takes no mask. It takes one sequence of all tokens and the bounds between which they see
each other; sequences of a batch are therefore laid one behind another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

__all__ = ["end_to_end", "ends_of_documents", "of_samples"]


def ends_of_documents(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Find where documents begin: behind each end of one, as Megatron's masks have it.

    Args:
        tokens: ids, [batch, sequence].
        eod: the id that ends a document.

    Returns:
        For each sequence 0, then where each further document begins, padded by the length;
        [batch, sequence + 1], int32.
    """
    length = tokens.shape[1]
    places = torch.arange(1, length + 1, device=tokens.device)
    behind = torch.where(tokens == eod, places, length).sort(dim=1).values
    return torch.nn.functional.pad(behind, (1, 0)).int()


def end_to_end(batch: dict[str, Any]) -> dict[str, Any]:
    """Lay the sequences of a batch one behind another.

    Args:
        batch: tensors of [batch, sequence], and `cu_seqlens`, [batch, sequence + 1], where documents begin in
            each sequence, from 0, ascending and padded by the length. What follows the last document is one
            more to attention.

    Returns:
        The tensors as [1, batch x sequence], with `packed_seq_params` in place of `cu_seqlens`.
    """
    bounds = batch.pop("cu_seqlens")
    count, length = bounds.shape[0], bounds.shape[1] - 1
    first = torch.arange(count, device=bounds.device, dtype=bounds.dtype)[:, None] * length
    bounds = torch.unique_consecutive((bounds + first).view(-1))
    laid = {name: value if value is None else value.reshape(1, -1) for name, value in batch.items()}
    longest = int(bounds.diff().max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    packed.tokens_per_sample = length  # by it experts are balanced in each sequence; 0.17 does not know it
    return laid | {"packed_seq_params": packed}


def of_samples(packed: Any, count: int) -> Any:
    """Return the bounds of the sequences that were laid one behind another, in place of their documents'.

    Args:
        packed: what `end_to_end` made.
        count: of all tokens.
    """
    bounds = torch.arange(
        0, count + 1, packed.tokens_per_sample, dtype=torch.int32, device=packed.cu_seqlens_q.device
    )
    return replace(packed, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
