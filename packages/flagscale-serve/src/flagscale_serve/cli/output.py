"""What the verbs share: a parser with the common options, words for people, and Ctrl-C."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from flagscale_serve.runs import Options

__all__ = [
    "INTERRUPTED",
    "OVERRIDES",
    "add",
    "add_engine",
    "count",
    "engine_options",
    "finite",
    "interrupt_on_signals",
    "say",
    "seconds",
    "word",
]

INTERRUPTED = 130
OVERRIDES = "Hydra overrides of a file or recipe; options of a model, such as max_model_len=4096"


def add(
    verbs: Any, name: str, verb: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(verb=verb)
    return parser


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add what every verb takes that may start an engine; see `engine_options`."""
    parser.add_argument(
        "--engine",
        type=word,
        metavar="NAME",
        help="vllm, sglang, llama_cpp, transformers, or one that another package brings (default: the "
        "file's, else vllm on an accelerator and transformers on a CPU)",
    )
    parser.add_argument(
        "--python",
        type=word,
        metavar="PATH",
        help="interpreter that has the engine (default: $FLAGSCALE_SERVE_PYTHON, else the one running this)",
    )
    parser.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="until the first token (default: 1800)"
    )


def engine_options(arguments: argparse.Namespace, **more: Any) -> Options:
    """Return how to start, as `add_engine` read it, and more of it."""
    from flagscale_serve.plan import READY_TIMEOUT_S
    from flagscale_serve.runs import Options

    return Options(
        engine=arguments.engine,
        python=arguments.python,
        ready_timeout_s=READY_TIMEOUT_S if arguments.timeout is None else arguments.timeout,
        **more,
    )


def word(text: str) -> str:
    """Refuse an empty word: `--host "$HOST"` without such a variable is no wish for the default."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty: give a value, or leave it out")
    return text


def finite(text: str) -> float:
    """Read a number; `nan` and `inf` are none that a server could be sent."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number")
    return number


def seconds(text: str) -> float:
    """Read a time."""
    if (number := finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, 0 or more")
    return number


def count(text: str) -> int:
    """Read a number of things."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 0 or more")
    return int(text)


def interrupt_on_signals() -> None:
    """Let a polite kill and a closed terminal end the run as Ctrl-C does."""

    def interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


def say(text: str) -> None:
    """Tell a person something that is not the command's result."""
    print(text, file=sys.stderr, flush=True)
