"""Read the tables that vendors' tools draw, by their header and never by position.

A header has one or more lines, each with cells between vertical bars, each with one or more titles. A record
has as many lines, and its cells hold the values in the order of the titles. Titles are found by a vocabulary
of regular expressions, values must match the pattern of their title: a cell that does not fit as a whole
is not known, and a column that nobody has heard of costs nothing but its own value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from flagscale_hw.backends.values import MOST, UNKNOWN, clean

__all__ = ["Column", "Row", "Table"]

Row = dict[str, str]
"""Field -> what the tool printed, with the unit of the title where the value has none."""

_RULE = re.compile(r"[\s+|=─-]*[=─-]{3}[\s+|=─-]*")
_TITLE_UNIT = re.compile(r"[(\[](MB|MiB|KB|GB|GiB|B|W|C|%)[)\]]")
_ENDS_IN_DIGIT = re.compile(r"[0-9]$")
_LONGEST_LINE = 1000


@dataclass(frozen=True)
class Column:
    """One title and what stands below it."""

    title: str
    """Regular expression; case does not matter."""
    value: str = r"\S+"
    """Regular expression; its named groups are the fields of the row."""


@dataclass(frozen=True)
class Table:
    """A kind of table: the titles that it may have, and how to know its header."""

    anchor: str
    """Regular expression that the first line of the header, and no other line before it, contains."""
    columns: Sequence[Column]
    """The vocabulary; where two titles begin at the same place, the earlier one counts."""
    height: int = 0
    """Lines per record; 0 when a record has as many lines as the header."""

    def read(self, text: str) -> list[Row]:
        """Return the rows below the first header, up to the end of that table."""
        blocks = list(_blocks(clean(text)))
        for number, block in enumerate(blocks):
            top = next((at for at, line in enumerate(block) if self._is_header(line)), None)
            if top is not None:
                below = block[top : top + self.height] if self.height else block[top:]
                # Some tables have no line between header and rows.
                rest = block[top + self.height :] if self.height else []
                return self._rows(below, [rest, *blocks[number + 1 :]])
        return []

    def _is_header(self, line: str) -> bool:
        return re.search(self.anchor, line, re.IGNORECASE) is not None

    def _rows(self, header: Sequence[str], blocks: Sequence[Sequence[str]]) -> list[Row]:
        lines = [_Line(tuple(self._cell(cell) for cell in line.split("|"))) for line in header]
        rows: list[Row] = []
        for block in blocks:
            at = 0
            while at < len(block) and len(rows) < MOST:
                row = lines[0].read(block[at])
                at += 1
                if row is None:
                    continue
                for line in lines[1:]:
                    # A line that begins another record was preceded by one that got lost.
                    if at < len(block) and lines[0].read(block[at]) is None:
                        row = {**line.take(block[at]), **row}
                        at += 1
                rows.append(row)
        return rows

    def _cell(self, titles: str) -> _Cell:
        return _Cell(tuple(self._columns_of(titles)))

    @cached_property
    def _vocabulary(self) -> re.Pattern[str]:
        words = "|".join(f"(?P<c{number}>{column.title})" for number, column in enumerate(self.columns))
        return re.compile(rf"(?<![A-Za-z])(?:{words})(?![a-z])", re.IGNORECASE)

    def _columns_of(self, titles: str) -> Iterator[tuple[Column, str]]:
        """Yield the columns of a cell of the header, with their units."""
        end = 0
        for found in self._vocabulary.finditer(titles):
            yield from _strangers(titles[end : found.start()])
            unit = _TITLE_UNIT.search(found[0])
            yield self.columns[int((found.lastgroup or "c0")[1:])], unit[1] if unit else ""
            end = found.end()
        yield from _strangers(titles[end:])


def _strangers(titles: str) -> Iterator[tuple[Column, str]]:
    """Yield one column for each title that is not in the vocabulary."""
    for title in re.split(r"\s{2,}", titles.strip()):
        if title:
            yield Column(title), ""


class _Cell:
    """One cell of the header: the titles in it."""

    def __init__(self, columns: tuple[tuple[Column, str], ...]) -> None:
        self.is_blank = not columns
        self._unit_of: dict[str, str] = {}
        patterns = []
        for column, unit in columns:
            value = column.value
            fields = list(re.compile(value).groupindex)
            if any(field in self._unit_of for field in fields):
                value = re.sub(r"\(\?P<\w+>", "(?:", value)  # a title that stands twice says nothing new
            self._unit_of |= {field: unit for field in fields if field not in self._unit_of}
            patterns.append(f"(?:{value}|{UNKNOWN}(?:\\s*/\\s*{UNKNOWN})?)")
        self._pattern = re.compile(r"\s+".join(patterns))

    def read(self, text: str) -> Row | None:
        """Return the fields of a cell of a record; None when it does not fit."""
        found = self._pattern.fullmatch(text.strip())
        if found is None:
            return None
        values = {field: value for field, value in found.groupdict().items() if value is not None}
        return {
            field: f"{value} {self._unit_of[field]}".strip() if _ENDS_IN_DIGIT.search(value) else value
            for field, value in values.items()
        }


@dataclass(frozen=True)
class _Line:
    """One line of the header."""

    cells: tuple[_Cell, ...]

    def read(self, line: str) -> Row | None:
        """Return the fields of the first line of a record; None when this is not one.

        It is when its first cell fits and more than half of all cells do.
        """
        read = self._cells(line)
        if not read or read[0] is None:
            return None
        fitting = [row for row in read if row is not None]
        if 2 * len(fitting) <= len(read):
            return None
        return {field: value for row in fitting for field, value in row.items()}

    def take(self, line: str) -> Row:
        """Return the fields of whatever cells fit."""
        return {field: value for row in self._cells(line) for field, value in (row or {}).items()}

    def _cells(self, line: str) -> list[Row | None]:
        texts = line.split("|")
        if len(texts) != len(self.cells):
            return []
        return [cell.read(text) for cell, text in zip(self.cells, texts, strict=True) if not cell.is_blank]


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield the runs of lines between rules and empty lines."""
    block: list[str] = []
    for line in text.splitlines():
        if not line.strip() or _RULE.fullmatch(line) or len(line) > _LONGEST_LINE:
            yield block
            block = []
        else:
            block.append(line)
    yield block
