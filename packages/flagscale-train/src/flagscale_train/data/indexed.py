"""Reads and writes Megatron's indexed dataset: token ids in `PREFIX.bin`, where each lies in `PREFIX.idx`.

The format is megatron-core's (`core/datasets/indexed_dataset.py`): little endian, 9 bytes magic, version 1, a
type code, counts, then the lengths (int32) and the byte offsets (int64) of the sequences, and the documents'
boundaries (int64). `data tokenize` writes one sequence for each document; other tools may write several.
Both files are written beside their names and renamed when complete, `.idx` last: where there is an `.idx`,
the pair is whole.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from flagscale_train.errors import InvalidInput

__all__ = ["DTYPES", "IndexedDataset", "IndexedWriter", "files_of", "typecode_for"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_CODE = {"H": 8, "i": 4, "q": 5, "h": 3}
"""Megatron's type code by array typecode."""
DTYPES = {"H": "uint16", "i": "int32", "q": "int64", "h": "int16"}
"""Names of the types ids can be stored with, by array typecode."""
_UINT16_BELOW = 65500
"""Megatron stores ids as uint16 if the vocabulary is smaller than this, as int32 otherwise."""
_CHUNK = 1 << 16


def typecode_for(vocab_size: int) -> str:
    """Return the array typecode ids are stored with: `H` (uint16) or `i` (int32)."""
    return "H" if vocab_size < _UINT16_BELOW else "i"


def files_of(prefix: Path) -> tuple[Path, Path]:
    """Return the `.bin` and `.idx` paths of a prefix; dots in the prefix's name are kept."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class IndexedDataset:
    """A dataset whose index was read and found whole; the ids stay on the disk."""

    prefix: Path
    typecode: str
    lengths: array[int]
    """Ids of each sequence."""
    boundaries: array[int]
    """Where each document begins, counted in sequences, and the number of sequences at the end."""

    @classmethod
    def open(cls, prefix: Path) -> IndexedDataset:
        """Read the index of `prefix` and compare it with the ids' file.

        Raises:
            InvalidInput: a file is missing, or they are not a whole dataset.
        """
        prefix = prefix.with_name(prefix.name.removesuffix(".bin").removesuffix(".idx"))
        bin_path, index_path = files_of(prefix)
        try:
            index, num_bytes = index_path.read_bytes(), bin_path.stat().st_size
        except OSError as error:
            raise InvalidInput(
                f"{error.filename}: {error.strerror}: give the path of a dataset without .bin or .idx"
            ) from None
        try:
            return cls(prefix, *_parse(index, num_bytes))
        except (ValueError, struct.error) as error:
            raise InvalidInput(
                f"{index_path}: {error}: not a whole dataset of Megatron's format: make it again"
            ) from None

    @property
    def num_tokens(self) -> int:
        """Ids of all sequences."""
        return sum(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents, of one sequence or more each."""
        return len(self.boundaries) - 1

    @property
    def item_size(self) -> int:
        """Bytes of one id."""
        return array(self.typecode).itemsize

    def pieces(self, size: int = 1 << 24) -> Iterator[bytes]:
        """Yield the ids' file in pieces of at most `size` bytes, each of whole ids."""
        with files_of(self.prefix)[0].open("rb") as stream:
            while piece := stream.read(size):
                yield piece

    def ids_of(self, document: int) -> list[int]:
        """Return the ids of one document."""
        first, last = self.boundaries[document], self.boundaries[document + 1]
        ids = array(self.typecode)
        with files_of(self.prefix)[0].open("rb") as stream:
            stream.seek(sum(self.lengths[:first]) * self.item_size)
            ids.frombytes(stream.read(sum(self.lengths[first:last]) * self.item_size))
        return ids.tolist()


def _parse(index: bytes, num_bytes: int) -> tuple[str, array[int], array[int]]:
    """Return typecode, lengths and boundaries.

    Raises:
        ValueError: with what is wrong.
        struct.error: the header is cut off.
    """
    if not index.startswith(_MAGIC):
        raise ValueError("does not begin as an index does")
    version, code, count, num_boundaries = _HEADER.unpack_from(index, len(_MAGIC))
    typecode = next((name for name, known in _CODE.items() if known == code), None)
    if version != 1 or typecode is None:
        raise ValueError(f"version {version} with type code {code} is not known")
    start = len(_MAGIC) + _HEADER.size
    ends = [start + 4 * count, start + 12 * count, start + 12 * count + 8 * num_boundaries]
    # Megatron's datasets of several modalities have one byte more for each sequence.
    if len(index) not in (ends[2], ends[2] + count):
        raise ValueError(f"has {len(index)} bytes, its counts need {ends[2]}")
    lengths, offsets, boundaries = array("i"), array("q"), array("q")
    lengths.frombytes(index[start : ends[0]])
    offsets.frombytes(index[ends[0] : ends[1]])
    boundaries.frombytes(index[ends[1] : ends[2]])
    _check(lengths, offsets, boundaries, array(typecode).itemsize, num_bytes)
    return typecode, lengths, boundaries


def _check(
    lengths: array[int], offsets: array[int], boundaries: array[int], item_size: int, num_bytes: int
) -> None:
    expected = 0
    for number, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
        if length < 0 or offset != expected:
            raise ValueError(f"sequence {number} is said to lie at byte {offset}, not at {expected}")
        expected += length * item_size
    if expected != num_bytes:
        raise ValueError(f"the ids need {expected} bytes, their file has {num_bytes}")
    is_ordered = all(left <= right for left, right in pairwise(boundaries))
    if not boundaries or boundaries[0] != 0 or boundaries[-1] != len(lengths) or not is_ordered:
        raise ValueError("the boundaries of documents do not cover the sequences")


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
        self._boundaries = array("q", [0])
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = self._partial[0].open("wb")

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._boundaries) - 1

    def add(self, tokens: bytes, lengths: Sequence[int]) -> None:
        """Append documents of one sequence each.

        Args:
            tokens: their ids one after another, as bytes of the dataset's type.
            lengths: how many ids each has; at least 1.
        """
        self._bin.write(tokens)
        before = len(self._lengths)
        self._lengths.extend(lengths)
        self._boundaries.extend(range(before + 1, len(self._lengths) + 1))

    def add_dataset(self, dataset: IndexedDataset) -> Iterator[int]:
        """Append another dataset with its documents as they are; yields the bytes of every piece copied.

        Args:
            dataset: of the same type of ids.
        """
        for piece in dataset.pieces():
            self._bin.write(piece)
            yield len(piece)
        before = len(self._lengths)
        self._lengths.extend(dataset.lengths)
        self._boundaries.extend(before + boundary for boundary in dataset.boundaries[1:])

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
        index.write(_MAGIC + _HEADER.pack(1, _CODE[self._typecode], count, len(self._boundaries)))
        index.write(self._lengths.tobytes())
        offset = 0
        for start in range(0, count, _CHUNK):
            offsets = array("q")
            for length in self._lengths[start : start + _CHUNK]:
                offsets.append(offset)
                offset += length * self._item_size
            index.write(offsets.tobytes())
        index.write(self._boundaries.tobytes())


def _settle(stream: BinaryIO) -> None:
    """Make the disk say now whether it holds what was written."""
    stream.flush()
    os.fsync(stream.fileno())
