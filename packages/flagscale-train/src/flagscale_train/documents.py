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
    if options.get("transformer_impl") != "local":
        return problems + _conflicts_of_bounds(options, reason)
    if options.get(_MASKS):
        problems.append(f"{_MASKS}: true: plain layers need masks for {reason}: remove it")
    return problems


def _conflicts_of_bounds(options: Mapping[str, Any], reason: str) -> list[str]:
    problems = []
    if options.get(_MASKS) is False:
        problems.append(f"{_MASKS}: false: Transformer Engine takes no masks for {reason}: remove it")
    if options.get("context_parallel_size", 1) > 1:
        problems.append(
            f"context_parallel_size: {options['context_parallel_size']}: Transformer Engine divides only "
            f"documents of certain lengths, which {reason} does not make: set it to 1, or transformer_impl "
            "to local"
        )
    size = options.get("micro_batch_size", 1)
    laid = f"micro_batch_size: {size}: {reason} with Transformer Engine lays sequences one behind another"
    if size > 1 and options.get("pipeline_model_parallel_size", 1) > 1:
        problems.append(
            f"{laid}, which pipeline stages do not expect: set it to 1 and raise seq_length instead"
        )
    if size > 1 and _is_balanced_by_sequence(options) and not _knows_sequences():
        problems.append(
            f"{laid}, whose experts megatron-core before 0.19 balances as one: set it to 1, or pip install "
            "-U megatron-core"
        )
    return problems


def _is_balanced_by_sequence(options: Mapping[str, Any]) -> bool:
    return bool(options.get("num_experts")) and "seq_aux_loss" in str(
        options.get("moe_router_load_balancing_type")
    )


def _knows_sequences() -> bool:
    """Whether Megatron tells sequences apart that were laid one behind another; an option came with that."""
    from flagscale_config import option_table

    return "dataloader_inter_document_masking" in option_table("megatron").options
