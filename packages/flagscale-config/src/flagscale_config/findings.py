"""The collector of problems while one file is read: keys become places here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flagscale_config.compose import Composed
from flagscale_config.errors import Origin, Problem
from flagscale_config.places import Path, dotted
from flagscale_config.suggest import Hint

__all__ = ["Findings"]


class Findings:
    """Problems and notes of one experiment, each with key and place.

    `option_paths` says where each Megatron option was set, `origins` where each dotted path comes from.
    `excused` holds options that a reported key probably meant, so that they are not called missing as well.
    """

    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        self.problems = [problem for problem in composed.problems if problem.severity == "error"]
        self.notes = [problem for problem in composed.problems if problem.severity == "note"]
        self.option_paths: dict[str, Path] = {}
        self.excused: set[str] = set()
        self.origins: dict[str, Origin] = {
            dotted(path): place for path, place in composed.places.items() if path
        }

    def error(
        self,
        code: str,
        path: Sequence[str | int],
        message: str,
        given: Any = None,
        *,
        hint: Hint | None = None,
    ) -> None:
        """Add an error about the value at `path`.

        `hint` is what the message already says in words (what is allowed, what was probably meant), as data.
        """
        self.problems.append(self._problem(code, path, message, given, hint))

    def note(
        self,
        code: str,
        path: Sequence[str | int],
        message: str,
        given: Any = None,
        *,
        hint: Hint | None = None,
    ) -> None:
        """Add a note about the value at `path`; what `hint` suggests is what `migrate` writes."""
        self.notes.append(self._problem(code, path, message, given, hint, severity="note"))

    def _problem(
        self,
        code: str,
        path: Sequence[str | int],
        message: str,
        given: Any,
        hint: Hint | None,
        *,
        severity: str = "error",
    ) -> Problem:
        hint = Hint() if hint is None else hint
        return Problem(
            code=code,
            message=message,
            key=dotted(path),
            origin=self.composed.origin(tuple(path)),
            given=given,
            severity=severity,
            allowed=hint.allowed,
            suggestion=hint.suggestion,
        )
