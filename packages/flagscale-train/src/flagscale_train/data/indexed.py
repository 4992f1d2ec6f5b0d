"""Writes Megatron's indexed dataset: token ids in `PREFIX.bin`, where each document lies in `PREFIX.idx`.

The format is megatron-core's (`core/datasets/indexed_dataset.py`): little endian, 9 bytes magic, version 1, a
type code, counts, then the lengths (int32), the byte offsets (int64) and the document boundaries (int64).
Both files are written beside their names and renamed when complete, `.idx` last: where there is an `.idx`,
the pair is whole.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

__all__ = ["IndexedWriter", "files_of", "typecode_for"]

_MAGIC = b"MMIDIDX\x00\x00"
_CODE = {"H": 8, "i": 4}
"""Megatron's type code by array typecode: uint16 and int32."""
_UINT16_BELOW = 65500
"""Megatron stores ids as uint16 if the vocabulary is smaller than this, as int32 otherwise."""
_CHUNK = 1 << 16


def typecode_for(vocab_size: int) -> str:
    """Return the array typecode ids are stored with: `H` (uint16) or `i` (int32)."""
    return "H" if vocab_size < _UINT16_BELOW else "i"


def files_of(prefix: Path) -> tuple[Path, Path]:
    """Return the `.bin` and `.idx` paths of a prefix; dots in the prefix's name are kept."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes one dataset; a context manager that keeps it on success and removes every trace on failure."""

    def __init__(self, prefix: Path, typecode: str) -> None:
        """Start the files of `prefix`, whose ids are stored as `typecode`.

        Raises:
            OSError: the files cannot be created.
        """
        if sys.byteorder != "little":  # pragma: no cover -- no such machine is supported by torch either
            raise OSError("indexed datasets are little endian: this machine is not")
        self._typecode = typecode
        self._item_size = array(typecode).itemsize
        self._final = files_of(prefix)
        self._partial = tuple(path.with_name(path.name + ".partial") for path in self._final)
        self._lengths = array("i")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = self._partial[0].open("wb")

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add(self, tokens: bytes, lengths: list[int]) -> None:
        """Append documents.

        Args:
            tokens: their ids one after another, as bytes of the dataset's type.
            lengths: how many ids each has; at least 1.
        """
        self._bin.write(tokens)
        self._lengths.extend(lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            # Closing flushes, and on a full disk fails once more; the files must go all the same.
            try:
                self._bin.close()
            finally:
                for path in self._partial:
                    path.unlink(missing_ok=True)

    def _finish(self) -> None:
        _settle(self._bin)
        with self._partial[1].open("wb") as index:
            self._write_index(index)
            _settle(index)
        self._final[1].unlink(missing_ok=True)  # an old index must not describe the new data
        for partial, final in zip(self._partial, self._final, strict=True):
            partial.replace(final)

    def _write_index(self, index: BinaryIO) -> None:
        count = len(self._lengths)
        index.write(_MAGIC + struct.pack("<QB", 1, _CODE[self._typecode]))
        index.write(struct.pack("<QQ", count, count + 1))
        index.write(self._lengths.tobytes())
        offset = 0
        for start in range(0, count, _CHUNK):
            offsets = array("q")
            for length in self._lengths[start : start + _CHUNK]:
                offsets.append(offset)
                offset += length * self._item_size
            index.write(offsets.tobytes())
        for start in range(0, count + 1, _CHUNK):
            index.write(array("q", range(start, min(start + _CHUNK, count + 1))).tobytes())


def _settle(stream: BinaryIO) -> None:
    """Make the disk say now whether it holds what was written."""
    stream.flush()
    os.fsync(stream.fileno())
