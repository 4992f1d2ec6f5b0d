"""One training process from arguments to exit: prepare, check, call `megatron.training.pretrain()`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from flagscale_train.events import Journal
from flagscale_train.worker.refusal import Refusal, first_line, innermost
from flagscale_train.worker.settings import ROLL_BACKS, Settings

if TYPE_CHECKING:
    from flagscale_train.checkpoints import Choice
    from flagscale_train.worker.guard import RollBack
    from flagscale_train.worker.recorder import Recorder

__all__ = ["main", "prepare"]


def main() -> int:
    """Train with the Megatron arguments of the command line.

    Returns:
        0, also when a signal or a limit ended the training early; 1 when it was refused. Other failures
        raise, so that the traceback reaches the log and torchrun sees the failure.
    """
    settings = Settings.from_environment()
    journal = Journal(settings.events)
    try:
        _train(settings, journal)
    except SystemExit as ending:
        # Megatron leaves by sys.exit() after a signal or at a limit, having saved before.
        if ending.code not in (None, 0):
            journal.write(
                "error", rank=_rank(), type="SystemExit", text=f"Megatron exited with {ending.code}"
            )
            raise
    except Refusal as refusal:
        journal.write("error", rank=_rank(), type="Refusal", text=str(refusal))
        print(f"error: {refusal}", file=sys.stderr, flush=True)  # noqa: T201 -- the log is this process's output
        return 1
    except BaseException as error:
        cause = innermost(error)
        journal.write("error", rank=_rank(), type=type(cause).__name__, text=first_line(cause))
        raise
    _leave()
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def prepare(settings: Settings) -> Callable[[], Any]:
    """Make this process ready for Megatron and read Megatron's arguments.

    Args:
        settings: the worker's own settings.

    Returns:
        A function that parses and checks the arguments of the command line, sets Megatron's globals and
        returns the arguments. It is separate so that callers can patch Megatron in between.
    """
    if settings.platform == "cpu":
        from flagscale_train.worker import cpu

        cpu.install()
    else:
        from flagscale_train.worker import vendor

        vendor.load(settings)
        from flagscale_train.worker import fusions

        fusions.install()
    _skip_helper_build()
    from flagscale_train.worker import adam

    adam.use_where_needed()
    return partial(_arguments, settings.collectives)


def _skip_helper_build() -> None:
    """The wheel has the dataset helper compiled but no Makefile; a failed build exits the process."""
    from megatron.core.datasets import helpers_cpp, utils

    del helpers_cpp  # imported to fail here, with its name, if the wheel lacks it
    utils.compile_helpers = lambda: None


def _arguments(collectives: str | None) -> Any:
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import get_tokenizer, set_global_variables

    from flagscale_train.worker import lora
    from flagscale_train.worker.megatron import adopt

    args = parse_args(lora.add_arguments)
    if collectives is not None:
        args.distributed_backend = collectives
    validate_args(args)
    # Megatron averages held-out losses of --sft over micro-batches, whatever their answers count; the mean
    # over tokens does not depend on the layout.
    args.trains_on_chats, args.sft = args.sft, False
    set_global_variables(args)
    vocab_size = get_tokenizer().vocab_size
    if vocab_size > args.padded_vocab_size:
        raise Refusal(
            f"padded_vocab_size: {args.padded_vocab_size}: the tokenizer has {vocab_size} tokens, so some "
            "would have no embedding: raise it, or remove it to have it computed"
        )
    adopt(args)
    return args


def _train(settings: Settings, journal: Journal) -> None:
    arguments = prepare(settings)
    from flagscale_train.worker import datasets, experts, megatron, step
    from flagscale_train.worker.guard import Guard, RollBack
    from flagscale_train.worker.recorder import Recorder
    from flagscale_train.worker.resume import Keeper

    args = arguments()
    recorder = Recorder(journal, settings.peak_flops)
    recorder.attach()
    Guard(settings, recorder).attach()
    keeper = Keeper(recorder, settings.keep_last)
    keeper.attach()
    megatron.mend()
    experts.share_state()
    try:
        megatron.train(args, datasets.provide, step.forward, settings.num_roll_backs)
    except RollBack as bad:
        _start_again(settings, args, keeper.newest(), bad, recorder)
    except SystemExit as ending:
        if ending.code in (None, 0):
            recorder.end()
        raise
    recorder.end()


def _start_again(
    settings: Settings, args: Any, newest: Choice, bad: RollBack, recorder: Recorder
) -> NoReturn:
    """Become a new process that resumes from the newest whole checkpoint, without the data seen since.

    All ranks do this at once, and torchrun sees the same processes go on.
    """
    left_out = range(newest.iteration + 1, bad.iteration + 1)
    where = newest.path or "the beginning"
    recorder.write(
        "notice",
        text=f"{bad}: rolling back to {where}, leaving out the data of steps {left_out[0]} to {left_out[-1]}",
    )
    for child in multiprocessing.active_children():  # data loaders and writers do not outlive their parent
        child.terminate()
        child.join()
    skip = sorted({*(args.iterations_to_skip or ()), *left_out})
    os.environ[ROLL_BACKS] = str(settings.num_roll_backs + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    words = [*sys.argv[1:], "--iterations-to-skip", *map(str, skip)]
    os.execv(sys.executable, [sys.executable, "-m", "flagscale_train.worker", *words])  # noqa: S606 -- no shell


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
