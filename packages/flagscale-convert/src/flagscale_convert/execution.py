"""Carry out a plan: read, rearrange, write, a few megabytes at a time."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_convert.errors import Unsupported
from flagscale_convert.layout import FilePlan, Item
from flagscale_convert.manifest import Checksum, is_written_by
from flagscale_convert.model import require_fit
from flagscale_convert.plan import Plan
from flagscale_convert.staging import Staging, write_failure
from flagscale_convert.tensors import Source, TensorInfo
from flagscale_convert.verification import first_difference

__all__ = ["Progress", "Report", "convert"]

_CACHED_BYTES = 512 << 10
"""What a thread moves at once: read, summed and written while it lies in the core's own cache."""
_COMPUTED_BYTES = 16 << 20
"""The same where values are computed, which is done by numpy for many at once."""
_NOTHING: tuple[str, ...] = ()
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread, one call at a time."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    destination: Path
    files: tuple[str, ...]
    num_parameters: int
    written_bytes: int
    resumed_bytes: int
    """Bytes an earlier, unfinished attempt had written already."""
    seconds: float
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """Files that other hosts have yet to write; the last of them puts everything in place."""

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain data."""
        return {
            "destination": str(self.destination),
            "files": list(self.files),
            "num_parameters": self.num_parameters,
            "written_bytes": self.written_bytes,
            "resumed_bytes": self.resumed_bytes,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "missing": list(self.missing),
        }


class _Cancelled(Exception):
    """Another thread failed or the user stopped the run."""


def convert(
    plan: Plan,
    *,
    progress: Progress | None = None,
    workers: int = 2,
    overwrite: bool = False,
    shard: tuple[int, int] = (1, 1),
) -> Report:
    """Carry out a plan.

    Peak memory is a few megabytes per worker (about 50 where values are computed: a dtype given, fp8
    weights), whatever the size of the model. Stopped at any moment, the destination holds nothing that loads,
    and the same call finishes the work.

    Args:
        plan: from `make_plan`.
        progress: told about bytes done.
        workers: threads, at least 1; more than two help on fast disks only.
        overwrite: replace an earlier checkpoint in the destination.
        shard: this host's number, from 1, and how many hosts there are; each writes its part of the files
            into the destination, which they share, and the one that finds all parts written puts them in
            place.

    Raises:
        Unsupported: the plan has problems, or there is no such shard.
        DestinationRefused: the destination holds something else.
        SourceDamaged: the source ends early or changed.
        WriteFailed: the destination could not be written.
    """
    started = time.monotonic()
    require_fit(plan.model, plan.source)
    for one, other in plan.must_equal:
        _require_equal(plan, one, other)
    if not 1 <= shard[0] <= shard[1]:
        raise Unsupported(f"shard ({shard[0]}/{shard[1]}): a number from 1 to {shard[1]} is needed")
    staging = Staging(plan, overwrite=overwrite, shard=shard)
    total = sum(file.size_bytes for file in staging.files)
    is_late = shard[1] > 1 and not staging.folder.exists()
    if is_late and is_written_by(plan.destination, plan.digest):
        done, missing = total, _NOTHING  # the other hosts have finished this one's part too
    else:
        done, missing = _write_all(plan, staging, total, progress, workers)
    return Report(
        destination=plan.destination,
        files=(*(file.path for file in staging.files), *(() if missing else (*plan.copies, *plan.texts))),
        num_parameters=plan.num_parameters,
        written_bytes=total - done + (0 if missing else plan.total_bytes - plan.file_bytes),
        resumed_bytes=done,
        seconds=time.monotonic() - started,
        notes=plan.notes,
        missing=missing,
    )


def _write_all(
    plan: Plan, staging: Staging, total: int, progress: Progress | None, workers: int
) -> tuple[int, tuple[str, ...]]:
    """Write what is left; give the bytes that were there already, and the files others have yet to write."""
    with staging.opened():
        left = [file for file in staging.files if not staging.is_done(file.path)]
        done = total - sum(file.size_bytes for file in left)
        buffers = _Buffers(_CACHED_BYTES if plan.is_copied else _COMPUTED_BYTES)
        work = _Work(plan.view, _Counter(total, done, progress), buffers, max(1, workers))
        # One file goes to the disk while the next one is made.
        with ThreadPoolExecutor(1, thread_name_prefix="sync") as syncer:
            synced: Future[None] | None = None
            for file in left:
                path = staging.folder / file.path
                descriptor, checksum = _write_file(work, file, path)
                if synced is not None:
                    synced.result()
                synced = syncer.submit(_finish, staging, file.path, descriptor, checksum)
            if synced is not None:
                synced.result()
        missing = staging.missing()
        if not missing:
            staging.commit()
    return done, missing


def _finish(staging: Staging, path: str, descriptor: int, checksum: Checksum) -> None:
    """See a file to the disk and note it as done."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise write_failure(staging.folder / path, error) from error
    finally:
        os.close(descriptor)
    staging.mark_done(path, checksum)


def _require_equal(plan: Plan, one: str, other: str) -> None:
    source = plan.model.source
    infos = source.tensors()
    if infos[one] != infos[other] or first_difference(source, one, source, other) is not None:
        raise Unsupported(
            f"{plan.source}: `{one}` differs from `{other}`, of which it should be a copy: Megatron keeps one"
            " tensor for both, so one of the two would be lost: for lm_head, set tie_word_embeddings to false"
            " in config.json if the model was trained untied"
        )


class _Counter:
    """Bytes done, over all threads, and whether to stop."""

    def __init__(self, total_bytes: int, done_bytes: int, progress: Progress | None) -> None:
        self._total, self._done, self._progress = total_bytes, done_bytes, progress
        self._lock = threading.Lock()
        self.is_cancelled = False
        self.add(0)

    def add(self, size_bytes: int) -> None:
        """Count bytes written.

        Raises:
            _Cancelled: the work is to stop.
        """
        if self.is_cancelled:
            raise _Cancelled
        with self._lock:
            self._done += size_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)


class _Buffers(threading.local):
    """A buffer for each thread, used again and again: fresh memory costs as much as a copy into it."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._memory: np.ndarray = np.empty(0, np.uint8)

    def rows(self, info: TensorInfo) -> np.ndarray:
        """Give room for some rows of a tensor, at least one: uint8 of shape (rows, row_bytes)."""
        count = min(info.rows, max(1, self._size_bytes // max(1, info.row_bytes)))
        needed = count * info.row_bytes
        if needed > self._memory.size:
            self._memory = np.empty(needed, np.uint8)
        return self._memory[:needed].reshape(count, info.row_bytes)


@dataclass(frozen=True, slots=True)
class _Work:
    """What all files have in common."""

    view: Source
    counter: _Counter
    buffers: _Buffers
    workers: int


def _write_file(work: _Work, file: FilePlan, path: Path) -> tuple[int, Checksum]:
    """Write one file by several threads, each a tensor at a time, roughly from front to back.

    Returns:
        The file, open and not yet on the disk, and its checksum.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise write_failure(path, error) from error
    try:
        _write_at(descriptor, path, file.head, 0)
        work.counter.add(len(file.head))
        checksums = _write_items(work, file, descriptor, path)
        whole = Checksum.of(file.head)
        for item, checksum in zip(file.items, checksums, strict=True):
            head, tail = item.frame.render(checksum.crc) if item.frame is not None else (b"", b"")
            whole = whole + Checksum.of(head) + checksum + Checksum.of(tail)
        if file.archive is not None:
            tail = file.archive.tail([checksum.crc for checksum in checksums])
            _write_at(descriptor, path, tail, file.size_bytes - len(tail))
            work.counter.add(len(tail))
            whole += Checksum.of(tail)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, whole


def _write_items(work: _Work, file: FilePlan, descriptor: int, path: Path) -> list[Checksum]:
    with ThreadPoolExecutor(work.workers, thread_name_prefix="convert") as pool:
        futures = [pool.submit(_write_item, work, item, descriptor, path) for item in file.items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Also reached by Ctrl-C: threads stop at their next buffer.
            work.counter.is_cancelled = any(not future.done() for future in futures)
            pool.shutdown(cancel_futures=True)
        _raise_first(futures)
    return [future.result() for future in futures]


def _raise_first(futures: list[Future[Checksum]]) -> None:
    """Raise what really went wrong, not that the others were stopped because of it."""
    errors = [future.exception() for future in futures if not future.cancelled()]
    for error in errors:
        if error is not None and not isinstance(error, _Cancelled):
            raise error


def _write_item(work: _Work, item: Item, descriptor: int, path: Path) -> Checksum:
    """Write one tensor and what stands around it; give the checksum of its data."""
    info = work.view.tensors()[item.tensor]
    buffer = work.buffers.rows(info)
    position, checksum = item.offset, 0
    for start in range(0, info.rows, len(buffer) or 1):
        rows = buffer[: info.rows - start]
        work.view.read_rows(item.tensor, start, rows)
        checksum = zlib.crc32(rows, checksum)
        _write_at(descriptor, path, rows, position)
        position += rows.size
        work.counter.add(rows.size)
    if item.frame is not None:
        head, tail = item.frame.render(checksum)
        _write_at(descriptor, path, head, item.offset - len(head))
        _write_at(descriptor, path, tail, position)
        work.counter.add(len(head) + len(tail))
    return Checksum(info.size_bytes, checksum)


def _write_at(descriptor: int, path: Path, data: bytes | np.ndarray, offset: int) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        try:
            done += os.pwrite(descriptor, view[done:], offset + done)
        except OSError as error:
            raise write_failure(path, error) from error
