"""One `torch.save` archive inside a bigger file: find the raw bytes of its tensor, or write such an archive.

Every entry of a `.distcp` file is a complete, uncompressed zip of `data.pkl` (how to rebuild the tensor) and
`data/0` (its bytes). Reading needs the position of the second; writing needs a frame of known length around
bytes that come later. Neither needs torch.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flagscale_convert import unpickle
from flagscale_convert.errors import SourceDamaged, Unsupported
from flagscale_convert.tensors import TensorInfo, dtype_from_storage

__all__ = [
    "ArchiveFrame",
    "MemberFrame",
    "Payload",
    "SavedObject",
    "TensorFrame",
    "find_tensor",
    "object_archive",
    "open_object",
    "read_object",
]

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_MAX16 = 0xFFFF
_MAX32 = 0xFFFFFFFF
_ALIGNMENT = 64
_DOS_DATE_1980 = 0x21


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, by positioned reads (so threads can share the descriptor)."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(f"seek before the start ({base + offset})")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        data = os.pread(self._descriptor, wanted, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass(frozen=True, slots=True)
class Payload:
    """Where the bytes of a tensor lie in the file."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Archive:
    zip: zipfile.ZipFile
    root: str
    offset: int
    """Position of the archive in the file."""


def _open(descriptor: int, offset: int, length: int, where: str) -> _Archive:
    try:
        archive = zipfile.ZipFile(io.BufferedReader(_Window(descriptor, offset, length)))
    except (zipfile.BadZipFile, OSError, ValueError, struct.error) as error:
        raise SourceDamaged(
            f"{where}: no whole archive at byte {offset} ({error}): the file is truncated or corrupt:"
            " copy the checkpoint again, or use an older iteration"
        ) from error
    for name in archive.namelist():
        root, slash, rest = name.partition("/")
        if slash and rest == "data.pkl":
            return _Archive(archive, root, offset)
    raise SourceDamaged(
        f"{where}: the archive at byte {offset} has no `data.pkl`: it was not written by torch.save"
    )


def _read_member(archive: _Archive, name: str, where: str) -> bytes:
    try:
        return archive.zip.read(f"{archive.root}/{name}")
    except (KeyError, zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceDamaged(f"{where}: `{name}` of the archive cannot be read ({error})") from error


def read_object(descriptor: int, offset: int, length: int, *, where: str) -> Any:
    """Read what `torch.save` pickled at that place, as plain containers and inert records.

    Raises:
        SourceDamaged: there is no whole archive there.
        UnsafePickle: the pickle names something no checkpoint holds.
    """
    archive = _open(descriptor, offset, length, where)
    return unpickle.load(_read_member(archive, "data.pkl", where), where=where)


@dataclass(frozen=True)
class SavedObject:
    """What `torch.save` pickled, with its tensors left where they lie."""

    value: Any
    _archive: _Archive
    _descriptor: int
    _where: str

    def locate(self, record: Any, name: str) -> tuple[TensorInfo, Payload] | None:
        """Find the bytes of a tensor in it.

        Args:
            record: what stands for the tensor in `value`.
            name: names the tensor in messages.

        Returns:
            Its type and place; None when the record is no tensor.

        Raises:
            SourceDamaged: its bytes are not where the archive's directory says.
            Unsupported: it is not stored contiguously, or in a type that is not read.
        """
        where = f"{self._where}: {name}"
        if not (isinstance(record, unpickle.Record) and record.path.startswith("torch._utils._rebuild_")):
            return None
        key, start, shape, stride = _tensor_arguments(record, where)
        if math.prod(shape) and not _is_contiguous(shape, stride):
            raise Unsupported(f"{where}: strides ({list(stride)}): only contiguous tensors are read in place")
        info = TensorInfo(dtype_from_storage(_storage_type(record), where=where), shape)
        place = f"{self._archive.root}/data/{key}"
        return info, _member_payload(self._archive, self._descriptor, place, start, info, where)


def open_object(descriptor: int, length: int, *, where: str) -> SavedObject:
    """Open a file `torch.save` wrote.

    Args:
        descriptor: the open file.
        length: its size in bytes.
        where: names it in messages.

    Raises:
        SourceDamaged: it is no whole archive.
        UnsafePickle: the pickle names something no checkpoint holds.
        Unsupported: it was written on a big-endian machine.
    """
    archive = _open(descriptor, 0, length, where)
    _require_little_endian(archive, where)
    value = unpickle.load(_read_member(archive, "data.pkl", where), where=where)
    return SavedObject(value, archive, descriptor, where)


def _storage_type(record: unpickle.Record) -> str:
    """Name the class of a tensor's storage, as checked by `_tensor_arguments`."""
    inner = record.args[0] if record.path == "torch._utils._rebuild_parameter" else record
    return str(getattr(inner.args[0][1], "path", inner.args[0][1]))


def _require_little_endian(archive: _Archive, where: str) -> None:
    names = set(archive.zip.namelist())
    if f"{archive.root}/byteorder" in names and _read_member(archive, "byteorder", where) != b"little":
        raise Unsupported(f"{where}: byte order (big): only little-endian checkpoints can be read")


def find_tensor(descriptor: int, offset: int, length: int, info: TensorInfo, *, where: str) -> Payload:
    """Find the bytes of the one tensor saved at that place, after checking that it is the expected one.

    Raises:
        SourceDamaged: no whole archive there, or another tensor than `info` says.
        UnsafePickle: the pickle names something no checkpoint holds.
        Unsupported: the tensor is not stored contiguously, or big-endian.
    """
    archive = _open(descriptor, offset, length, where)
    record = unpickle.load(_read_member(archive, "data.pkl", where), where=where)
    storage_key, start, shape, stride = _tensor_arguments(record, where)
    if len(shape) != len(stride):
        raise SourceDamaged(f"{where}: {len(stride)} strides for {len(shape)} axes")
    if shape != info.shape:
        raise SourceDamaged(f"{where}: stored shape ({list(shape)}): the metadata says {list(info.shape)}")
    if info.num_elements and not _is_contiguous(shape, stride):
        raise Unsupported(f"{where}: strides ({list(stride)}): only contiguous tensors can be read in place")
    _require_little_endian(archive, where)
    return _member_payload(archive, descriptor, f"{archive.root}/data/{storage_key}", start, info, where)


def _tensor_arguments(record: Any, where: str) -> tuple[str, int, tuple[int, ...], tuple[int, ...]]:
    """Take apart the pickled `_rebuild_tensor_v2(storage, offset, size, stride, ...)`."""
    if (
        isinstance(record, unpickle.Record)
        and record.path == "torch._utils._rebuild_parameter"
        and record.args
    ):
        record = record.args[0]
    is_tensor = isinstance(record, unpickle.Record) and record.path == "torch._utils._rebuild_tensor_v2"
    try:
        if not is_tensor:
            raise TypeError(getattr(record, "path", type(record).__name__))  # noqa: TRY301
        storage, start, shape, stride = record.args[:4]
        return str(storage[2]), int(start), tuple(map(int, shape)), tuple(map(int, stride))
    except (TypeError, ValueError, IndexError) as error:
        raise SourceDamaged(f"{where}: holds no plain tensor ({error})") from error


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for size, given in zip(reversed(shape), reversed(stride), strict=True):
        # Where there is one index only, any stride leads to it; torch keeps the one of the tensor cut.
        if size != 1 and given != step:
            return False
        step *= size
    return True


def _member_payload(
    archive: _Archive, descriptor: int, name: str, start: int, info: TensorInfo, where: str
) -> Payload:
    try:
        member = archive.zip.getinfo(name)
    except KeyError as error:
        raise SourceDamaged(f"{where}: the archive has no `{name}`") from error
    element_bytes = info.size_bytes // max(1, info.num_elements)
    if (
        member.compress_type != zipfile.ZIP_STORED
        or member.file_size < start * element_bytes + info.size_bytes
    ):
        raise SourceDamaged(
            f"{where}: `{name}` has {member.file_size} bytes (compression {member.compress_type}):"
            f" {info.size_bytes} uncompressed ones are needed"
        )
    header = os.pread(descriptor, _LOCAL.size, archive.offset + member.header_offset)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
        raise SourceDamaged(f"{where}: `{name}` has no header where the archive's directory says")
    name_length, extra_length = struct.unpack_from("<2H", header, 26)
    first = archive.offset + member.header_offset + _LOCAL.size + name_length + extra_length
    return Payload(first + start * element_bytes, info.size_bytes)


@dataclass(frozen=True, slots=True)
class TensorFrame:
    """The archive around one tensor whose bytes come later: `head`, `size_bytes` of data, `tail`.

    Lengths depend on the pickle and the data size only, so that every offset of a file is known in advance.
    """

    pickled: bytes
    """`data.pkl`."""
    size_bytes: int
    """Length of the tensor's data."""

    @property
    def head_bytes(self) -> int:
        """Length of what stands before the data."""
        return len(self.render(0)[0])

    @property
    def total_bytes(self) -> int:
        """Length of head, data and tail."""
        head, tail = self.render(0)
        return len(head) + self.size_bytes + len(tail)

    def render(self, crc: int) -> tuple[bytes, bytes]:
        """Write head and tail.

        Args:
            crc: CRC-32 of the data.
        """
        head, directory, count = _members(self.pickled)
        local, central = _headers("archive/data/0", self.size_bytes, crc, len(head))
        head += local
        directory += central
        return head, directory + _end(count + 1, len(directory), len(head) + self.size_bytes)


def object_archive(pickled: bytes) -> bytes:
    """Write the archive `torch.save` makes of an object without tensors."""
    head, directory, count = _members(pickled)
    return head + directory + _end(count, len(directory), len(head))


def _members(pickled: bytes) -> tuple[bytes, bytes, int]:
    """Write what every archive begins with: the data, its directory entries, their number."""
    members = (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"))
    data, directory = b"", b""
    for name, content in members:
        local, central = _headers(f"archive/{name}", len(content), zlib.crc32(content), len(data))
        data += local + content
        directory += central
    return data, directory, len(members)


@dataclass(frozen=True, slots=True)
class MemberFrame:
    """The header before one tensor of an archive of many."""

    name: str
    size_bytes: int
    position: int
    """Where the header begins in the file."""

    def render(self, crc: int) -> tuple[bytes, bytes]:
        """Write what stands before the data, and nothing behind it."""
        return _headers(self.name, self.size_bytes, crc, self.position)[0], b""

    def entry(self, crc: int) -> bytes:
        """Write its line in the archive's directory."""
        return _headers(self.name, self.size_bytes, crc, self.position)[1]


@dataclass(frozen=True, slots=True)
class ArchiveFrame:
    """A file as `torch.save` writes an object with many tensors, their bytes coming later."""

    pickled: bytes
    """`data.pkl`; storage number n is the n-th size."""
    sizes: tuple[int, ...]

    @property
    def head(self) -> bytes:
        """What the file begins with."""
        return _members(self.pickled)[0]

    def members(self) -> tuple[tuple[int, MemberFrame], ...]:
        """Give each tensor's place in the file and its header."""
        position = len(self.head)
        members = []
        for number, size in enumerate(self.sizes):
            frame = MemberFrame(f"archive/data/{number}", size, position)
            position += len(frame.render(0)[0])
            members.append((position, frame))
            position += size
        return tuple(members)

    def tail(self, checksums: Sequence[int]) -> bytes:
        """Write the directory, given the CRC-32 of every tensor; its length does not depend on them."""
        head, directory, count = _members(self.pickled)
        end = len(head)
        entries = [directory]
        for (position, frame), crc in zip(self.members(), checksums, strict=True):
            entries.append(frame.entry(crc))
            end = position + frame.size_bytes
        written = b"".join(entries)
        return written + _end(count + len(self.sizes), len(written), end)


def _headers(name: str, size: int, crc: int, offset: int) -> tuple[bytes, bytes]:
    """Write the local header, padded so that the data is aligned, and the entry of the directory."""
    is_big = size >= _MAX32
    encoded = name.encode()
    size32 = _MAX32 if is_big else size
    version = 45 if is_big else 20
    extra = struct.pack("<2H2Q", 1, 16, size, size) if is_big else b""
    padding = -(offset + _LOCAL.size + len(encoded) + len(extra) + 4) % _ALIGNMENT
    padded = extra + struct.pack("<2s1H", b"FB", padding) + b"Z" * padding
    if offset >= _MAX32:
        listed = (struct.pack("<2Q", size, size) if is_big else b"") + struct.pack("<Q", offset)
        extra = struct.pack("<2H", 1, len(listed)) + listed
    shared = (version, 0, 0, 0, _DOS_DATE_1980, crc, size32, size32, len(encoded))
    local = _LOCAL.pack(b"PK\x03\x04", *shared, len(padded)) + encoded + padded
    offset32 = min(offset, _MAX32)
    central = _CENTRAL.pack(b"PK\x01\x02", version, *shared, len(extra), 0, 0, 0, 0, offset32)
    central += encoded + extra
    return local, central


def _end(count: int, directory_bytes: int, directory_offset: int) -> bytes:
    if directory_offset < _MAX32 and count < _MAX16:
        return _END.pack(b"PK\x05\x06", 0, 0, count, count, directory_bytes, directory_offset, 0)
    count16 = min(count, _MAX16)
    end64_offset = directory_offset + directory_bytes
    end64 = _END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, directory_bytes, directory_offset)
    locator = _LOCATOR64.pack(b"PK\x06\x07", 0, end64_offset, 1)
    return end64 + locator + _END.pack(b"PK\x05\x06", 0, 0, count16, count16, directory_bytes, _MAX32, 0)
