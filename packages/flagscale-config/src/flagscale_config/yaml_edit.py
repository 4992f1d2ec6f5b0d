"""Changes of a YAML text that leave everything else as it is: comments, blank lines, quotes, layout.

Positions come from PyYAML's nodes, changes are made in the text itself. A round trip through a YAML writer
would also normalise indentation, flow mappings and quotes, and bury the few changed lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

__all__ = ["Edit", "Pair", "Tree", "applied"]


_ALIAS = re.compile(r"\s*:\s*\*[^\s,\]}]+")


@dataclass(frozen=True)
class Edit:
    """Replace the characters from `start` to before `end`."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Pair:
    """A key and its value in a mapping of the text."""

    path: tuple[str | int, ...]
    key: Any
    value: Any
    mapping: Any

    @property
    def position(self) -> tuple[int, int]:
        """Line and column of the key, from 1."""
        return self.key.start_mark.line + 1, self.key.start_mark.column + 1

    @property
    def is_flow(self) -> bool:
        """Whether it stands between braces."""
        return bool(self.mapping.flow_style)


class Tree:
    """The mappings of a YAML text, each pair with its place."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.root = yaml.compose(text, Loader=yaml.SafeLoader)
        self.pairs = list(self._pairs(self.root, (), set()))
        self._at = {pair.position: pair for pair in self.pairs}

    def _pairs(self, node: Any, path: tuple[str | int, ...], seen: set[int]) -> Iterator[Pair]:
        if id(node) in seen:  # an alias: its anchor has been visited
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*path, str(key.value))
                yield Pair(here, key, value, node)
                yield from self._pairs(value, here, seen)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield from self._pairs(item, (*path, index), seen)

    def at(self, line: int, column: int) -> Pair | None:
        """Return the pair whose key stands at a place, counted from 1."""
        return self._at.get((line, column))

    def find(self, *path: str | int) -> Pair | None:
        """Return the first pair with a path."""
        return next((pair for pair in self.pairs if pair.path == path), None)

    def renamed(self, pair: Pair, name: str) -> Edit:
        """Give a key another name."""
        return Edit(pair.key.start_mark.index, pair.key.end_mark.index, name)

    def valued(self, pair: Pair, text: str) -> Edit:
        """Give a scalar another value, written as `text`."""
        return Edit(pair.value.start_mark.index, pair.value.end_mark.index, text)

    def removed(self, pair: Pair) -> Edit:
        """Remove a key with its value, and the whole lines they take; comments above stay."""
        siblings = pair.mapping.value
        index = next(i for i, (key, _) in enumerate(siblings) if key is pair.key)
        start, end = pair.key.start_mark.index, self._end(pair.value, pair.key)
        if len(siblings) == 1:
            is_braced = pair.is_flow or pair.mapping.start_mark.index == 0
            return Edit(start, end, "" if is_braced and pair.is_flow else "{}")
        after = siblings[index + 1][0].start_mark.index if index + 1 < len(siblings) else None
        if pair.is_flow:
            if after is not None:
                return Edit(start, after, "")
            return Edit(self._end(siblings[index - 1][1], siblings[index - 1][0]), end, "")
        line = self.text.rfind("\n", 0, start) + 1
        if self.text[line:start].strip():  # `- key: value`: the next key moves to its place
            return Edit(start, after, "") if after is not None else Edit(start, end, "")
        return Edit(line, self._line_after(end), "")

    def block(self, pair: Pair) -> str:
        """Return the lines of a pair of a block mapping, their indentation removed."""
        start = self.text.rfind("\n", 0, pair.key.start_mark.index) + 1
        lines = self.text[start : self._line_after(self._end(pair.value, pair.key))].splitlines()
        width = pair.key.start_mark.column
        return "\n".join(line[width:] if not line[:width].strip() else line.lstrip() for line in lines)

    def appended(self, pair: Pair, lines: str, flow: str) -> Edit | None:
        """Add a pair to the mapping that is the value of `pair`: `lines` to a block, `flow` between braces.

        None where the value is no mapping with content.
        """
        mapping = pair.value
        if not isinstance(mapping, yaml.MappingNode) or not mapping.value:
            return None
        last = mapping.value[-1]
        if mapping.flow_style:
            at = self._end(last[1], last[0])
            return Edit(at, at, f", {flow}")
        indent = " " * mapping.value[0][0].start_mark.column
        at = self._line_after(self._end(last[1], last[0]))
        before = "" if at == 0 or self.text[at - 1] == "\n" else "\n"
        return Edit(
            at, at, before + "".join(f"{indent}{line}\n" if line else "\n" for line in lines.split("\n"))
        )

    def listed(self, pair: Pair, item: str) -> Edit | None:
        """Add an item to the end of the list that is the value of `pair`; None where it is no list."""
        node = pair.value
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            return None
        at = self._end(node.value[-1], node.value[-1])
        if node.flow_style:
            return Edit(at, at, f", {item}")
        start = self.text.rfind("\n", 0, node.value[0].start_mark.index) + 1
        dash = self.text[start : node.value[0].start_mark.index].partition("-")[0]
        at = self._line_after(at)
        before = "" if self.text[at - 1] == "\n" else "\n"
        return Edit(at, at, f"{before}{dash}- {item}\n")

    def _end(self, node: Any, key: Any) -> int:
        """Return where a value ends; PyYAML's own mark of a block is where the next thing begins."""
        if node.start_mark.index < key.start_mark.index:  # an alias: the node is where its anchor stands
            alias = _ALIAS.match(self.text, key.end_mark.index)
            return int(alias.end() if alias is not None else key.end_mark.index)
        if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
            last = node.value[-1]
            return self._end(last[1], last[0]) if isinstance(last, tuple) else self._end(last, last)
        return int(node.end_mark.index)

    def _line_after(self, index: int) -> int:
        """Return where the line after a place begins; a place at the start of a line is there already."""
        if index > 0 and self.text[index - 1] == "\n":
            return index
        found = self.text.find("\n", index)
        return len(self.text) if found < 0 else found + 1


def applied(text: str, edits: Sequence[Edit]) -> str:
    """Return a text with edits made; of two that overlap the first in the text is made."""
    parts, at = [], 0
    for edit in sorted(set(edits), key=lambda edit: (edit.start, edit.end)):
        if edit.start < at:
            continue
        parts += [text[at : edit.start], edit.text]
        at = edit.end
    return "".join([*parts, text[at:]])
