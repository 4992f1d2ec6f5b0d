"""What a starting engine is doing, read from its log, so that minutes of silence do not look like a hang."""

from __future__ import annotations

from flagscale_serve.engines import ENGINES

__all__ = ["Phases"]


class Phases:
    """Follows one instance from its first log line to its first token."""

    def __init__(self, engine: str) -> None:
        self._known = ENGINES[engine].phases
        self.current = "importing the engine"
        """What it is doing now, as a clause for people."""
        self.last_line = ""
        """Its latest log line that is not blank."""

    def read(self, line: str) -> bool:
        """Take in one log line; True when it shows a new phase."""
        if line.strip():
            self.last_line = line.strip()
        for sign, phase in self._known:
            if sign in line and phase != self.current:
                self.current = phase
                return True
        return False
