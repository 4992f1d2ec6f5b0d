"""One forward step: a batch in, the model's per-token losses and the function that folds them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args, get_timers, get_tokenizer

from flagscale_train.worker.bounds import end_to_end, ends_of_documents
from flagscale_train.worker.datasets import reads_data
from flagscale_train.worker.losses import note_loss
from flagscale_train.worker.megatron import slice_for_context

__all__ = ["LOSS_NAME", "forward"]

LOSS_NAME = "lm loss"
"""Name of the loss in what Megatron reports, as in Megatron's own scripts."""

_Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def _batch(data: Iterator[Any] | None) -> dict[str, Any]:
    if data is None or not reads_data():
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids", "attention_mask"))
    args, device = get_args(), torch.cuda.current_device()
    batch = {name: value.to(device, non_blocking=True) for name, value in next(data).items()}
    batch.setdefault("attention_mask", None)
    if args.reset_attention_mask and not (args.trains_on_chats or args.create_attention_mask_in_dataloader):
        batch["cu_seqlens"] = ends_of_documents(batch["tokens"], get_tokenizer().eod)
    if "cu_seqlens" in batch:
        return end_to_end(batch)
    if args.context_parallel_size > 1:
        batch = slice_for_context(batch, mpu.get_context_parallel_group())
    return batch


def _fold(loss_mask: torch.Tensor, losses: torch.Tensor) -> _Loss:
    """Sum the losses of the tokens that count.

    Returns:
        The sum, the number of tokens, and both as one tensor for the report; Megatron divides.
    """
    mask = loss_mask.view(-1).float()
    total = (losses.view(-1).float() * mask).sum()
    num_tokens = mask.sum().to(torch.int)
    report = torch.cat([total.detach().view(1), num_tokens.view(1)])
    note_loss(report)
    return total, num_tokens, {LOSS_NAME: report}


def forward(
    data: Iterator[Any] | None,
    model: Any,
    return_schedule_plan: bool = False,  # noqa: FBT001, FBT002 -- Megatron's signature
) -> tuple[torch.Tensor, Callable[[torch.Tensor], _Loss]]:
    """Run one micro-batch forward; Megatron's schedules call this.

    Args:
        data: iterator of batches; None on ranks that read none.
        model: this stage's part of the model.
        return_schedule_plan: never true, for planning refuses overlap_moe_expert_parallel_comm.

    Returns:
        The output, and the function that turns it into loss, token count and report.
    """
    del return_schedule_plan
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _batch(data)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=batch.get("packed_seq_params"),
    )
    return output, partial(_fold, batch["loss_mask"])
