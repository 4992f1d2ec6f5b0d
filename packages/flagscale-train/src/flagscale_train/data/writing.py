"""Finds out before the work whether its result can be written, and says why not."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flagscale_train.errors import InvalidInput, TrainError

__all__ = ["require_writable", "saying_why"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_writable(output: Path, option: str = "--output") -> None:
    """Make the folder of `output` and prove that a file can be made in it.

    Minutes of work must not be lost to a path that was wrong from the start.

    Raises:
        InvalidInput: it cannot be written there.
        TrainError: the disk is full.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Permission bits say little to root, on read-only mounts and in /proc: only making a file tells.
        descriptor, name = tempfile.mkstemp(prefix=f".{output.name[:32]}.", dir=output.parent)
        os.close(descriptor)
        Path(name).unlink()
    except OSError as error:
        if error.errno in _FULL:
            raise TrainError(f"{output}: {error.strerror}: nothing was done: make room") from error
        raise InvalidInput(
            f"{option}: {output}: cannot be written ({error.strerror}): give a path that can be written"
        ) from error


@contextmanager
def saying_why(output: Path, kept: str = "nothing was kept: make room and run again") -> Iterator[None]:
    """Turn a full disk into an error that says so, what of `output` was kept, and what to do.

    Raises:
        TrainError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise TrainError(f"{output}: {error.strerror}: {kept}") from error
        raise
