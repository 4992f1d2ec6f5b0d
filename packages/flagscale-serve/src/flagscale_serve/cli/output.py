"""What the verbs share: a parser with the common options, words for people, and Ctrl-C."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

__all__ = ["INTERRUPTED", "add", "finite", "interrupt_on_signals", "say", "seconds", "word"]

INTERRUPTED = 130


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


def interrupt_on_signals() -> None:
    """Let a polite kill and a closed terminal end the run as Ctrl-C does."""

    def interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


def say(text: str) -> None:
    """Tell a person something that is not the command's result."""
    print(text, file=sys.stderr, flush=True)
