"""Turns what Megatron's trainer does into events.

Megatron has no callbacks, so its functions are wrapped where `train()` looks them up by name: `train_step`
for the time and the learning rate a step really used, `training_log` for the loss and gradient norm of that
one step, `evaluate` for held-out losses. The writing rank is the last pipeline stage's first, the only kind
that knows the loss.
"""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args, get_signal_handler, training

from flagscale_train.events import Journal
from flagscale_train.worker.step import LOSS_NAME

__all__ = ["Recorder"]


class Recorder:
    """Writes the events of one training process; silent on all ranks but one, except for errors."""

    def __init__(self, journal: Journal, peak_flops: float | None) -> None:
        """Record to `journal`.

        Args:
            journal: where events go.
            peak_flops: FLOP/s one device can do at most, for MFU; None if unknown.
        """
        self._journal = journal
        self._peak_flops = peak_flops
        self._started_s = 0.0
        self._learning_rate: float | None = None
        self._evaluating: tuple[int, str] = (0, "validation")
        self._iteration = 0

    def attach(self) -> None:
        """Wrap Megatron's functions; call once, before `pretrain()`."""
        self._wrap("train", self._on_train)
        self._wrap("train_step", self._on_train_step)
        self._wrap("training_log", self._on_training_log)
        self._wrap("evaluate_and_print_results", self._on_evaluation)
        self._wrap("evaluate", self._on_evaluate)

    @staticmethod
    def _wrap(name: str, around: Callable[..., Any]) -> None:
        real = getattr(training, name)
        setattr(training, name, functools.wraps(real)(functools.partial(around, real)))

    def writes(self) -> bool:
        """Whether this rank is the one that writes."""
        if not mpu.model_parallel_is_initialized():
            return False
        first = (
            mpu.get_tensor_model_parallel_rank() == 0
            and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
        )
        return bool(first and mpu.is_pipeline_last_stage(ignore_virtual=True))

    def write(self, event: str, **fields: Any) -> None:
        """Write an event from the writing rank; nothing on the others."""
        if self.writes():
            self._journal.write(event, **fields)

    def end(self) -> None:
        """Write how the training ended."""
        args = get_args()
        if self._iteration >= (args.train_iters or 0):
            reason = "finished"
        elif args.exit_signal_handler and get_signal_handler()._signal_received:
            reason = "stopped"
        else:
            reason = "interrupted by a limit"
        self.write("end", iteration=self._iteration, reason=reason)

    def _on_train(
        self, real: Callable[..., Any], forward: Any, model: list[Any], *arguments: Any, **named: Any
    ) -> Any:
        self._iteration = get_args().iteration
        num_parameters = _count_parameters(model)
        self.write("start", **_facts(num_parameters))
        return real(forward, model, *arguments, **named)

    def _on_train_step(self, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        optimizer = named["optimizer"] if "optimizer" in named else arguments[3]
        # Read before the step: the scheduler has moved on to the next step's rate when training_log sees it.
        self._learning_rate = training.get_canonical_lr_for_logging(optimizer.param_groups)
        self._started_s = time.perf_counter()
        return real(*arguments, **named)

    def _on_training_log(
        self, real: Callable[..., Any], losses: dict[str, Any], *arguments: Any, **named: Any
    ) -> Any:
        # Positions after the losses: total_loss_dict, learning_rate, iteration, loss_scale,
        # report_memory_flag,
        # skipped_iter, grad_norm.
        self._iteration = int(arguments[2])
        if self.writes():
            skipped, grad_norm = bool(arguments[5]), arguments[6]
            self._write_step(losses, None if grad_norm is None else float(grad_norm), skipped=skipped)
        return real(losses, *arguments, **named)

    def _write_step(self, losses: dict[str, Any], grad_norm: float | None, *, skipped: bool) -> None:
        args = get_args()
        # Reading the loss waits for the device, so the time below is the whole step's.
        values = {name: float(value) for name, value in losses.items()}
        step_time_s = time.perf_counter() - self._started_s
        loss = values.pop(LOSS_NAME, None)
        judged = {"loss": loss, "grad_norm": grad_norm}
        no_number = [name for name, value in judged.items() if not math.isfinite(value or 0.0)]
        batch_size = args.micro_batch_size * args.data_parallel_size * training.get_num_microbatches()
        flops = training.num_floating_point_operations(args, batch_size) / step_time_s / args.world_size
        self._journal.write(
            "step",
            iteration=self._iteration,
            loss=loss,
            **({"other_losses": values} if values else {}),
            grad_norm=grad_norm,
            learning_rate=self._learning_rate,
            **({"skipped": True} if skipped else {}),
            **({"not_finite": no_number} if no_number else {}),
            step_time_s=step_time_s,
            tokens_per_second=batch_size * args.seq_length / step_time_s,
            tflops_per_device=flops / 1e12,
            mfu=flops / self._peak_flops if self._peak_flops else None,
            memory_bytes=int(torch.cuda.max_memory_allocated()),
        )

    def _on_evaluation(self, real: Callable[..., Any], prefix: str, *arguments: Any, **named: Any) -> Any:
        # Positions after the prefix: forward_step_func, data_iterator, model, iteration.
        self._evaluating = (int(arguments[3]), "test" if "test set" in prefix else "validation")
        return real(prefix, *arguments, **named)

    def _on_evaluate(self, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        result = real(*arguments, **named)
        losses = result[0]
        if losses and LOSS_NAME in losses:
            iteration, split = self._evaluating
            self.write("eval", iteration=iteration, split=split, loss=float(losses[LOSS_NAME]))
        return result


def _count_parameters(model: list[Any]) -> int:
    """Count the parameters of the whole model; every rank must take part.

    Copies of one parameter (norms under tensor parallel, an embedding tied across pipeline stages) count
    once. Experts are spread over other ranks than the rest, so they are summed over a group of their own.
    """
    groups = {
        False: (mpu.get_tensor_model_parallel_rank(), mpu.get_model_parallel_group()),
        True: (
            mpu.get_expert_tensor_parallel_rank(),
            mpu.get_expert_tensor_model_pipeline_parallel_group(),
        ),
    }
    total = 0
    for is_expert, (rank, group) in groups.items():
        count = sum(
            parameter.numel()
            for chunk in model
            for parameter in chunk.parameters()
            if getattr(parameter, "allreduce", True) is not is_expert
            and (rank == 0 or getattr(parameter, "tensor_model_parallel", False))
            and not getattr(parameter, "shared", False)  # set on the last stage's copy only
        )
        counted = torch.tensor([count], dtype=torch.long, device=torch.cuda.current_device())
        torch.distributed.all_reduce(counted, group=group)
        total += int(counted.item())
    return total


def _facts(num_parameters: int) -> dict[str, Any]:
    import megatron.core

    args = get_args()
    return {
        "iteration": args.iteration,
        "train_iters": args.train_iters,
        "parameters": num_parameters,
        "tokens_per_step": args.global_batch_size * args.seq_length,
        "layout": {
            "world_size": args.world_size,
            "data": args.data_parallel_size,
            "tensor": args.tensor_model_parallel_size,
            "pipeline": args.pipeline_model_parallel_size,
            "context": args.context_parallel_size,
            "expert": args.expert_model_parallel_size,
        },
        "vocab_size": {"padded": args.padded_vocab_size},
        "dtype": str(args.params_dtype).removeprefix("torch."),
        "layers": args.transformer_impl,
        "device": torch.cuda.get_device_name(),
        "collectives": torch.distributed.get_backend(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron": megatron.core.__version__,
        },
    }
