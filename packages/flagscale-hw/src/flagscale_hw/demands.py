"""Why a run should end before its processes do: it was asked to, or its launcher or guardian is gone.

Used by whoever watches over a run: the supervisor of processes on this host, the coordinator of many hosts.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Container
from dataclasses import dataclass
from types import FrameType

from flagscale_hw.identity import Identity
from flagscale_hw.order import KEEP, LET_GO, Order
from flagscale_hw.rundir import RunDirectory
from flagscale_hw.status import RunState

__all__ = ["SHORT_GRACE_S", "Demands", "Outcome"]

SHORT_GRACE_S = 3.0
"""Patience where nobody asked for the end: with it nothing survives ten seconds."""


@dataclass(frozen=True)
class Outcome:
    """Why the run, or one attempt, is over."""

    state: RunState
    reason: str
    grace_s: float = SHORT_GRACE_S
    may_restart: bool = False


class Demands:
    """Signals, the lifeline of the launcher and the life of the guardian, as one question: end, and why?"""

    def __init__(self, directory: RunDirectory, order: Order, lifeline: int, guardian: int) -> None:
        self._directory = directory
        self._order = order
        self._lifeline: int | None = lifeline
        self._guardian: int | None = guardian
        self._launcher = _watch(order.launcher)
        self._wake, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._is_asked_to_stop = False
        self.is_launched = False
        """Whether the launcher has said that the launch is complete."""
        self.is_abandoned = False
        """Whether the launcher went before it had said so."""
        self.outcome: Outcome | None = None
        """The first demand."""
        self.deadline = float("inf")
        """When patience ends, by the steady clock; a later demand can only shorten it."""

    def listen(self) -> None:
        """Take signals from now on."""

        def note_stop(_signum: int, _frame: FrameType | None) -> None:
            self._is_asked_to_stop = True

        def note(_signum: int, _frame: FrameType | None) -> None:
            """Do nothing: the write to the wake pipe is what counts."""

        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, note_stop)
        signal.signal(signal.SIGINT, note_stop)
        signal.signal(signal.SIGCHLD, note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    @property
    def handles(self) -> list[int]:
        """What becomes readable when there may be a demand, or a child has ended."""
        optional = (self._lifeline, self._guardian, self._launcher)
        return [self._wake, *(handle for handle in optional if handle is not None)]

    def take(self, ready: Container[object]) -> None:
        """Take in what the readable handles say."""
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._guardian in ready:
            self._guardian = None
            self.add(Outcome("failed", "the guardian of the run was killed"))
        if self._lifeline in ready:
            self._read_lifeline()
        if self._launcher in ready:
            self._lose_launcher()
        if self._is_asked_to_stop:
            self._is_asked_to_stop = False
            self.add(Outcome("stopped", "stopped on request", self._requested_grace_s()))

    def add(self, outcome: Outcome) -> None:
        """Keep the first demand as the reason; a later one can only shorten the patience."""
        self.outcome = self.outcome or outcome
        self.shorten(outcome.grace_s)

    def shorten(self, grace_s: float) -> None:
        """Let patience end in `grace_s` seconds at the latest."""
        self.deadline = min(self.deadline, time.monotonic() + grace_s)

    def _read_lifeline(self) -> None:
        if self._lifeline is None:
            return
        said = os.read(self._lifeline, 1)
        self.is_launched = self.is_launched or said in {LET_GO, KEEP}
        if said == KEEP:
            return
        os.close(self._lifeline)
        self._lifeline = None
        if said == LET_GO:
            self._launcher = None
        else:
            self._lose_launcher()

    def _lose_launcher(self) -> None:
        self._launcher = None
        self.is_abandoned = not self.is_launched
        pid = self._order.launcher.pid
        self.add(Outcome("failed", f"its launcher (pid {pid}) ended before the run did"))

    def _requested_grace_s(self) -> float:
        request = self._directory.read(self._directory.stop_request) or {}
        grace_s = request.get("grace_s")
        return float(grace_s) if isinstance(grace_s, int | float) else self._order.plan.stop.grace_s


def _watch(process: Identity) -> int | None:
    """Return a handle that becomes readable when the process ends; None where the kernel has none."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return None  # the lifeline alone will tell
    if not process.is_alive():
        os.close(handle)
        return None
    return handle
