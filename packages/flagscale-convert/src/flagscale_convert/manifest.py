"""A manifest of a checkpoint's files: sizes and checksums, written last, checked whenever one asks.

The checksum is CRC-32 as in zip files: it is computed while the data passes by, tensor by tensor in any
order, and the parts are combined without reading a file again. It finds damage, not malice.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flagscale_convert.errors import SourceDamaged

__all__ = [
    "MANIFEST",
    "Checksum",
    "check_manifest",
    "is_written_by",
    "manifest_root",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "flagscale-manifest.json"
_FORMAT = "flagscale-manifest/1"
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_BUFFER_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class Checksum:
    """Size and CRC-32 of a run of bytes."""

    size_bytes: int = 0
    crc: int = 0

    @classmethod
    def of(cls, data: bytes) -> Checksum:
        """Sum bytes at hand."""
        return cls(len(data), zlib.crc32(data))

    def __add__(self, behind: Checksum) -> Checksum:
        """Give the checksum of these bytes followed by others."""
        crc = _multiply(_power(behind.size_bytes), self.crc) ^ behind.crc
        return Checksum(self.size_bytes + behind.size_bytes, crc)


def _multiply(one: int, other: int) -> int:
    """Multiply two polynomials modulo the CRC's, both with the highest power in bit 0, as in zlib."""
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _power(size_bytes: int) -> int:
    """Give x to the number of bits, modulo the CRC's polynomial, by repeated squaring."""
    power, square, left = _ONE, _ONE >> 8, size_bytes
    while left:
        if left & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        left >>= 1
    return power


def write_manifest(files: Mapping[str, Checksum], *, conversion: str) -> bytes:
    """Write a manifest.

    Args:
        files: by relative path.
        conversion: the plan's digest, by which the same conversion knows that it is done.
    """
    listed = {
        path: {"size": sum_.size_bytes, "crc32": f"{sum_.crc:08x}"} for path, sum_ in sorted(files.items())
    }
    return (
        json.dumps({"format": _FORMAT, "conversion": conversion, "files": listed}, indent=1).encode() + b"\n"
    )


def read_manifest(root: Path) -> dict[str, Checksum] | None:
    """Read the manifest beside a checkpoint; None when there is none.

    Raises:
        SourceDamaged: it is no manifest.
    """
    path = root / MANIFEST
    if not path.exists():
        return None
    try:
        listed = json.loads(path.read_bytes())["files"]
        return {
            str(name): Checksum(int(entry["size"]), int(entry["crc32"], 16)) for name, entry in listed.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceDamaged(
            f"{path}: is no manifest ({error}): remove it, or copy the checkpoint again"
        ) from error


def is_written_by(root: Path, conversion: str) -> bool:
    """Tell whether the checkpoint there is the result of this conversion."""
    try:
        return bool(json.loads((root / MANIFEST).read_bytes())["conversion"] == conversion)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def manifest_root(*places: Path) -> Path | None:
    """Give the first of some directories that has a manifest."""
    return next((place for place in places if (place / MANIFEST).exists()), None)


def check_manifest(
    root: Path,
    *,
    within: Path | None = None,
    with_hashes: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Compare the files of a checkpoint with its manifest; give a sentence for each that is not as listed.

    Args:
        root: where the manifest lies.
        within: directory whose files are looked at; None for all.
        with_hashes: read the files too; else only their sizes are compared.
        progress: told about bytes read and bytes in all.

    Raises:
        SourceDamaged: there is no manifest, or it is none.
    """
    listed = read_manifest(root)
    if listed is None:
        raise SourceDamaged(f"{root}: has no {MANIFEST}: only checkpoints this tool wrote have one")
    if within is not None:
        listed = {name: entry for name, entry in listed.items() if (root / name).is_relative_to(within)}
    findings = []
    total, done = sum(entry.size_bytes for entry in listed.values()), 0
    for name, entry in listed.items():
        finding = _compare(root / name, entry, with_hash=with_hashes)
        if finding:
            findings.append(f"{name}: {finding}")
        done += entry.size_bytes
        if progress is not None:
            progress(done, total)
    return tuple(findings)


def _compare(path: Path, entry: Checksum, *, with_hash: bool) -> str:
    """Say what is wrong with a file; nothing when it is as listed."""
    if not path.is_file():
        return "is in the manifest and missing"
    size = path.stat().st_size
    if size != entry.size_bytes:
        return f"has {size} bytes, the manifest says {entry.size_bytes}"
    crc = _crc_of(path) if with_hash else entry.crc
    return "" if crc == entry.crc else f"its checksum is {crc:08x}, the manifest says {entry.crc:08x}"


def _crc_of(path: Path) -> int:
    crc, buffer = 0, bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            crc = zlib.crc32(view[:count], crc)
    return crc
