"""Show a machine again and again, until somebody has seen enough. Plain terminal codes, no curses."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from flagscale_hw.machine import Machine
from flagscale_hw.report import report
from flagscale_hw.table import render, style_for

__all__ = ["watch"]

_HOME = "\x1b[H"
_CLEAR_LINE = "\x1b[K"
_CLEAR_BELOW = "\x1b[J"
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_CLEAR = "\x1b[2J"


def watch(
    look: Callable[[], Machine],
    *,
    interval_s: float = 1.0,
    once: bool = False,
    as_json: bool = False,
    out: TextIO | None = None,
) -> None:
    """Print what `look` sees, every `interval_s` seconds, until it is interrupted.

    On a terminal the picture is redrawn in place; elsewhere pictures follow each other. A card that drops off
    does not end it: the next picture shows what is left.

    Args:
        look: describes the machine; it may take its time, pictures then come at its pace.
        interval_s: seconds from the beginning of one look to the beginning of the next.
        once: one picture, then return.
        as_json: one `flagscale-hw/1` document per line.
        out: where to; standard output when None.

    Raises:
        KeyboardInterrupt: as Ctrl-C does; the terminal is in order then.
    """
    out = sys.stdout if out is None else out
    is_live = out.isatty() and not once and not as_json
    with _own_screen(out) if is_live else _nothing():
        while True:
            started = time.monotonic()
            out.write(_picture(look(), out, as_json=as_json, is_live=is_live))
            out.flush()
            if once:
                return
            time.sleep(max(0.0, interval_s - (time.monotonic() - started)))


def _picture(machine: Machine, out: TextIO, *, as_json: bool, is_live: bool) -> str:
    if as_json:
        return json.dumps(report(machine), ensure_ascii=False) + "\n"
    text = "\n".join(
        [time.strftime("%Y-%m-%d %H:%M:%S"), render(machine, style_for(out)), *_warnings(machine)]
    )
    if not is_live:
        return text + "\n\n"
    # Every line is cleared as it is written: clearing the screen first would flicker.
    return _HOME + "".join(f"{line}{_CLEAR_LINE}\n" for line in text.splitlines()) + _CLEAR_BELOW


def _warnings(machine: Machine) -> list[str]:
    return [f"warning: {problem}" for problem in machine.problems]


@contextmanager
def _own_screen(out: TextIO) -> Iterator[None]:
    out.write(_CLEAR + _HIDE_CURSOR)
    try:
        yield
    finally:
        out.write(_SHOW_CURSOR)
        out.flush()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
