"""What can be wrong with a configuration, as data.

- ConfigError    the one error of this package: every problem of a file at once (exit 2)
  - Problem      one of them: a stable code, a place, a key, the value given, what is allowed, what to do
    - Origin     the place: a file position or an override
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flagscale_config.masking import MASK, is_secret, masked, masked_override, masked_text

__all__ = ["ConfigError", "Origin", "Problem", "escaped", "show", "sort_problems"]

_MAX_SHOWN = 80

_GIVEN = re.compile(r"\(.* given\)")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: a position in a file, or an override.

    Lines and columns count from 1; 0 means the file as a whole. Secrets in the override are masked.
    """

    file: str = ""
    line: int = 0
    column: int = 0
    override: str | None = None

    def __post_init__(self) -> None:
        """Keep secrets out: an origin is printed, recorded and sent."""
        if self.override is not None:
            object.__setattr__(self, "override", masked_override(self.override))

    def __str__(self) -> str:
        """Return `file:line:col`, or `override 'a=b'`."""
        if self.override is not None:
            return f"override '{self.override}'"
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with (severity `error`) or worth knowing about (`note`) a configuration."""

    code: str
    """Stable, such as `config/unknown-key`."""
    message: str
    """What is wrong, what is allowed and what to do, in one sentence; without place and key."""
    key: str = ""
    """Dotted path such as `train.model.num_layers`; empty when the problem is not about one key."""
    origin: Origin | None = None
    given: Any = None
    """The value found, None when there is none worth showing; `***` for a secret."""
    severity: str = "error"
    allowed: tuple[Any, ...] = ()
    """Every value or key that may stand here, where they can be listed."""
    suggestion: str | None = None
    """What was probably meant: the right key or value, or the section in which the key belongs."""

    def __post_init__(self) -> None:
        """Keep secrets out, whoever made the problem."""
        message, given = masked_text(self.message), self.given
        if any(is_secret(part) for part in self.key.split(".")):
            message = _GIVEN.sub(f"({MASK} given)", _QUOTED.sub(MASK, message))
            message = message if given is None else message.replace(f"{given!r} ", f"{MASK} ")
            given = given if given is None or given == "???" else MASK
        object.__setattr__(self, "message", message)
        object.__setattr__(self, "given", masked(given))

    def __str__(self) -> str:
        """Return the problem as one line: `place: key: message`, control characters escaped."""
        parts = [str(self.origin) if self.origin else "", self.key, self.message]
        return escaped(": ".join(part for part in parts if part))

    def to_dict(self) -> dict[str, Any]:
        """Return the problem as JSON can hold it."""
        origin = self.origin or Origin()
        place = {
            "file": origin.file,
            "line": origin.line,
            "column": origin.column,
            "override": origin.override,
        }
        given = (
            self.given if isinstance(self.given, (str, int, float, bool, type(None))) else repr(self.given)
        )
        return {
            "code": self.code,
            "severity": self.severity,
            "key": self.key,
            "message": self.message,
            "given": given,
            "allowed": list(self.allowed),
            "suggestion": self.suggestion,
            **place,
        }


def escaped(text: str) -> str:
    """Return text in which nothing commands the terminal or cannot be encoded: such letters as in `repr`."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def show(value: Any) -> str:
    """Return a value as it appears in a message, cut when long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def sort_problems(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Return the problems in reading order: by file, line and column, overrides last."""

    def position(problem: Problem) -> tuple[bool, str, int, int, str]:
        origin = problem.origin or Origin()
        return (origin.override is not None, origin.file, origin.line, origin.column, problem.key)

    unique = {(problem.code, str(problem)): problem for problem in problems}
    return tuple(sorted(unique.values(), key=position))


class ConfigError(Exception):
    """A configuration cannot be used; `problems` holds everything found wrong with it.

    Attributes:
        problems: in reading order, at least one.
        exit_code: 2, the user's input is wrong.
    """

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sort_problems(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        """Survive pickling, as errors of worker processes must."""
        return (ConfigError, (self.problems,))
