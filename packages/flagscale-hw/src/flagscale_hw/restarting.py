"""Start single processes again while the others of a run go on: when, and how often.

A service of several instances outlives one of them. Each process has its own count: so many restarts within
ten minutes, the pause doubling from one second, so that a service that fails once a month never uses them up.

What does not live here: starting and ending processes (`supervisor.py`), starting a whole run again
(`attempts.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from flagscale_hw.plan import Process

__all__ = ["WINDOW_S", "Restarts"]

WINDOW_S = 600.0
_PAUSE_LIMIT_S = 30.0


class Restarts:
    """The processes of one attempt that may be started again; times are seconds of the steady clock."""

    def __init__(self, processes: Iterable[Process]) -> None:
        self._policies = {one.name: one.max_restarts for one in processes if one.max_restarts}
        self._begun: dict[str, list[float]] = {name: [] for name in self._policies}
        self._due: dict[str, float] = {}

    def governs(self, name: str) -> bool:
        """Tell whether a process has a policy of its own."""
        return name in self._policies

    def is_waiting(self, name: str) -> bool:
        """Tell whether a process that has ended waits for its next start."""
        return name in self._due

    def schedule(self, name: str, now: float) -> float | None:
        """Decide that a process that has ended starts again.

        Returns:
            Seconds until then; None when it has been started again too often.
        """
        recent = [at for at in self._begun[name] if now - at < WINDOW_S]
        if len(recent) >= self._policies[name]:
            return None
        pause = min(2.0 ** len(recent), _PAUSE_LIMIT_S)
        self._begun[name] = [*recent, now + pause]
        self._due[name] = now + pause
        return pause

    def describe(self, name: str) -> str:
        """Say which restart this is."""
        return f"restart {len(self._begun[name])} of {self._policies[name]} within {WINDOW_S / 60:g} minutes"

    def take_due(self, now: float) -> list[str]:
        """Return the processes whose time has come; they wait no longer."""
        due = [name for name, at in self._due.items() if at <= now]
        for name in due:
            del self._due[name]
        return due

    @property
    def next_due(self) -> float | None:
        """When the next one starts."""
        return min(self._due.values(), default=None)
