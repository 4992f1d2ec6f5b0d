"""Show a machine again and again, until somebody has seen enough. Plain terminal codes, no curses."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO

from flagscale_hw.machine import Machine
from flagscale_hw.report import report
from flagscale_hw.table import render, style_for

__all__ = ["COLUMNS", "Form", "watch"]

Form = Literal["table", "json", "csv"]
COLUMNS = (
    "time",
    "chip",
    "index",
    "name",
    "utilisation_percent",
    "memory_used_bytes",
    "memory_total_bytes",
    "temperature_c",
    "power_w",
    "health",
)
"""The header of `csv`: when, and what of `Device`."""

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
    form: Form = "table",
    out: TextIO | None = None,
) -> None:
    """Print what `look` sees, every `interval_s` seconds, until it is interrupted.

    On a terminal the picture is redrawn in place; elsewhere pictures follow each other. A card that drops off
    does not end it: the next picture shows what is left.

    Args:
        look: describes the machine; it may take its time, pictures then come at its pace.
        interval_s: seconds from the beginning of one look to the beginning of the next.
        once: one picture, then return.
        form: a table; `json`: one `flagscale-hw/1` document per line; `csv`: a header, then one line per
            device and look, empty where nothing is known.
        out: where to; standard output when None.

    Raises:
        KeyboardInterrupt: as Ctrl-C does; the terminal is in order then.
    """
    out = sys.stdout if out is None else out
    is_live = out.isatty() and not once and form == "table"
    if form == "csv":
        out.write(_line(COLUMNS))
    with _own_screen(out) if is_live else _nothing():
        while True:
            started = time.monotonic()
            out.write(_picture(look(), out, form=form, is_live=is_live))
            out.flush()
            if once:
                return
            time.sleep(max(0.0, interval_s - (time.monotonic() - started)))


def _picture(machine: Machine, out: TextIO, *, form: Form, is_live: bool) -> str:
    if form == "json":
        return json.dumps(report(machine), ensure_ascii=False) + "\n"
    if form == "csv":
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return "".join(
            _line([now, *(getattr(device, name) for name in COLUMNS[1:])])
            for device in (*machine.devices, *machine.others)
        )
    text = "\n".join(
        [time.strftime("%Y-%m-%d %H:%M:%S"), render(machine, style_for(out)), *_warnings(machine)]
    )
    if not is_live:
        return text + "\n\n"
    # Every line is cleared as it is written: clearing the screen first would flicker.
    return _HOME + "".join(f"{line}{_CLEAR_LINE}\n" for line in text.splitlines()) + _CLEAR_BELOW


def _line(cells: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


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
