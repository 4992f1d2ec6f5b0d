"""A run as a row of attempts: start everything, watch it, end everything, and again while the plan allows it.

What does not live here: how an attempt is made, by processes of this host (`supervisor.py`) or by other hosts
(`coordinator.py`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from flagscale_hw.demands import Demands, Outcome
from flagscale_hw.order import Order
from flagscale_hw.record import Record
from flagscale_hw.rundir import RunDirectory
from flagscale_hw.status import ProcessStatus, RunStatus

__all__ = ["TURN_S", "Attempts"]

TURN_S = 1.0
"""How long a turn waits at most for something to happen."""
_BACKOFF_LIMIT_S = 30.0


class Attempts(ABC):
    """One run, from the first preparation to the recorded end."""

    def __init__(self, directory: RunDirectory, order: Order, lifeline: int, guardian: int) -> None:
        self._directory = directory
        self._order = order
        self._plan = order.plan
        self._demands = Demands(directory, order, lifeline, guardian)
        processes = tuple(ProcessStatus(name=one.name, host=one.host) for one in self._plan.processes)
        self._record = Record(
            directory, RunStatus(state="starting", processes=processes, started_at=time.time())
        )

    @abstractmethod
    def prepare(self) -> None:
        """Do all that can be refused, before the launcher is answered.

        Raises:
            LaunchRefused: a port is taken, or a directory cannot be had.
            LaunchError: anything else that keeps the run from starting.
            OSError: the run directory cannot be written.
        """

    @abstractmethod
    def take_back(self) -> None:
        """Undo what `prepare` did, after a launch that was refused or broken off."""

    @abstractmethod
    def _attempt(self) -> Outcome:
        """Start everything and watch it until something ends the attempt."""

    @abstractmethod
    def _end(self, outcome: Outcome) -> str:
        """End everything; say what could not be ended or was not seen to end, if anything."""

    @abstractmethod
    def _turn(self, timeout_s: float) -> None:
        """Wait for something to happen, at most `timeout_s`, and take it in."""

    def run(self) -> int:
        """Run the plan to its end.

        Returns:
            0 when the end is on disk, 1 when the disk did not take it.
        """
        while True:
            outcome = self._attempt()
            self._demands.shorten(outcome.grace_s)
            left = self._end(outcome)
            if not self._may_try_again(outcome, left):
                reason = "; ".join(part for part in (outcome.reason, left) if part)
                return 0 if self._record.finish(outcome.state, reason) else 1
            self._demands.deadline = float("inf")
            self._pause(outcome)

    def _may_try_again(self, outcome: Outcome, _left: str) -> bool:
        is_free = self._demands.outcome is None
        return is_free and outcome.may_restart and self._record.status.restarts < self._plan.max_restarts

    def _pause(self, outcome: Outcome) -> None:
        self._record.restart()
        count = self._record.status.restarts
        self._record.change(
            "starting", f"restart {count} of {self._plan.max_restarts} after: {outcome.reason}"
        )
        until = time.monotonic() + min(2.0 ** (count - 1), _BACKOFF_LIMIT_S)
        while self._demands.outcome is None and time.monotonic() < until:
            self._turn(until - time.monotonic())
