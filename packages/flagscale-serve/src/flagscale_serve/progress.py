"""What a starting engine is doing, read from its log, so that minutes of silence do not look like a hang."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flagscale_serve.application import ENGINE as APPLICATION
from flagscale_serve.engines import engine_named
from flagscale_serve.router import ENGINE as ROUTER

__all__ = ["Phases", "Tail", "details"]

_FIRST = {ROUTER: "waiting for the instances", APPLICATION: "starting Ray and the classes"}
_TAIL_BYTES = 256 * 1024
_MAX_DETAILS = 3
_LINE_LIMIT = 300
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_RAISED = re.compile(r"[A-Za-z_][\w.]*: \S")


class Tail:
    """The unread part of a growing log file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def lines(self, *, is_over: bool = False) -> list[str]:
        """Return what was written since the last call, in whole lines; a file that is not there yet has none.

        Args:
            is_over: nobody will write any more, so a last line without an end counts too.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if is_over and self._rest:
            whole.append(self._rest)
            self._rest = b""
        # A progress bar redraws its line after a carriage return: the last drawing is the line.
        return [line.decode(errors="replace").rstrip("\r").rpartition("\r")[2] for line in whole]


class Phases:
    """Follows one instance from its first log line to its first token."""

    def __init__(self, engine: str) -> None:
        self._known = () if engine in _FIRST else engine_named(engine).phases
        self.current = _FIRST.get(engine, "importing the engine")
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


def details(reason: str, log: Path) -> str:
    """Return what an engine wrote below the line that a run's reason quotes; empty when there is nothing.

    Validation errors say in their first line only how many mistakes were made, and what stumbled first
    (`KeyError: 'nosuch'`) is explained by what was raised for it.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    quoted = [place for place, line in enumerate(lines) if len(line.strip()) > 8 and line.strip() in reason]
    if not quoted:
        return ""
    after = lines[quoted[-1] + 1 :]
    if (explained := _explained(after)) is not None:
        return explained
    below: list[str] = []
    for line in after:
        if not line.startswith(" ") or len(below) == _MAX_DETAILS:
            break
        below.append(line.strip()[:_LINE_LIMIT])
    return "; ".join(below)


def _explained(after: Sequence[str]) -> str | None:
    """Return the exception that was raised while one was handled, if the next thing in a log is that."""
    said = [line for line in after if line.strip()]
    if not said or said[0].strip() not in _CHAINED:
        return None
    raised = (line for line in said[1:] if _RAISED.match(line))
    return next(raised, "")[:_LINE_LIMIT] or None
