"""Reads and writes Megatron's indexed dataset: token ids in `PREFIX.bin`, where each lies in `PREFIX.idx`.

The format is megatron-core's (`core/datasets/indexed_dataset.py`): little endian, 9 bytes magic, version 1, a
type code, counts, then the lengths (int32) and the byte offsets (int64) of the sequences, and the documents'
boundaries (int64). `data tokenize` writes one sequence for each document; other tools may write several.
Both files are written beside their names and renamed when complete, `.idx` last: where there is an `.idx`,
the pair is whole.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TextIO, TypeVar

from flagscale_train.data.facts import facts_file
from flagscale_train.errors import InvalidInput

__all__ = [
    "DTYPES",
    "Checksums",
    "IndexedDataset",
    "IndexedWriter",
    "Sizes",
    "discard_partial",
    "files_of",
    "prefix_of",
    "typecode_for",
]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_CODE = {"H": 8, "i": 4, "q": 5, "h": 3}
"""Megatron's type code by array typecode."""
DTYPES = {"H": "uint16", "i": "int32", "q": "int64", "h": "int16"}
"""Names of the types ids can be stored with, by array typecode."""
_UINT16_BELOW = 65500
"""Megatron stores ids as uint16 if the vocabulary is smaller than this, as int32 otherwise."""
_CHUNK = 1 << 16
_SMALL_INDEX_BYTES = 1 << 22
"""Some 200,000 documents, whose index is read and checked in a tenth of a second."""


def typecode_for(vocab_size: int) -> str:
    """Return the array typecode ids are stored with: `H` (uint16) or `i` (int32)."""
    return "H" if vocab_size < _UINT16_BELOW else "i"


def files_of(prefix: Path) -> tuple[Path, Path]:
    """Return the `.bin` and `.idx` paths of a prefix; dots in the prefix's name are kept."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def prefix_of(path: Path) -> Path:
    """Return the prefix of a dataset that was named by it or by one of its files."""
    return path.with_name(path.name.removesuffix(".bin").removesuffix(".idx"))


@dataclass(frozen=True)
class Sizes:
    """How large a dataset is."""

    typecode: str
    num_sequences: int
    num_documents: int
    num_tokens: int

    @classmethod
    def glance(cls, prefix: Path) -> Sizes:
        """Read as much of an index as takes no time: all of a small one, the ends of a large one.

        Raises:
            InvalidInput: a file is missing, or what was read of them is not of a whole dataset.
        """
        index_path = files_of(prefix_of(prefix))[1]
        if not index_path.exists() or index_path.stat().st_size <= _SMALL_INDEX_BYTES:
            return IndexedDataset.open(prefix).sizes
        return _opened(prefix_of(prefix), _ends)


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
        prefix = prefix_of(prefix)
        return cls(prefix, *_opened(prefix, _whole))

    @property
    def sizes(self) -> Sizes:
        """What `glance` says of it too."""
        return Sizes(self.typecode, len(self.lengths), self.num_documents, self.num_tokens)

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


_Read = TypeVar("_Read")


def _opened(prefix: Path, read: Callable[[BinaryIO, int], _Read]) -> _Read:
    """Read an index, told the size of the ids' file beside it; turn what is wrong into an error."""
    bin_path, index_path = files_of(prefix)
    try:
        with index_path.open("rb") as index:
            return read(index, bin_path.stat().st_size)
    except OSError as error:
        raise InvalidInput(
            f"{error.filename}: {error.strerror}: give the path of a dataset without .bin or .idx"
        ) from None
    except (ValueError, struct.error) as error:
        raise InvalidInput(
            f"{index_path}: {error}: not a whole dataset of Megatron's format: make it again"
        ) from None


@dataclass(frozen=True)
class _Header:
    """The beginning of an index, found to fit the file's length."""

    typecode: str
    count: int
    num_boundaries: int

    @classmethod
    def read(cls, index: BinaryIO) -> _Header:
        """Read it and stay behind it.

        Raises:
            ValueError: with what is wrong.
            struct.error: the header is cut off.
        """
        if index.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("does not begin as an index does")
        version, code, count, num_boundaries = _HEADER.unpack(index.read(_HEADER.size))
        typecode = next((name for name, known in _CODE.items() if known == code), None)
        if version != 1 or typecode is None:
            raise ValueError(f"version {version} with type code {code} is not known")
        found = cls(typecode, count, num_boundaries)
        size = os.fstat(index.fileno()).st_size
        # Megatron's datasets of several modalities have one byte more for each sequence.
        if size not in (found.end, found.end + count):
            raise ValueError(f"has {size} bytes, its counts need {found.end}")
        return found

    @property
    def start(self) -> int:
        """Byte at which the lengths begin."""
        return len(_MAGIC) + _HEADER.size

    @property
    def end(self) -> int:
        """Byte at which the boundaries end."""
        return self.start + 12 * self.count + 8 * self.num_boundaries


def _whole(index: BinaryIO, num_bytes: int) -> tuple[str, array[int], array[int]]:
    """Return typecode, lengths and boundaries; raises ValueError."""
    header = _Header.read(index)
    lengths, offsets, boundaries = array("i"), array("q"), array("q")
    lengths.frombytes(index.read(4 * header.count))
    offsets.frombytes(index.read(8 * header.count))
    boundaries.frombytes(index.read(8 * header.num_boundaries))
    _check(lengths, offsets, boundaries, array(header.typecode).itemsize, num_bytes)
    return header.typecode, lengths, boundaries


def _ends(index: BinaryIO, num_bytes: int) -> Sizes:
    """Return the sizes after a look at the header and the last entries; raises ValueError."""
    header = _Header.read(index)
    item_size = array(header.typecode).itemsize
    places = (header.start + 4 * header.count - 4, header.start + 12 * header.count - 8, header.end - 8)
    last: list[int] = []
    for place, shape in zip(places, ("<i", "<q", "<q"), strict=True):
        index.seek(place)
        last += struct.unpack(shape, index.read(struct.calcsize(shape)))
    length, offset, boundary = last
    if offset + length * item_size != num_bytes:
        raise ValueError(f"the ids need {offset + length * item_size} bytes, their file has {num_bytes}")
    if boundary != header.count:
        raise ValueError("the boundaries of documents do not cover the sequences")
    return Sizes(header.typecode, header.count, header.num_boundaries - 1, num_bytes // item_size)


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


@dataclass(frozen=True)
class Checksums:
    """SHA-256 of the two files of a dataset, in hexadecimal."""

    bin: str
    idx: str

    @classmethod
    def of(cls, prefix: Path, count: Callable[[int], None]) -> Checksums:
        """Read both files; `count` is told the size of every piece read.

        Raises:
            OSError: a file cannot be read.
        """
        return cls(*(_sha256_of(path, count) for path in files_of(prefix)))


def _sha256_of(path: Path, count: Callable[[int], None]) -> str:
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            found.update(piece)
            count(len(piece))
    return found.hexdigest()


def _partial_files(prefix: Path) -> tuple[Path, ...]:
    return tuple(path.with_name(path.name + ".partial") for path in (*files_of(prefix), facts_file(prefix)))


def discard_partial(prefix: Path) -> None:
    """Delete what an attempt to write a dataset left."""
    for path in _partial_files(prefix):
        path.unlink(missing_ok=True)


class IndexedWriter:
    """Writes one dataset; a context manager that keeps it on success and removes every trace on failure."""

    def __init__(self, prefix: Path, typecode: str, *, keeps_partial: bool = False) -> None:
        """Start the files of `prefix`, whose ids are stored as `typecode`.

        Args:
            prefix: path without `.bin` and `.idx`.
            typecode: `H`, `i`, `q` or `h`.
            keeps_partial: leave what was written where it fails, and go on with what an attempt before left;
                `take_over` says how much of that is good.

        Raises:
            OSError: the files cannot be created.
        """
        if sys.byteorder != "little":  # pragma: no cover -- no such machine is supported by torch either
            raise OSError("indexed datasets are little endian: this machine is not")
        self._typecode = typecode
        self._item_size = array(typecode).itemsize
        self._keeps_partial = keeps_partial
        self._prefix = prefix
        self._final = (*files_of(prefix), facts_file(prefix))
        self._partial = _partial_files(prefix)
        self._lengths = array("i")
        self._boundaries = array("q", [0])
        self._num_bytes = 0
        self._sha256 = hashlib.sha256()
        self._checksums: Checksums | None = None
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = self._open()

    def _open(self) -> BinaryIO:
        partial, final = self._partial[0], self._final[0]
        if not self._keeps_partial:
            return partial.open("wb")
        if not partial.exists() and final.exists() and not self._final[1].exists():
            final.replace(partial)  # killed between the renames
        return os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._boundaries) - 1

    def take_over(self, lengths: Sequence[int], is_good: Callable[[bytes], bool]) -> bool:
        """Keep the next documents that an attempt before left, where `is_good` says so of their ids.

        Args:
            lengths: how many ids each has.
            is_good: told the ids, as bytes; fewer than the lengths need where the file ends before.

        Returns:
            Whether they were kept; after False, and after the last, call `cut`.
        """
        tokens = self._bin.read(sum(lengths) * self._item_size)
        if not is_good(tokens):
            return False
        self._account(tokens, lengths)
        return True

    def cut(self) -> None:
        """Drop what follows the documents that were kept."""
        self._bin.seek(self._num_bytes)
        self._bin.truncate()

    def add(self, tokens: bytes, lengths: Sequence[int]) -> None:
        """Append documents of one sequence each, and hand them to the operating system.

        Args:
            tokens: their ids one after another, as bytes of the dataset's type.
            lengths: how many ids each has; at least 1.
        """
        self._bin.write(tokens)
        self._bin.flush()
        self._account(tokens, lengths)

    def _account(self, tokens: bytes, lengths: Sequence[int]) -> None:
        self._num_bytes += len(tokens)
        self._sha256.update(tokens)
        before = len(self._lengths)
        self._lengths.extend(lengths)
        self._boundaries.extend(range(before + 1, len(self._lengths) + 1))

    def add_dataset(self, dataset: IndexedDataset) -> Iterator[bytes]:
        """Append another dataset with its documents as they are; yields every piece copied.

        Args:
            dataset: of the same type of ids.
        """
        for piece in dataset.pieces():
            self._bin.write(piece)
            self._sha256.update(piece)
            yield piece
        before = len(self._lengths)
        self._lengths.extend(dataset.lengths)
        self._boundaries.extend(before + boundary for boundary in dataset.boundaries[1:])

    def seal(self) -> Checksums:
        """Finish both files, under their partial names; nothing can be added after it."""
        _settle(self._bin)
        with self._partial[1].open("w+b") as index:
            self._write_index(index)
            _settle(index)
            index.seek(0)
            sha256 = hashlib.file_digest(index, "sha256").hexdigest()
        self._checksums = Checksums(self._sha256.hexdigest(), sha256)
        return self._checksums

    def describe(self, facts: str) -> None:
        """Say what the text of the JSON beside the dataset is; without it there will be none."""
        with self._partial[2].open("w", encoding="utf-8") as stream:
            stream.write(facts)
            _settle(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        is_complete = False
        try:
            if kind is None:
                self._finish()
                is_complete = True
        finally:
            # Closing flushes, and on a full disk fails once more; the files must go all the same.
            try:
                self._bin.close()
            finally:
                if is_complete or not self._keeps_partial:
                    discard_partial(self._prefix)

    def _finish(self) -> None:
        if self._checksums is None:
            self.seal()
        ids, index, facts = self._final
        index.unlink(missing_ok=True)  # an old index must not describe the new data
        self._partial[0].replace(ids)
        if self._partial[2].exists():
            self._partial[2].replace(facts)
        else:
            facts.unlink(missing_ok=True)
        self._partial[1].replace(index)

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


def _settle(stream: BinaryIO | TextIO) -> None:
    """Make the disk say now whether it holds what was written."""
    stream.flush()
    os.fsync(stream.fileno())
