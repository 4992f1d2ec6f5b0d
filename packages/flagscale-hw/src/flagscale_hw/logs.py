"""Read the logs of a run: every process, by name, to the end or for as long as the run lasts."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LogLine", "follow_logs", "read_logs", "set_aside"]

_CHUNK_BYTES = 256 * 1024
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of one process."""

    process: str
    text: str
    """Without the line's end; bytes that are not UTF-8 are replaced."""


class _Reader:
    """The unread part of one log file."""

    def __init__(self, process: str, path: Path, last: int | None) -> None:
        self._process = process
        self._path = path
        self._offset = 0 if last is None else _begin_of_last(path, last)
        self._rest = b""

    def new_lines(self) -> Iterator[LogLine]:
        """Yield every whole line that has been added since the last call."""
        while data := self._read():
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                yield self._line(line)

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0  # set aside and begun again
                file.seek(self._offset)
                data = file.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        return data

    def last_line(self) -> Iterator[LogLine]:
        """Yield the line that nobody ended, if there is one."""
        if self._rest:
            yield self._line(self._rest)
            self._rest = b""

    def _line(self, raw: bytes) -> LogLine:
        return LogLine(self._process, raw.decode(errors="replace").rstrip("\r"))


def _begin_of_last(path: Path, count: int) -> int:
    """Return where the last lines of a file begin, reading no more; a line that nobody ended counts too."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return 0
    with file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0 and count > 0:
            size = min(_CHUNK_BYTES, position)
            position -= size
            file.seek(position)
            data = file.read(size)
            # The end of the last line begins no other one.
            at = size - 1 if position + size == end and data.endswith(b"\n") else size
            while count > 0 and (at := data.rfind(b"\n", 0, at)) >= 0:
                count -= 1
            if count == 0:
                return position + at + 1
        return position if count > 0 else end


def read_logs(files: dict[str, Path], last: int | None = None) -> Iterator[LogLine]:
    """Yield what the logs hold now, or the last lines of each, one process after the other."""
    for reader in [_Reader(process, path, last) for process, path in files.items()]:
        yield from reader.new_lines()
        yield from reader.last_line()


def follow_logs(
    files: dict[str, Path], is_over: Callable[[], bool], last: int | None = None
) -> Iterator[LogLine]:
    """Yield what the logs hold and what is added to them, merged as it comes, until the run is over.

    Args:
        files: process -> log file; a file may not exist yet.
        is_over: asked before each look at the files, so that nothing written before the end is missed.
        last: begin with so many lines of each file; None: with the first line.
    """
    readers = [_Reader(process, path, last) for process, path in files.items()]
    while True:
        ended = is_over()
        num_lines = 0
        for reader in readers:
            for line in reader.new_lines():
                num_lines += 1
                yield line
        if ended:
            break
        if num_lines == 0:
            time.sleep(_POLL_S)
    for reader in readers:
        yield from reader.last_line()


def set_aside(log: Path, limit_bytes: int) -> bool:
    """Copy a log that has grown beyond a limit to `<log>.1` and empty it; tell whether that was done.

    The writer keeps its handle, which appends, and never notices. What it writes between the copy and the
    emptying is lost: a few lines at most, against a full disk.
    """
    try:
        if log.stat().st_size <= limit_bytes:
            return False
        beside = log.with_name(f".{log.name}.1")
        shutil.copyfile(log, beside)
        os.truncate(log, 0)
        beside.replace(log.with_name(f"{log.name}.1"))
    except OSError:
        return False  # missing, or a disk without room for the copy: the log goes on growing
    return True
