"""The destination while it is being made: staged in a folder of its own, journalled, put in place at the end.

Nothing outside `.flagscale-convert/` exists until every byte is on disk; then files move into place, those
that make a directory loadable last. A conversion that is cut off at any moment leaves either nothing that
loads or the whole, and the same command finishes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flagscale_convert.errors import DestinationRefused, WriteFailed
from flagscale_convert.huggingface import CONFIG, INDEX
from flagscale_convert.layout import FilePlan
from flagscale_convert.locate import STAGING, TRACKER
from flagscale_convert.manifest import MANIFEST, Checksum, write_manifest
from flagscale_convert.plan import Plan
from flagscale_convert.tensors import format_bytes
from flagscale_convert.tokenizer import FILES

__all__ = ["Staging", "write_failure"]

_OWNER = "conversion.json"
_JOURNAL = "journal"
_LOCK = "lock"
_MARKERS = {
    "hf": (MANIFEST, CONFIG, INDEX),
    "torch_dist": (MANIFEST, TRACKER, "release/metadata.json", "release/.metadata"),
    "torch": (MANIFEST, TRACKER),
}
"""Without these files nothing loads the directory."""
_OWNED = {
    "hf": ("*.safetensors", *FILES),
    "torch_dist": ("release/*.distcp", "release/common.pt", "tokenizer/*"),
    "torch": ("release/mp_rank_*/*", "tokenizer/*"),
}
"""What else belongs to a checkpoint of the format."""
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file size limit",
}


def write_failure(path: Path, error: OSError) -> WriteFailed:
    """Say what stopped a write and what to do."""
    reason = _FULL.get(error.errno or 0, error.strerror or str(error))
    return WriteFailed(
        f"{path}: writing failed ({reason}): what is whole was kept: make room, then run the same command"
        " again to"
        " finish"
    )


class Staging:
    """The folder a conversion is written to, by one process or by several hosts that share a file system.

    Args:
        plan: what will be written.
        overwrite: replace an earlier checkpoint of the same format, or discard another unfinished conversion.
        shard: this process's number, from 1, and how many there are; each writes its part of the files.
    """

    def __init__(self, plan: Plan, *, overwrite: bool, shard: tuple[int, int] = (1, 1)) -> None:
        self._plan, self._overwrite = plan, overwrite
        self._number, self._count = shard
        self.folder = plan.destination / STAGING
        self._own: dict[str, Checksum] = {}

    @property
    def files(self) -> tuple[FilePlan, ...]:
        """The files of this process's part."""
        return self._plan.files[self._number - 1 :: self._count]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Check and lock the destination; forget the folder again if nothing was written.

        Raises:
            DestinationRefused: it cannot be made, holds something else, or another process is writing to it.
            WriteFailed: there is not enough room.
        """
        self._check_destination()
        locks: list[int] = []
        try:
            # Hosts of one conversion share the first lock; each part, and a whole conversion, has one writer.
            is_part = self._count > 1
            self._lock(locks, _LOCK, fcntl.LOCK_SH if is_part else fcntl.LOCK_EX)
            if is_part:
                self._lock(locks, f"{_LOCK}-{self._number}-of-{self._count}", fcntl.LOCK_EX)
            self._claim()
            self._check_room()
            yield
        finally:
            for lock in locks:
                os.close(lock)

    def _lock(self, locks: list[int], name: str, kind: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            locks.append(os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            if error.errno in _FULL:
                raise write_failure(self.folder, error) from error
            raise DestinationRefused(
                f"{self._plan.destination}: cannot be written ({error.strerror}): choose another directory"
            ) from error
        try:
            fcntl.flock(locks[-1], kind | fcntl.LOCK_NB)
        except OSError as error:
            raise DestinationRefused(
                f"{self._plan.destination}: another conversion is writing to it: wait for it or choose"
                " another place"
            ) from error

    def is_done(self, path: str) -> bool:
        """Tell whether this file is whole, by this or an earlier attempt; it may be in place already."""
        staged, target = self.folder / path, self._plan.destination / path
        place = staged if staged.exists() else target
        known = self._done().get(path)
        return known is not None and place.exists() and place.stat().st_size == known.size_bytes

    def mark_done(self, path: str, checksum: Checksum) -> None:
        """Record that a file is whole and on disk."""
        self._own[path] = checksum
        done = {name: [sum_.size_bytes, sum_.crc] for name, sum_ in self._own.items()}
        self._write_small(self._journal, {"done": done})

    def missing(self) -> tuple[str, ...]:
        """Name the files that no process has finished."""
        return tuple(file.path for file in self._plan.files if not self.is_done(file.path))

    @property
    def _journal(self) -> str:
        return f"{_JOURNAL}.json" if self._count == 1 else f"{_JOURNAL}-{self._number}-of-{self._count}.json"

    def _write_small(self, name: str, value: object) -> None:
        temporary = self.folder / f"{name}.{self._number}.new"
        _write_synced(temporary, json.dumps(value, indent=1).encode())
        temporary.replace(self.folder / name)

    def _done(self) -> dict[str, Checksum]:
        """Read what all processes have finished."""
        done: dict[str, Checksum] = {}
        for path in self.folder.glob(f"{_JOURNAL}*.json"):
            try:
                listed = json.loads(path.read_bytes())["done"]
                done |= {str(name): Checksum(int(size), int(crc)) for name, (size, crc) in listed.items()}
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return done | self._own

    def _check_destination(self) -> None:
        destination, source = self._plan.destination.resolve(), self._plan.source.resolve()
        if destination == source or destination in source.parents or source in destination.parents:
            raise DestinationRefused(
                f"{self._plan.destination}: overlaps the source {self._plan.source}: choose another"
            )
        if not destination.exists():
            return
        if not destination.is_dir():
            raise DestinationRefused(f"{self._plan.destination}: is a file: give a directory")
        entries = [entry.name for entry in destination.iterdir() if entry.name != STAGING]
        if any(name.startswith("iter_") for name in entries):
            raise DestinationRefused(
                f"{self._plan.destination}: holds checkpoints of a training run ({sorted(entries)[0]}):"
                " choose another"
            )
        if entries and not self._overwrite and not (destination / STAGING).exists():
            raise DestinationRefused(
                f"{self._plan.destination}: is not empty ({', '.join(sorted(entries)[:3])}): choose another"
                " directory, or"
                " pass --overwrite to replace the checkpoint in it"
            )

    def _claim(self) -> None:
        """Make the folder this conversion's, or find that it is already."""
        try:
            digest = json.loads((self.folder / _OWNER).read_bytes())["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            digest = None
        if digest == self._plan.digest:
            self._own = self._done() if self._count == 1 else self._done_by_this_part()
            return
        leftovers = [entry for entry in self.folder.iterdir() if not entry.name.startswith(_LOCK)]
        if digest is not None and not self._overwrite and (self._done() or self._count > 1):
            raise DestinationRefused(
                f"{self._plan.destination}: holds the unfinished conversion of another source or with other"
                " options:"
                " run that one again to finish it, or pass --overwrite to discard it"
            )
        for entry in leftovers:
            if self._count == 1 or digest is not None:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._write_small(_OWNER, {"digest": self._plan.digest})

    def _done_by_this_part(self) -> dict[str, Checksum]:
        mine = {file.path for file in self.files}
        return {path: checksum for path, checksum in self._done().items() if path in mine}

    def _check_room(self) -> None:
        needed = sum(file.size_bytes for file in self.files if not self.is_done(file.path))
        needed -= sum(
            place.stat().st_size
            for file in self.files
            if (place := self.folder / file.path).exists() and not self.is_done(file.path)
        )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            self._forget_if_unused()
            raise WriteFailed(
                f"{self._plan.destination}: {format_bytes(needed)} are needed, {format_bytes(free)} are free:"
                " make room or"
                " choose another disk; nothing was written"
            )

    def _forget_if_unused(self) -> None:
        if not self._done() and self._count == 1:
            shutil.rmtree(self.folder)

    def commit(self) -> None:
        """Put every file in its place, those that make the directory loadable last, then the manifest.

        Of several processes that finish at the same time, one does it.

        Raises:
            WriteFailed: a file could not be written or moved.
        """
        try:
            with (self.folder / "commit").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (self.folder / _OWNER).exists():
                    self._commit()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not self.folder.exists():
                return  # another host has done it
            raise write_failure(self._plan.destination, error) from error

    def _commit(self) -> None:
        plan = self._plan
        for path, origin in plan.copies.items():
            _write_synced(self.folder / path, origin.read_bytes())
        for path, data in plan.texts.items():
            _write_synced(self.folder / path, data)
        small = {path: Checksum.of(origin.read_bytes()) for path, origin in plan.copies.items()}
        small |= {path: Checksum.of(data) for path, data in plan.texts.items()}
        done = self._done()
        listed = {file.path: done[file.path] for file in plan.files}
        _write_synced(self.folder / MANIFEST, write_manifest(listed | small, conversion=plan.digest))
        self._clear_old()
        for path in (*(file.path for file in plan.files), *plan.copies, *plan.texts, MANIFEST):
            target = plan.destination / path
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = self.folder / path
            if staged.exists() or not target.exists():
                staged.replace(target)
        _sync_directory(plan.destination)
        shutil.rmtree(self.folder)

    def _clear_old(self) -> None:
        """Remove the checkpoint being replaced, first what makes it loadable."""
        destination, done = self._plan.destination, self._done()
        for name in _MARKERS[self._plan.to]:
            (destination / name).unlink(missing_ok=True)
        for path in sorted(path for pattern in _OWNED[self._plan.to] for path in destination.glob(pattern)):
            name = str(path.relative_to(destination))
            # A commit that was cut off has moved some files of the new checkpoint already.
            if path.is_file() and not (name in done and not (self.folder / name).exists()):
                path.unlink()


def _write_synced(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
