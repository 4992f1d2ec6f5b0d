"""Read reports of the form `key : value`, indented below headings, with one part per device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from flagscale_hw.backends.values import MOST, clean

__all__ = ["Block", "blocks", "pairs"]

_PAIR = re.compile(r"\s*(?P<key>[^:|]{1,80}?)\s*:(?:\s+(?P<value>.*?))?\s*")
_LONGEST_LINE = 1000


@dataclass
class Block:
    """One device's part of a report."""

    title: re.Match[str]
    values: dict[str, str] = field(default_factory=dict)
    """`Heading/Key` and, for the first key of that name, `Key` alone."""

    def get(self, *keys: str) -> str | None:
        """Return the first of these that the report has."""
        return next((self.values[key] for key in keys if key in self.values), None)


def blocks(text: str, title: str) -> list[Block]:
    """Split a report where a line matches `title` as a whole, blanks around it aside."""
    found: list[Block] = []
    headings: list[tuple[int, str]] = []
    for line in _lines(text):
        start = re.fullmatch(title, line.strip())
        if start is not None and len(found) == MOST:
            break
        if start is not None:
            found.append(Block(start))
            headings = []
        elif found:
            _read(line, headings, found[-1].values)
    return found


def pairs(text: str) -> dict[str, str]:
    """Read a report that has no parts, or what stands above the first of them."""
    values: dict[str, str] = {}
    headings: list[tuple[int, str]] = []
    for line in _lines(text):
        _read(line, headings, values)
    return values


def _read(line: str, headings: list[tuple[int, str]], values: dict[str, str]) -> None:
    indent = len(line) - len(line.lstrip())
    pair = _PAIR.fullmatch(line)
    while headings and headings[-1][0] >= indent:
        headings.pop()
    if pair is None or pair["value"] is None:
        headings.append((indent, line.strip().rstrip(":").strip()))
        return
    path = "/".join([*(name for _, name in headings), pair["key"]])
    for key in (path, *([f"{headings[-1][1]}/{pair['key']}"] if headings else []), pair["key"]):
        values.setdefault(key, pair["value"])


def _lines(text: str) -> Iterator[str]:
    for line in clean(text).splitlines():
        if line.strip() and len(line) <= _LONGEST_LINE:
            yield line.expandtabs(4)
