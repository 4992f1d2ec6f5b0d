"""Problems as text for people: one line each, and the source line with a mark under the place.

The one line is the same everywhere and for machines: `error: place: key: message [code]`. What does not live
here: which problems there are, and where the text goes.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from flagscale_config.errors import Origin, Problem, escaped
from flagscale_config.masking import masked_line

__all__ = ["Style", "count", "report", "wants_color"]

_MAX_BYTES = 4 * 1024 * 1024
_WIDTH = 100
_COLORS = {"error": "1;31", "note": "1;36", "place": "1", "code": "2", "margin": "34", "ok": "32"}
_KEY = re.compile(r"\"[^\"]*\"|'[^']*'|[^\s:,{}\[\]#]+")


class Style:
    """ANSI colours, or none."""

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on

    def __call__(self, kind: str, text: str) -> str:
        """Return text in the colour of its kind."""
        return f"\x1b[{_COLORS[kind]}m{text}\x1b[0m" if self.is_on and text else text


def wants_color(stream: TextIO) -> bool:
    """Whether to write colours: on a terminal, unless NO_COLOR is set; FORCE_COLOR wins over the terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def count(number: int, word: str) -> str:
    """Return `1 error`, `2 errors`."""
    return f"{number} {word}{'s' * (number != 1)}"


def report(problems: Iterable[Problem], form: str | None = None, *, is_quiet: bool = False) -> None:
    """Print errors on standard error, then notes on standard output.

    Args:
        problems: in the order in which they are to be read.
        form: `full` with the source line, `line` one line per problem; by default full on a terminal.
        is_quiet: errors only, one line each.
    """
    is_full = not is_quiet and (form == "full" or (form is None and sys.stderr.isatty()))
    listed = tuple(problems)
    for severity, stream in (("error", sys.stderr), ("note", sys.stdout)):
        style = Style(is_on=wants_color(stream))
        for problem in listed:
            if problem.severity != severity or (is_quiet and severity == "note"):
                continue
            lines = [_one_line(problem, style), *(_source_lines(problem, style) if is_full else ())]
            stream.write("".join(f"{line}\n" for line in lines))
        stream.flush()


def _one_line(problem: Problem, style: Style) -> str:
    """Return `error: place: key: message [code]`."""
    place = escaped(str(problem.origin)) if problem.origin else ""
    rest = str(problem).removeprefix(place)
    severity = style(problem.severity, f"{problem.severity}:")
    return f"{severity} {style('place', place)}{rest} {style('code', f'[{problem.code}]')}"


def _source_lines(problem: Problem, style: Style) -> list[str]:
    """Return the line of the problem's file with a mark under the place; nothing where there is none."""
    origin = problem.origin
    if origin is None or not origin.line or origin.override is not None:
        return []
    text = _lines_of(origin.file)
    if text is None or origin.line > len(text):
        return []
    shown, start, length = _window(*_marked(text, origin))
    if not shown.strip():
        return []
    margin = " " * len(str(origin.line))
    bar = style("margin", "|")
    mark = style(problem.severity, "^" * length)
    return [
        f"{margin} {bar}",
        f"{style('margin', str(origin.line))} {bar} {shown}",
        f"{margin} {bar} {' ' * start}{mark}",
    ]


def _lines_of(file: str) -> list[str] | None:
    """Return the lines of a file; None when it cannot be read any more."""
    path = Path(file)
    try:
        found = path.stat()
        return None if found.st_size > _MAX_BYTES else _read(path.absolute(), found.st_mtime_ns)
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=8)
def _read(path: Path, _changed_ns: int) -> list[str]:
    """Return the lines of a file; many problems of one file are shown together."""
    return re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig", errors="replace"))


def _marked(lines: list[str], origin: Origin) -> tuple[str, int, int]:
    """Return a line, secrets masked and tabs widened, and first column and width of the mark."""
    line = lines[origin.line - 1]
    before = line[: origin.column - 1]
    shown = masked_line(lines, origin.line - 1)
    # What stands before the place may hold a secret too, and becomes shorter by the mask.
    prefix = masked_line([*lines[: origin.line - 1], before], origin.line - 1) if before.strip() else before
    if not shown.startswith(prefix):
        prefix = shown[: len(before)]
    word = _KEY.match(shown[len(prefix) :])
    length = _columns(word[0]) if word else 1
    return _plain(shown), _columns(_plain(prefix)), max(length, 1)


def _plain(text: str) -> str:
    """Return text of one line in which nothing moves the cursor."""
    return "".join(
        " " if character == "\t" else character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _columns(text: str) -> int:
    """Return how many columns a text takes on a terminal: wide letters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _window(line: str, start: int, length: int) -> tuple[str, int, int]:
    """Cut a long line to what stands around the mark."""
    if _columns(line) <= _WIDTH:
        return line.rstrip(), start, length
    first = max(0, start - _WIDTH // 3)
    part = line[first : first + _WIDTH]
    head = "..." if first else ""
    tail = "..." if first + _WIDTH < len(line) else ""
    return f"{head}{part.rstrip()}{tail}", start - first + len(head), min(length, _WIDTH - (start - first))
