"""Open files once and read them at positions, from any thread."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from flagscale_convert.errors import SourceDamaged, SourceNotFound

__all__ = ["PositionedFiles"]


class PositionedFiles:
    """The files of one checkpoint directory, each opened on first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, name: str) -> int:
        """Open a file of the directory, or give the descriptor it has already.

        Raises:
            SourceNotFound: no such file, or it may not be read.
        """
        with self._lock:
            if name not in self._descriptors:
                path = self.directory / name
                try:
                    self._descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise SourceNotFound(
                        f"{path}: cannot be opened ({error.strerror}): the checkpoint needs it: copy it again"
                    ) from error
            return self._descriptors[name]

    def size(self, name: str) -> int:
        """Length of a file in bytes."""
        return os.fstat(self.descriptor(name)).st_size

    def read_into(self, name: str, offset: int, out: np.ndarray, *, what: str) -> None:
        """Fill a contiguous uint8 array from a position.

        Raises:
            SourceDamaged: the file ends before that.
        """
        descriptor = self.descriptor(name)
        view = memoryview(out).cast("B")
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise SourceDamaged(
                    f"{self.directory / name}: {what}: reading at byte {offset + done} failed"
                    f" ({error.strerror})"
                ) from error
            if count == 0:
                raise SourceDamaged(
                    f"{self.directory / name}: {what} needs bytes {offset} to {offset + len(view)}, the file"
                    " ends at"
                    f" {self.size(name)}: it is truncated: copy the checkpoint again, or use an older"
                    " iteration"
                )
            done += count

    def close(self) -> None:
        """Close every file; using the object again opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
