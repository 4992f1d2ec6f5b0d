"""How the documents or chats that share a sequence are kept apart, by the layers that the chip has.

Plain layers take a mask. Transformer Engine's causal attention takes none: it is told where each document
begins, of sequences that are laid one behind another (its `thd` format).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["conflicts", "defaults"]

_MASKS = "no_create_attention_mask_in_dataloader"


def _reason(options: Mapping[str, Any]) -> str | None:
    """Return the option that asks for documents to be kept apart, None if none does."""
    return next((name for name in ("sft", "reset_attention_mask") if options.get(name)), None)


def defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option that says whether masks are made, each a tensor of sequence x sequence.

    Args:
        options: the user's and the chip's, by canonical name.
    """
    is_masked = options.get("transformer_impl") == "local" and _reason(options) is not None
    return {_MASKS: not is_masked}


def conflicts(options: Mapping[str, Any]) -> list[str]:
    """Say what cannot be done with the layers that the chip has, each as one sentence."""
    problems = []
    if options.get("dataloader_inter_document_masking"):
        problems.append(
            "dataloader_inter_document_masking: true: is not followed: use reset_attention_mask, which keeps "
            "documents apart with all layers"
        )
    reason = _reason(options)
    if reason is None:
        return problems
    if options.get("transformer_impl") == "local":
        if options.get(_MASKS):
            problems.append(f"{_MASKS}: true: plain layers need masks for {reason}: remove it")
        return problems
    if options.get(_MASKS) is False:
        problems.append(f"{_MASKS}: false: Transformer Engine takes no masks for {reason}: remove it")
    if options.get("context_parallel_size", 1) > 1:
        problems.append(
            f"context_parallel_size: {options['context_parallel_size']}: Transformer Engine divides only "
            f"documents of certain lengths, which {reason} does not make: set it to 1, or transformer_impl "
            "to local"
        )
    size = options.get("micro_batch_size", 1)
    if size > 1 and options.get("pipeline_model_parallel_size", 1) > 1:
        problems.append(
            f"micro_batch_size: {size}: {reason} with Transformer Engine lays sequences one behind another, "
            "which pipeline stages do not expect: set it to 1 and raise seq_length instead"
        )
    return problems
