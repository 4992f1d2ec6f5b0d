"""Loads the newest whole checkpoint and proves that what was saved is whole.

Megatron believes its tracker file: if the run was killed while saving, or the disk was full, it may point at
nothing or at half a checkpoint. Here the files decide (`flagscale_train.checkpoints`); the tracker is not
read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import checkpointing, get_args, training
from torch.distributed.checkpoint.api import CheckpointException

from flagscale_train.checkpoints import Choice, choose, fault, prune
from flagscale_train.worker.recorder import Recorder
from flagscale_train.worker.refusal import Refusal, first_line, innermost

__all__ = ["Keeper", "SaveError", "chosen", "same_model"]

_SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "swiglu", "normalization", "qk_layernorm", "add_bias_linear", "add_qkv_bias", "position_embedding_type",
    "untie_embeddings_and_output_weights", "num_experts", "moe_ffn_hidden_size", "moe_layer_freq",
    "moe_shared_expert_intermediate_size", "multi_latent_attention", "q_lora_rank", "kv_lora_rank",
    "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "mtp_num_layers", "padded_vocab_size",
)  # fmt: skip
"""Megatron's arguments that decide which tensors a model has and what they mean."""


def chosen(root: Path, iteration: int | None = None) -> Choice:
    """Choose a checkpoint on the first rank and tell all others, so that they can never disagree."""
    if not torch.distributed.is_initialized():
        return choose(root, iteration)
    answer: list[Choice | None] = [choose(root, iteration) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(answer, src=0)
    choice = answer[0]
    assert choice is not None  # noqa: S101 -- rank 0 always sends one
    return choice


class SaveError(Exception):
    """A checkpoint could not be written."""


class Keeper:
    """Stands between the trainer and its checkpoints."""

    def __init__(self, recorder: Recorder, keep_last: int | None = None) -> None:
        """Report through `recorder`, and keep as many whole checkpoints as `keep_last` says; None: all."""
        self._recorder = recorder
        self._keep_last = keep_last
        self._stored: Path | None = None
        """The checkpoint that holds the weights as they are until the next step: loaded or saved last."""
        self._is_pending = False
        """Whether it is still being written in the background."""
        self._started_s = 0.0

    def attach(self) -> None:
        """Wrap Megatron's functions; call once, before `pretrain()`."""
        checkpointing.read_metadata = self._read_tracker
        checkpointing.checkpoint_exists = lambda root: (
            root is not None and chosen(Path(root)).path is not None
        )
        self._wrap("load_checkpoint", self._load)
        self._wrap("save_checkpoint", self._save)
        checkpointing.schedule_async_save = functools.partial(
            self._schedule, checkpointing.schedule_async_save
        )
        _allow_longer_training()
        if not get_args().async_save:
            # Writers are threads then. Megatron's own queue is a process that first imports torch: 5 s.
            filesystem_async._results_queue = queue.Queue()

    @staticmethod
    def _wrap(name: str, around: Callable[..., Any]) -> None:
        real = getattr(training, name)
        setattr(training, name, functools.wraps(real)(functools.partial(around, real)))

    @staticmethod
    def newest() -> Choice:
        """Return the newest whole checkpoint of the run, where it saves them."""
        return chosen(Path(get_args().save))

    def _read_tracker(self, tracker: str) -> tuple[int, bool]:
        choice = chosen(Path(tracker).parent, get_args().ckpt_step)
        return (choice.iteration, choice.release) if choice.path else (-1, False)

    def _load(self, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        args = get_args()
        if args.load is None:
            return real(*arguments, **named)
        choice = chosen(Path(args.load), args.ckpt_step)
        for sentence in choice.skipped:
            self._note(sentence)
        if args.ckpt_step and choice.path is None:
            raise FileNotFoundError(
                f"ckpt_step: {args.ckpt_step}: no whole checkpoint of that step in {args.load}"
            )
        if choice.path is not None:
            # Megatron looks for the tracker before it looks for a checkpoint; an asked-for step goes before
            # both.
            args.ckpt_step = choice.iteration or None
            self._stored = choice.path
            self._note(f"resuming from {choice.path}")
            same_model(choice.path)
        try:
            return real(*arguments, **named)
        except AssertionError as error:
            if "OptimizerParamScheduler" not in str(error):
                raise
            raise Refusal(
                f"{choice.path}: it was trained with another learning-rate schedule ({error}): set "
                "lr_decay_iters (and lr_warmup_iters) to what they were, "
                "override_opt_param_scheduler: true to take the new "
                "schedule, or "
                "use_checkpoint_opt_param_scheduler: true to keep the old one"
            ) from None

    def _note(self, text: str) -> None:
        if torch.distributed.get_rank() == 0:
            print(text, flush=True)  # noqa: T201 -- the log is this process's output
        self._recorder.write("notice", text=text)

    def _save(self, real: Callable[..., Any], iteration: int, *arguments: Any, **named: Any) -> Any:
        args = get_args()
        path = Path(checkpointing.get_checkpoint_name(args.save, iteration, return_base_dir=True))
        if self._stored == path and (self._is_pending or fault(path) is None):
            # Nothing was trained since; writing over the only good copy could only harm it.
            return None
        self._clear(path)
        self._stored, self._started_s = path, time.perf_counter()
        try:
            with _unstoppable():
                result = real(iteration, *arguments, **named)
        except (RuntimeError, OSError, CheckpointException) as error:
            raise _save_failure(path, error) from error
        if not args.async_save:
            self._finish(iteration, path, self._started_s)
        return result

    def _schedule(self, real: Callable[..., Any], request: Any) -> None:
        """Let a save in the background be verified when all ranks have written their parts."""
        path, started_s = self._stored, self._started_s
        assert path is not None  # noqa: S101 -- _save set it
        iteration = int(path.name.removeprefix("iter_"))
        self._is_pending = True

        def finish() -> None:
            self._is_pending = False
            self._finish(iteration, path, started_s)

        request.add_finalize_fn(finish)
        real(request)

    def _clear(self, path: Path) -> None:
        """Remove an earlier attempt at this checkpoint: its files could stay between the new ones."""
        if torch.distributed.get_rank() == 0 and path.exists():
            shutil.rmtree(path)
        torch.distributed.barrier()

    def _finish(self, iteration: int, path: Path, started_s: float) -> None:
        """Verify what was written, and only then let older checkpoints go."""
        save_time_s = time.perf_counter() - started_s
        is_first = torch.distributed.get_rank() == 0
        problem = [fault(path) if is_first else None]
        torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise SaveError(f"checkpoint {path} is not whole after saving: {problem[0]}")
        self._recorder.write(
            "checkpoint", iteration=iteration, path=path, verified=True, save_time_s=save_time_s
        )
        if is_first and self._keep_last is not None:
            for gone in prune(path.parent, self._keep_last, iteration):
                print(f"deleted {gone}: {self._keep_last} newer ones are whole", flush=True)  # noqa: T201 -- log


def _save_failure(path: Path, error: BaseException) -> SaveError:
    """Say why saving failed; torch's writer loses what the system said, so the system is asked again."""
    files = sorted(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    try:
        with (files[-1] if files else path / "probe").open("ab") as stream:
            stream.write(bytes(1 << 16))
            stream.flush()
            os.fsync(stream.fileno())
        cause = first_line(innermost(error))
    except OSError as answer:
        free_gib = shutil.disk_usage(path.parent).free / (1 << 30)
        cause = f"{answer.strerror or answer} ({free_gib:.1f} GiB are free there): make room"
    return SaveError(
        f"checkpoint {path} could not be saved: {cause}; the checkpoints before it are untouched"
    )


def same_model(path: Path) -> None:
    """Compare the model with the checkpoint's before Megatron compares tensors and names none of this.

    Raises:
        Refusal: it has another shape, its optimizer state cannot be spread in the way asked for, or it is of
            a newer Megatron.
    """
    try:
        saved = dist_checkpointing.load_common_state_dict(str(path)).get("args")
    except CheckpointingException as error:
        raise Refusal(
            f"{path}: its arguments cannot be read ({first_line(error)}): it is of a newer Megatron; a "
            "converted model is made for this one by flagscale-convert run --megatron-version"
        ) from None
    args = get_args()
    differ = [
        f"{name}: {_value(args, name)}: it has {_value(saved, name)}"
        for name in _SHAPE
        if _value(saved, name) not in (None, _value(args, name))
    ]
    if differ:
        raise Refusal(
            f"{path}: a checkpoint of another model: {'; '.join(differ)}: give another exp_dir or load"
        )

    sizes = [getattr(each, "expert_model_parallel_size", 1) for each in (saved, args)]
    takes_state = not (args.no_load_optim or args.finetune)
    is_by_weight = getattr(saved, "use_distributed_optimizer", False) and getattr(
        saved, "dist_ckpt_optim_fully_reshardable", False
    )
    if min(sizes) == 1 < max(sizes) and takes_state and not (is_by_weight and args.use_distributed_optimizer):
        raise Refusal(
            f"expert_model_parallel_size: {sizes[1]}: {path} was saved with {sizes[0]}, and the optimizer's "
            "state is spread anew only with use_distributed_optimizer and dist_ckpt_optim_fully_reshardable, "
            "then as now: resume with the same size, or without that state (no_load_optim: true)"
        )


def _value(args: Any, name: str) -> Any:
    """Return an argument, None for one that Megatron does not go by here, whatever it holds."""
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return None
    if name == "kv_channels" and getattr(args, "multi_latent_attention", False):
        return None
    return getattr(args, name, None)


def _allow_longer_training() -> None:
    """Let `train_iters` grow while the weight decay is constant.

    Megatron compares the length of the weight-decay schedule, `train_iters`, even where there is none.
    """
    real = OptimizerParamScheduler._check_and_set

    def check(self: Any, ours: Any, saved: Any, name: str) -> Any:
        if "weight decay iterations" in name and self.start_wd == self.end_wd:
            return ours
        return real(self, ours, saved, name)

    OptimizerParamScheduler._check_and_set = check


@contextlib.contextmanager
def _unstoppable() -> Iterator[None]:
    """Hold SIGTERM back while saving, here and in the writer processes that saving starts.

    A run that is stopped sends SIGTERM to every process it has, new ones too. Megatron saves because of that
    signal, so it must not hit the writers. A blocked signal is inherited by them, and here it is delivered
    afterwards.
    """
    # Starting Python's resource tracker unblocks SIGTERM, so it must be there before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
