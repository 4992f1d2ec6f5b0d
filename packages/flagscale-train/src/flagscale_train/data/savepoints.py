"""How far a dataset in the making is whole, so that an interrupted `data tokenize` goes on from there.

`PREFIX.savepoints.partial` holds one line of JSON for what was asked, then one for each batch of documents
whose ids are in `PREFIX.bin.partial`, with a checksum of them. Nothing is forced to the disk on the way:
after a crash of the machine a batch counts if its ids have their checksum, and the rest is made again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from flagscale_train.errors import InvalidInput

__all__ = ["Batch", "Savepoints", "checksum", "difference", "request_sha256"]


def checksum(tokens: bytes, lengths: Sequence[int]) -> int:
    """Return the CRC-32 of a batch: of its ids, then of the documents' lengths."""
    return zlib.crc32(array("i", lengths).tobytes(), zlib.crc32(tokens))


def request_sha256(request: Mapping[str, Any]) -> str:
    """Return what tells one request from another."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def difference(begun: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """Say by what an attempt that was begun differs from what is asked now."""
    if begun.get("tokenizer") != request["tokenizer"]:
        return "another --tokenizer"
    for name, option in {"key": "--key", "end": "the end of documents", "tokenizers": "tokenizers"}.items():
        if begun.get(name) != request[name]:
            return f"{option} {begun.get(name)} (now {request[name]})"
    before = {path: state for path, *state in begun.get("inputs", ())}
    for path, *state in request["inputs"]:
        if before.get(path) != state:
            return f"{path} as it was before" if path in before else f"other inputs ({path} is new)"
    gone = before.keys() - {path for path, *_ in request["inputs"]}
    return f"other inputs ({min(gone)} is gone)" if gone else "its inputs in another order"


@dataclass(frozen=True)
class Batch:
    """Documents that were tokenized together, without their ids."""

    lengths: list[int]
    """Ids of each document that has any."""
    num_empty: int
    num_bytes: int
    max_token: int
    checksum: int

    @property
    def num_read(self) -> int:
        """Documents of the input, empty ones too."""
        return len(self.lengths) + self.num_empty

    def is_of(self, tokens: bytes) -> bool:
        """Tell whether these ids are the batch's."""
        return checksum(tokens, self.lengths) == self.checksum


class Savepoints:
    """The savepoints of one dataset, held by one process at a time; a context manager."""

    def __init__(self, prefix: Path) -> None:
        """Open the savepoints of `prefix`, which need not exist.

        Raises:
            InvalidInput: another process is making this dataset.
            OSError: the file cannot be made.
        """
        self._path = prefix.with_name(prefix.name + ".savepoints.partial")
        self._descriptor = self._locked()
        self._end = 0

    def _locked(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                    return descriptor
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return descriptor  # a file system without locks
                os.close(descriptor)
                raise InvalidInput(
                    f"--output: {self._path}: another process is making this dataset: wait for it, or give "
                    "another --output"
                ) from None
            os.close(descriptor)  # whoever held it has just finished and deleted it

    @property
    def request(self) -> dict[str, Any] | None:
        """What the interrupted attempt was asked for; None if there was none."""
        with self._reader() as lines:
            return _parsed(lines.readline())

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the interrupted attempt; `cut` after the last one that is good."""
        with self._reader() as lines:
            self._end = len(lines.readline())
            for line in lines:
                try:
                    batch = Batch(**(_parsed(line) or {}))
                except TypeError:
                    return
                yield batch
                self._end += len(line)

    def _reader(self) -> BinaryIO:
        """Read from the beginning; a new reader each time, because old ones hold what was there before."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return os.fdopen(self._descriptor, "rb", closefd=False)

    def cut(self) -> None:
        """Forget what follows the batches that were taken."""
        os.ftruncate(self._descriptor, self._end)

    def begin(self, request: Mapping[str, Any]) -> None:
        """Forget everything, and note what is asked."""
        os.ftruncate(self._descriptor, 0)
        self._end = 0
        try:
            self._append(request)
        except OSError:
            os.ftruncate(self._descriptor, 0)
            raise

    def add(self, batch: Batch) -> None:
        """Note one more batch, whose ids have been handed to the operating system."""
        self._append(asdict(batch))

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        written = 0
        while written < len(line):
            written += os.pwrite(self._descriptor, line[written:], self._end + written)
        self._end += len(line)

    def discard(self) -> None:
        """Delete the savepoints: the dataset is complete, or will never be."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if os.fstat(self._descriptor).st_size == 0:
            self.discard()
        os.close(self._descriptor)


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None  # torn by a kill
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
