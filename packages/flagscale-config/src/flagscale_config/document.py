"""One YAML file, read once: its values as OmegaConf reads them, and the position of each of them.

Every byte-level fault (encoding, tabs, syntax, duplicate keys, alias bombs, depth, size) is found here and
located. What does not live here: defaults lists and merging (`compose.py`), meaning (`experiment.py`).
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import grammar_parser
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import SIMPLE_INTERPOLATION_PATTERN

from flagscale_config.errors import ConfigError, Origin, Problem, show
from flagscale_config.places import Path as KeyPath
from flagscale_config.places import Places, dotted

__all__ = ["Document", "read_document", "shown_path"]

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 60
MAX_NODES = 100_000
MAX_KEY = 200
# OmegaConf's parser of interpolations takes milliseconds for each, and for each hundred characters.
MAX_INTERPOLATED = 4096
MAX_INTERPOLATIONS = 64

_REQUIRED = re.compile(r"\$\{\s*[\w.]+\s*:?\s*\?{2,3}\s*\}")
_MERGE = "tag:yaml.org,2002:merge"
_REMOVED_ENV = re.compile(r"\$\{env:")
_COLLECTIONS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("set", "omap", "pairs"))
_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})
_SCALARS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "binary", "timestamp")
)
_WORDS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_CLOCK = re.compile(r"[-+]?[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-7_]*")
MAX_DIGITS = 400  # more than any number of use, less than Python takes a second over


@dataclass(frozen=True)
class Document:
    """A YAML file as data.

    `places` maps each path to where its key (for list items: the item) stands; the empty path is the file's
    start. `problems` are duplicate keys, of which the first was kept, and notes.
    """

    path: Path
    text: str
    data: Any
    places: Places
    problems: tuple[Problem, ...] = ()


# OmegaConf's own YAML loader: `1e-5` is a float there, dates stay text.
_LOADER: Any = get_yaml_loader()


def shown_path(path: Path) -> str:
    """Return a path as the user would type it: relative when it lies below the working directory."""
    absolute = Path(os.path.normpath(path.absolute()))
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)


def _fail(code: str, origin: Origin, message: str) -> ConfigError:
    return ConfigError([Problem(code=code, message=message, origin=origin)])


def _read_bytes(path: Path) -> bytes:
    """Return a regular file's first bytes; anything else (a pipe, a device) might never end.

    Raises:
        OSError: it cannot be read, or is not a file.
    """
    # Not to block: opening a pipe waits for someone to write.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is not a regular file")
        return stream.read(MAX_BYTES + 1)


def _read_text(path: Path) -> str:
    """Return the file's text.

    Raises:
        ConfigError: missing, a directory, unreadable, too big or not UTF-8.
    """
    name = Origin(file=shown_path(path))
    try:
        raw = _read_bytes(path)
    except FileNotFoundError:
        raise _fail("config/no-file", name, "no such file; check the path") from None
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise _fail("config/no-file", name, f"cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(raw) > MAX_BYTES:
        limit = MAX_BYTES // 2**20
        message = f"the file is larger than {limit} MiB; this is not a configuration"
        raise _fail("config/too-big", name, message)
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
    """One pass over a file's node graph: positions, limits, and spellings that need reading.

    It mends the graph where the value can be read all the same, so that one fault does not hide the others.
    """

    file: str
    places: Places = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def origin(self, node: Any) -> Origin:
        """Return where a node starts."""
        return Origin(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def add(self, code: str, node: Any, message: str, path: KeyPath) -> None:
        """Add a problem with a node."""
        self.problems.append(Problem(code=code, message=message, key=dotted(path), origin=self.origin(node)))

    def note(
        self, code: str, place: Origin, message: str, path: KeyPath, suggestion: str | None = None
    ) -> None:
        """Add a note about a value that is read all the same."""
        key = dotted(path)
        self.problems.append(
            Problem(code=code, message=message, key=key, origin=place, severity="note", suggestion=suggestion)
        )

    def visit(self, node: Any, path: KeyPath) -> None:
        """Visit a node; an aliased one is visited once per use, which is what the limit is for."""
        self.count += 1
        if self.count > MAX_NODES:
            message = f"more than {MAX_NODES} values, aliases expanded"
            raise _fail("config/too-big", self.origin(node), message)
        if len(path) > MAX_DEPTH:
            raise _fail("config/too-big", self.origin(node), f"nested more than {MAX_DEPTH} levels deep")
        if node.tag in _COLLECTIONS:
            self.add("config/value", node, f"a YAML {node.tag[18:]} is not supported; write a list", path)
            kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
            node.tag, node.value = f"tag:yaml.org,2002:{kind}", []
        elif isinstance(node, yaml.MappingNode):
            self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.places[(*path, index)] = self.origin(item)
                self.visit(item, (*path, index))
        elif isinstance(node, yaml.ScalarNode):
            self._scalar(node, path)

    def _mapping(self, node: Any, path: KeyPath) -> None:
        """Visit the pairs of a mapping; a key given twice keeps its first value."""
        for key, merged in node.value:
            if key.tag == _MERGE:  # before the mapping's own keys, which win over merged ones
                self._merge(merged, path)
        first: dict[str, Any] = {}
        kept = []
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                kept.append((key_node, value_node))
            elif self._is_key(key_node, first, path):
                kept.append((key_node, value_node))
                first[key_node.value] = key_node
                self.places[(*path, key_node.value)] = self.origin(key_node)
                self._misread(key_node, (*path, key_node.value), self.origin(key_node), is_key=True)
                self.visit(value_node, (*path, key_node.value))
        node.value = kept

    def _is_key(self, node: Any, first: dict[str, Any], path: KeyPath) -> bool:
        """Report a key that cannot be one, or was given before."""
        key = node.value
        if not isinstance(key, str):
            self.add("config/key-type", node, "a key must be text, not a list or a mapping", path)
        elif len(key) > MAX_KEY:
            message = f"a key of {len(key)} characters; {MAX_KEY} are allowed"
            raise _fail("config/too-big", self.origin(node), message)
        elif node.tag == "tag:yaml.org,2002:null":
            self.add("config/key-type", node, "a key must not be null; quote it if it is text", path)
        elif key in first:
            line = first[key].start_mark.line + 1
            message = f"duplicate key; first given at line {line}; keep one"
            self.add("config/duplicate-key", node, message, (*path, key))
        else:
            return True
        return False

    def _merge(self, node: Any, path: KeyPath) -> None:
        """Visit what `<<` merges in; of several the first wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in reversed(sources):
            self.visit(source, path)

    def _scalar(self, node: Any, path: KeyPath) -> None:
        if node.tag not in _SCALARS:
            return  # PyYAML says which tags it does not know
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            self._replace(node, path, f"a number of {len(node.value)} characters; quote it if it is text")
        elif "${" in node.value:
            self._interpolation(node, path)
        else:
            self._misread(node, path, self.places.get(path, self.origin(node)))

    def _misread(self, node: Any, path: KeyPath, place: Origin, *, is_key: bool = False) -> None:
        """Note what YAML 1.1, and so Hydra, reads as something else than most people do."""
        read = _otherwise(node)
        if read is not None:
            what = f"the key {node.value}" if is_key else node.value
            message = f"YAML reads {what} as {read}; write {read}, or quote it if it is text"
            # `migrate` writes what is suggested for a value; what a number means only the user knows.
            is_switch = read in {"true", "false"} and not is_key
            self.note("config/misread", place, message, path, read if is_switch else None)

    def _replace(self, node: Any, path: KeyPath, message: str, code: str = "config/value") -> None:
        """Report a scalar that cannot be read, and read null."""
        self.add(code, node, message, path)
        node.tag, node.value = "tag:yaml.org,2002:null", "null"

    def _interpolation(self, node: Any, path: KeyPath) -> None:
        text = node.value
        if _REQUIRED.fullmatch(text.strip()):
            node.value = "???"  # FlagScale's spelling of OmegaConf's "required from the user"
            return
        if len(text) > MAX_INTERPOLATED or text.count("${") > MAX_INTERPOLATIONS:
            limits = f"{MAX_INTERPOLATED} characters and {MAX_INTERPOLATIONS} interpolations"
            self._replace(node, path, f"text with interpolations may have {limits}", "config/too-big")
            return
        if _REMOVED_ENV.search(text):
            node.value = _REMOVED_ENV.sub("${oc.env:", text)
            message = "`${env:X}` is no longer known to OmegaConf and is read as `${oc.env:X}`; write that"
            self.note("config/removed-resolver", self.origin(node), message, path)
        if SIMPLE_INTERPOLATION_PATTERN.match(node.value):
            return
        try:
            grammar_parser.parse(node.value)
        except GrammarParseError as error:
            detail = str(error).split("\n", maxsplit=1)[0]
            message = f"{show(text)} is not an interpolation: {detail}; write ${{key}}, or \\${{ for the text"
            self._replace(node, path, message, "config/interpolation")


def _otherwise(node: Any) -> str | None:
    """Return what YAML reads for `yes`, `0123` (octal) and `22:30` (base 60); None for anything else."""
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "bool":
        return _WORDS.get(text.lower())
    if kind == "int" and _LEADING_ZERO.fullmatch(text):
        read = int(text.replace("_", ""), 8)
        return str(read) if read != int(text.replace("_", "")) else None
    if kind in {"int", "float"} and _CLOCK.fullmatch(text):
        constructor = yaml.constructor.SafeConstructor()
        is_int = kind == "int"
        return str((constructor.construct_yaml_int if is_int else constructor.construct_yaml_float)(node))
    return None


_CURES = {
    "'\\t'": "; indent with spaces, YAML allows no tabs there",
    "found '?'": "; quote it inside braces and brackets: '???'",
}


def _syntax_error(file: str, error: Any) -> ConfigError:
    """Turn PyYAML's complaint into one line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = Origin(file, mark.line + 1, mark.column + 1) if mark else Origin(file)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
    context = getattr(error, "context", None)
    hint = next((cure for sign, cure in _CURES.items() if sign in str(what)), "")
    return _fail("config/syntax", place, f"YAML syntax: {what}{f' {context}' if context else ''}{hint}")


def _check_characters(file: str, text: str) -> None:
    """Refuse control characters, which PyYAML reports without a usable position."""
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
    text = _read_text(path)
    file = shown_path(path)
    _check_characters(file, text)
    loader = _LOADER(text)
    walk = _Walk(file)
    walk.places[()] = Origin(file, 1, 1)
    try:
        node = loader.get_single_node()
        if node is not None:
            walk.visit(node, ())
        data = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise _syntax_error(file, error) from None
    except RecursionError:  # PyYAML recurses per level
        raise _fail("config/too-big", Origin(file), f"nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        # A value that does not fit its tag: `!!bool maybe`, `!!map text`, a date with a thirteenth month.
        message = f"cannot be read as YAML: a value does not fit its !!tag ({error})"
        raise _fail("config/syntax", Origin(file), message) from None
    finally:
        loader.dispose()
    return Document(path, text, data, walk.places, tuple(walk.problems))
