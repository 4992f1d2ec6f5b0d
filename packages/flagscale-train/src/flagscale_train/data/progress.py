"""A progress bar in bytes; nothing at all where the output is not a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]


class Progress:
    """Shows how far work on a known number of bytes is, with rate and remaining time."""

    def __init__(self, what: str, num_bytes: int) -> None:
        """Prepare the bar for `num_bytes` of input; `what` is shown before it."""
        self._what, self._num_bytes = what, num_bytes
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(binary_units=True),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._num_bytes)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """Count `num_bytes` more as done."""
        if self._bar is not None:
            self._bar.advance(self._task, num_bytes)
