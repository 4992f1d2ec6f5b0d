"""One YAML file, read once: its values as OmegaConf reads them, and the position of each of them.

Every byte-level fault (encoding, tabs, syntax, duplicate keys, alias bombs, depth, size) is found here and located. What
does not live here: defaults lists and merging (`compose.py`), meaning (`experiment.py`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagscale_config.errors import ConfigError, Origin, Problem

__all__ = ["Document", "Places", "below", "read_document", "shown_path"]

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 60
MAX_NODES = 200_000

Places = dict[tuple[str | int, ...], Origin]

_REQUIRED = re.compile(r"\$\{\s*[\w.]+\s*:?\s*\?{2,3}\s*\}")
_MERGE = "tag:yaml.org,2002:merge"
_REMOVED_ENV = re.compile(r"\$\{env:")


@dataclass(frozen=True)
class Document:
    """A YAML file as data.

    `places` maps each path to where its key (for list items: the item) stands; the empty path is the file's start.
    """

    path: Path
    text: str
    data: Any
    places: Places
    notes: tuple[Problem, ...] = ()


@functools.cache
def _loader_class() -> Any:
    """Return OmegaConf's own YAML loader: `1e-5` is a float there, dates stay text, duplicates are refused."""
    from omegaconf._utils import get_yaml_loader

    return get_yaml_loader()


def shown_path(path: Path) -> str:
    """Return a path as the user would type it: relative when it lies below the working directory."""
    absolute = Path(os.path.normpath(path.absolute()))
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)


def _fail(code: str, origin: Origin, message: str) -> ConfigError:
    return ConfigError([Problem(code=code, message=message, origin=origin)])


def _read_text(path: Path) -> str:
    """Return the file's text.

    Raises:
        ConfigError: missing, a directory, unreadable, too big or not UTF-8.
    """
    name = Origin(file=shown_path(path))
    try:
        if path.stat().st_size > MAX_BYTES:
            limit = MAX_BYTES // 2**20
            raise _fail("config/too-big", name, f"the file is larger than {limit} MiB; this is not a configuration")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise _fail("config/no-file", name, "no such file; check the path") from None
    except OSError as error:
        raise _fail("config/no-file", name, f"cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        place = Origin(name.file, line, column)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise _fail("config/encoding", place, message) from None


@dataclass
class _Walk:
    """One pass over a file's node graph: positions, limits, and spellings that need reading."""

    file: str
    places: Places = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    count: int = 0

    def origin(self, node: Any) -> Origin:
        return Origin(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def add(self, code: str, node: Any, message: str, key: str = "") -> None:
        self.problems.append(Problem(code=code, message=message, key=key, origin=self.origin(node)))

    def visit(self, node: Any, path: tuple[str | int, ...]) -> None:
        """Visit a node; an aliased one is visited once per use, which is what the limit is for."""
        import yaml

        self.count += 1
        if self.count > MAX_NODES or len(path) > MAX_DEPTH:
            what = f"more than {MAX_NODES} values (aliases expanded)"
            deep = f"nested more than {MAX_DEPTH} levels deep"
            raise _fail("config/too-big", self.origin(node), what if self.count > MAX_NODES else deep)
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.places[(*path, index)] = self.origin(item)
                self.visit(item, (*path, index))
        elif isinstance(node, yaml.ScalarNode):
            self._scalar(node, path)

    def _mapping(self, node: Any, path: tuple[str | int, ...]) -> None:
        first: dict[str, Any] = {}
        merges = [value for key, value in node.value if key.tag == _MERGE]
        for merged in merges:  # before the mapping's own keys, which win over them
            self._merge(merged, path)
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node.value, str):
                self.add("config/key-type", key_node, "a key must be plain text, not a list or mapping")
                continue
            key = key_node.value
            if key in first:
                where = f"line {first[key].start_mark.line + 1}"
                dotted = ".".join(map(str, (*path, key)))
                self.add("config/duplicate-key", key_node, f"duplicate key; first given at {where}; keep one", dotted)
                continue
            first[key] = key_node
            here = (*path, key)
            self.places[here] = self.origin(key_node)
            self.visit(value_node, here)

    def _merge(self, node: Any, path: tuple[str | int, ...]) -> None:
        import yaml

        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in reversed(sources):
            self.visit(source, path)

    def _scalar(self, node: Any, path: tuple[str | int, ...]) -> None:
        text = node.value
        if "${" not in text:
            return
        key = ".".join(map(str, path))
        if _REQUIRED.fullmatch(text.strip()):
            node.value = "???"  # FlagScale's spelling of OmegaConf's "required from the user"
        elif _REMOVED_ENV.search(text):
            node.value = _REMOVED_ENV.sub("${oc.env:", text)
            message = "`${env:X}` was removed from OmegaConf and is read as `${oc.env:X}`; write that"
            self.notes.append(
                Problem(
                    code="config/removed-resolver",
                    message=message,
                    key=key,
                    origin=self.origin(node),
                    given=text,
                    severity="note",
                )
            )


def _syntax_error(file: str, error: Any) -> ConfigError:
    """Turn PyYAML's complaint into one line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = Origin(file, mark.line + 1, mark.column + 1) if mark else Origin(file)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
    context = getattr(error, "context", None)
    hint = "; indent with spaces, YAML allows no tabs there" if "'\\t'" in str(what) else ""
    return _fail("config/syntax", place, f"YAML syntax: {what}{f' {context}' if context else ''}{hint}")


def _check_characters(file: str, text: str) -> None:
    """Refuse control characters, which PyYAML reports without a usable position."""
    import yaml

    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        column = bad.start() - text.rfind("\n", 0, bad.start())
        message = f"control character U+{ord(bad.group()):04X} is not allowed in YAML; remove it"
        raise _fail("config/encoding", Origin(file, line, column), message)


def read_document(path: Path) -> Document:
    """Read one YAML file.

    Raises:
        ConfigError: the file cannot be read or is not YAML; each fault has its line and column.
    """
    import yaml

    text = _read_text(path)
    file = shown_path(path)
    _check_characters(file, text)
    loader = _loader_class()(text)
    walk = _Walk(file)
    walk.places[()] = Origin(file, 1, 1)
    try:
        node = loader.get_single_node()
        if node is not None:
            walk.visit(node, ())
        if walk.problems:
            raise ConfigError(walk.problems)
        data = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise _syntax_error(file, error) from None
    except (RecursionError, ValueError, OverflowError) as error:
        # PyYAML recurses per level, and builds numbers by int() of thousands of digits.
        message = f"cannot be read as YAML: {error}"
        raise _fail("config/syntax", Origin(file), message) from None
    finally:
        loader.dispose()
    return Document(path, text, data, walk.places, tuple(walk.notes))


def below(places: Places, prefix: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of `places` that lie at or below `prefix`."""
    for path in places:
        if path[: len(prefix)] == prefix:
            yield path
