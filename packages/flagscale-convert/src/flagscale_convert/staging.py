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
from flagscale_convert.locate import STAGING, TRACKER
from flagscale_convert.plan import Plan
from flagscale_convert.tensors import format_bytes
from flagscale_convert.tokenizer import FILES

__all__ = ["Staging", "write_failure"]

_JOURNAL = "journal.json"
_LOCK = "lock"
_MARKERS = {
    "hf": (CONFIG, INDEX),
    "torch_dist": (TRACKER, "release/metadata.json", "release/.metadata"),
}
"""Without these files nothing loads the directory."""
_OWNED = {"hf": ("*.safetensors", *FILES), "torch_dist": ("release/*.distcp", "tokenizer/*")}
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
    """The folder a conversion is written to.

    Args:
        plan: what will be written.
        overwrite: replace an earlier checkpoint of the same format, or discard another unfinished conversion.
    """

    def __init__(self, plan: Plan, *, overwrite: bool) -> None:
        self._plan, self._overwrite = plan, overwrite
        self.folder = plan.destination / STAGING
        self._done: dict[str, int] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Check and lock the destination; forget the folder again if nothing was written.

        Raises:
            DestinationRefused: it cannot be made, holds something else, or another process is writing to it.
            WriteFailed: there is not enough room.
        """
        self._check_destination()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno in _FULL:
                raise write_failure(self.folder, error) from error
            raise DestinationRefused(
                f"{self._plan.destination}: cannot be written ({error.strerror}): choose another directory"
            ) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DestinationRefused(
                    f"{self._plan.destination}: another conversion is writing to it: wait for it or choose"
                    " another place"
                ) from error
            self._read_journal()
            self._check_room()
            yield
        finally:
            os.close(lock)

    def is_done(self, path: str) -> bool:
        """Tell whether an earlier attempt finished this file; it may have moved it into place already."""
        staged, target = self.folder / path, self._plan.destination / path
        place = staged if staged.exists() else target
        return path in self._done and place.exists() and place.stat().st_size == self._done[path]

    def mark_done(self, path: str) -> None:
        """Record that a file is whole and on disk."""
        self._done[path] = (self.folder / path).stat().st_size
        journal = json.dumps({"digest": self._plan.digest, "done": self._done}, indent=1)
        temporary = self.folder / f"{_JOURNAL}.new"
        _write_synced(temporary, journal.encode())
        temporary.replace(self.folder / _JOURNAL)

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

    def _read_journal(self) -> None:
        path = self.folder / _JOURNAL
        leftovers = [entry for entry in self.folder.iterdir() if entry.name != _LOCK]
        if not leftovers:
            return
        try:
            journal = json.loads(path.read_bytes())
            digest, done = journal["digest"], journal["done"]
        except (OSError, ValueError, KeyError, TypeError):
            digest, done = None, {}
        if digest == self._plan.digest:
            self._done = {str(name): int(size) for name, size in done.items()}
        elif done and not self._overwrite:
            raise DestinationRefused(
                f"{self._plan.destination}: holds the unfinished conversion of another source or with other"
                " options:"
                " run that one again to finish it, or pass --overwrite to discard it"
            )
        else:
            for entry in leftovers:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _check_room(self) -> None:
        staged = sum(entry.stat().st_size for entry in self.folder.rglob("*") if entry.is_file())
        needed = self._plan.total_bytes - staged
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            self._forget_if_unused()
            raise WriteFailed(
                f"{self._plan.destination}: {format_bytes(needed)} are needed, {format_bytes(free)} are free:"
                " make room or"
                " choose another disk; nothing was written"
            )

    def _forget_if_unused(self) -> None:
        if not self._done:
            shutil.rmtree(self.folder)

    def commit(self) -> None:
        """Put every file in its place, those that make the directory loadable last.

        Raises:
            WriteFailed: a file could not be written or moved.
        """
        plan = self._plan
        try:
            for path, origin in plan.copies.items():
                _write_synced(self.folder / path, origin.read_bytes())
            for path, data in plan.texts.items():
                _write_synced(self.folder / path, data)
            self._clear_old()
            for path in (*(file.path for file in plan.files), *plan.copies, *plan.texts):
                target = plan.destination / path
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = self.folder / path
                if staged.exists() or not target.exists():
                    staged.replace(target)
            _sync_directory(plan.destination)
            shutil.rmtree(self.folder)
        except OSError as error:
            raise write_failure(plan.destination, error) from error

    def _clear_old(self) -> None:
        """Remove the checkpoint being replaced, first what makes it loadable."""
        destination = self._plan.destination
        for name in _MARKERS[self._plan.to]:
            (destination / name).unlink(missing_ok=True)
        for path in sorted(path for pattern in _OWNED[self._plan.to] for path in destination.glob(pattern)):
            name = str(path.relative_to(destination))
            # A commit that was cut off has moved some files of the new checkpoint already.
            if path.is_file() and not (name in self._done and not (self.folder / name).exists()):
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
