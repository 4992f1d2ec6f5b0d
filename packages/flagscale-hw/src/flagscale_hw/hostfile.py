"""Hostfiles of FlagScale: one host per line, `<host> slots=<N> [type=<chip label>]`, `#` starts a comment.

Lines are matched to their end: a misspelt word is an error with its line, never silently dropped. A file that
does not exist is an error too: nothing ever falls back to this host.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flagscale_hw.errors import InputError
from flagscale_hw.target import Target, problems_of_target

__all__ = ["HostEntry", "read_hostfile"]

_LINE = re.compile(
    r"(?P<name>[^\s=#]+)(?P<rest>(?:\s+[^\s=]+=\S+)*)\s*",
)
_KEYS = ("slots", "type")


@dataclass(frozen=True, kw_only=True)
class HostEntry:
    """One line of a hostfile."""

    name: str
    slots: int
    """Processes that the host takes."""
    type: str | None = None
    """Label of its kind of device."""


def read_hostfile(path: str | os.PathLike[str]) -> tuple[HostEntry, ...]:
    """Read a hostfile; the first line is node 0.

    Raises:
        InputError: the file cannot be read, a line cannot be understood, a host is listed twice, only some
            lines have a type, or no host is left. All of these at once, each with its line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: hostfile: {reason}: give one host per line: <host> slots=<N>") from error
    entries: dict[int, HostEntry] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if line:
            try:
                entries[number] = _entry(line)
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    problems += [f"{path}:{number}: {text}" for number, text in _across(entries)]
    if not entries and not problems:
        problems.append(f"{path}: hostfile: no host in it: give one per line: <host> slots=<N>")
    if problems:
        raise InputError("\n".join(problems))
    return tuple(entries.values())


def _entry(line: str) -> HostEntry:
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"{line!r}: not a host: write <host> slots=<N> [type=<label>]")
    given: dict[str, str] = {}
    for word in found["rest"].split():
        key, _, value = word.partition("=")
        if key not in _KEYS:
            raise ValueError(f"{key!r}: unknown word: a host has {' and '.join(_KEYS)}")
        if key in given:
            raise ValueError(f"{key}: given twice")
        given[key] = value
    slots = given.get("slots", "")
    if not re.fullmatch(r"[1-9]\d{0,5}", slots):
        raise ValueError(f"slots={slots}: give the number of processes of {found['name']}, 1 or more")
    for problem in problems_of_target(Target(name=found["name"])):
        raise ValueError(problem)
    return HostEntry(name=found["name"], slots=int(slots), type=given.get("type"))


def _across(entries: dict[int, HostEntry]) -> Iterator[tuple[int, str]]:
    seen: dict[str, int] = {}
    for number, entry in entries.items():
        if entry.name in seen:
            yield (
                number,
                f"{entry.name}: listed twice (line {seen[entry.name]}): add up its slots in one line",
            )
        seen.setdefault(entry.name, number)
    if any(entry.type for entry in entries.values()):
        for number, entry in entries.items():
            if entry.type is None:
                yield number, f"{entry.name}: no type: either every host has one or none"
