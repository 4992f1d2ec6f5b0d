"""What the verbs share: how numbers are read, and facts and progress printed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["positive", "print_json", "show_progress", "write_events"]


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def print_json(value: Any) -> None:
    """Print plain data."""
    print(json.dumps(value, indent=2))


@contextmanager
def show_progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar in bytes with rate and time left; nothing when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def write_events() -> Iterator[Callable[[int, int], None]]:
    """Write progress to stderr as a line of JSON each second and at the end."""
    started = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < 1 and done != total:
            return
        told = now
        rate = done / max(now - started, 1e-9)
        left = round((total - done) / rate, 1) if rate else None
        event = {"event": "progress", "done_bytes": done, "total_bytes": total}
        print(json.dumps({**event, "bytes_per_second": round(rate), "seconds_left": left}), file=sys.stderr)

    yield tell
