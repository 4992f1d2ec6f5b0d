"""End everything below the calling process, and prove that nothing is left.

The calling process must be a sub-reaper. Then each process that ever descended from it is, while it lives,
below it: orphans come back as direct children even when they started their own session. "No child is left",
which the kernel answers at once, therefore proves that no descendant is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from flagscale_hw.identity import Identity, children, descendants

__all__ = ["Reaped", "end_children", "reap"]

Reaped = Callable[[int, int], None]
"""Told about each child that ended: its pid and its wait status."""

_KILL_LIMIT_S = 8.0
_TICK_S = 0.02
_SCAN_S = 0.2


def reap(reaped: Reaped) -> bool:
    """Collect every child that has ended; tell whether any child is left."""
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        reaped(pid, wait_status)


def end_children(first_signal: int, grace_left_s: Callable[[], float], reaped: Reaped) -> list[Identity]:
    """Send `first_signal` to every child, wait, then SIGKILL every descendant until none is left.

    A child is asked once, when it is first seen: planned processes at once, a process further down when its
    own parent has ended and it has become an orphan, that is, a child of ours. While its parent lives, the
    parent is in charge: a data loader that ends together with its trainer takes the checkpoint down with it.

    Args:
        first_signal: the polite request, such as SIGTERM.
        grace_left_s: asked again and again how many seconds of patience are left, so that a second, more
            urgent request can shorten the first; SIGKILL begins at 0 or below.
        reaped: told about each child that ended.

    Returns:
        What could not be ended: processes that the kernel holds in an uninterruptible wait.
    """
    asked: set[Identity] = set()
    next_scan = 0.0
    while grace_left_s() > 0:
        if time.monotonic() >= next_scan:
            _send_to_new(first_signal, asked)
            next_scan = time.monotonic() + _SCAN_S
        if not reap(reaped):
            return []
        time.sleep(_TICK_S)
    return _kill(reaped)


def _send_to_new(signum: int, asked: set[Identity]) -> None:
    for process in children(os.getpid()):
        if process not in asked:
            asked.add(process)
            with contextlib.suppress(
                PermissionError
            ):  # a set-user-id program; SIGKILL will not reach it either
                process.send(signum)


def _kill(reaped: Reaped) -> list[Identity]:
    deadline = time.monotonic() + _KILL_LIMIT_S
    while reap(reaped):
        if time.monotonic() > deadline:
            return descendants(os.getpid())
        for process in descendants(os.getpid()):
            with contextlib.suppress(PermissionError):
                process.send(signal.SIGKILL)
        time.sleep(_TICK_S)
    return []
