"""The options of each engine, as its own parser knows them.

The tables under `data/` are written by `scripts/extract_*.py` from the engines' parsers. This module reads
them, finds an option by any of its spellings, and turns a YAML value into the value the engine would parse.
What does not live here: FlagScale's own additions to Megatron (`megatron.py`) and command lines
(`render.py`).
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from flagscale_config.errors import show

__all__ = ["Option", "OptionError", "OptionTable", "OptionValue", "option_table", "spelled"]

OptionValue = bool | int | float | str | tuple[Any, ...] | Mapping[str, Any]
"""What an option can hold: scalars, sequences of scalars, or (for JSON options) mappings."""

_FILES = {"megatron": "megatron-0.19.json", "vllm": "vllm-0.25.json", "transformers": "transformers-5.json"}
_SIZE = re.compile(r"\d+(\.\d+)?[kKmMgGtT]?|auto|-1")


class OptionError(ValueError):
    """A value does not fit an option; the text says what is allowed, `allowed` where it is a list."""

    def __init__(self, message: str, allowed: tuple[Any, ...] = (), suggestion: str | None = None) -> None:
        self.allowed = allowed
        self.suggestion = suggestion
        super().__init__(message)


def spelled(key: str) -> str:
    """Return a key in the one spelling of this package: underscores."""
    return key.replace("-", "_")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of an engine."""

    name: str
    """The first flag with underscores: `no_rope_fusion`. This is the key of `Train.options`."""
    flags: tuple[str, ...]
    kind: str
    """`true` and `false`: a flag without value, the latter switching off what is on by default; `pair`: `--x`
    and `--no-x`; `value`; `list`: several values; `append`: the flag repeated; `json`: one JSON text;
    `optional`: a flag with or without value."""
    type: str = "str"
    """`int`, `float`, `str`, `bool` (text the engine calls `bool` on), `size` (1k, 2M, ...), `expr` (text the
    engine parses itself)."""
    nargs: str | int | None = None
    choices: tuple[Any, ...] = ()
    default: Any = None
    help: str = ""
    negative: str | None = None
    """The `--no-x` flag of a `pair`."""
    dest: str | None = None
    """The attribute in the engine's parsed arguments, where it is not the name."""

    @property
    def attribute(self) -> str:
        """The attribute of the engine's parsed arguments that this option sets."""
        return self.dest or self.name

    @property
    def is_switch(self) -> bool:
        """Whether the option is on or off, nothing else."""
        return self.kind in {"true", "false", "pair"}

    def coerce(self, value: Any) -> OptionValue:
        """Return a YAML value as the type the engine would parse it to.

        Raises:
            OptionError: the value is not allowed; the text says what is.
        """
        if self.is_switch:
            return _switch(value)
        if self.kind == "json":
            return _json(value)
        if self.kind == "optional" and isinstance(value, bool):
            return value
        if self.kind in {"list", "append"}:
            return self._sequence(value)
        return self._scalar(value)

    def _sequence(self, value: Any) -> tuple[Any, ...]:
        """Return a list option's values; text is split at blanks, as FlagScale's shell did."""
        if isinstance(value, str) and self.kind == "list":
            value = value.split()
        items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if isinstance(self.nargs, int) and len(items) != self.nargs:
            raise OptionError(f"takes exactly {self.nargs} values ({len(items)} given)")
        if self.nargs == "+" and not items:
            raise OptionError("takes at least one value")
        return tuple(self._scalar(item) for item in items)

    def _scalar(self, value: Any) -> OptionValue:
        if self.type == "expr" and isinstance(value, (list, tuple)):
            value = json.dumps(list(value))
        if isinstance(value, (list, tuple, Mapping)):
            raise OptionError(f"takes one {_WORDS[self.type]} ({show(value)} given)")
        converted: OptionValue = _CONVERTERS[self.type](value)
        if self.choices and converted not in self.choices:
            near = get_close_matches(str(converted), [str(item) for item in self.choices], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"must be one of {', '.join(map(str, self.choices))} ({show(value)} given){hint}"
            raise OptionError(message, self.choices, near[0] if near else None)
        return converted


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    raise OptionError(f"must be true or false ({show(value)} given)", (True, False))


def _json(value: Any) -> OptionValue:
    """Return a JSON option's value; text must be JSON itself or the engine's own short form."""
    if isinstance(value, str) and value.lstrip()[:1] in {"{", "["}:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise OptionError(f"is not JSON: {error}") from None
    return tuple(value) if isinstance(value, list) else value


def _integer(value: Any) -> int:
    number = _whole(value)
    if number is None:
        raise OptionError(f"must be an integer ({show(value)} given)")
    return number


def _whole(value: Any) -> int | None:
    """Return the integer a value means: `8`, `"8"`, `8.0`, `1e3`; None when it means none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, int):
        return value
    try:
        if isinstance(value, str) and value.strip().lstrip("+-").isdigit():
            return int(value)
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise OptionError(f"must be a number ({show(value)} given)")
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        raise OptionError(f"must be a number ({show(value)} given)") from None
    if math.isnan(number):
        raise OptionError("must be a number (nan given)")
    return number


def _text(value: Any) -> str:
    if isinstance(value, bool):
        raise OptionError(f"must be text ({show(value)} given); quote it if you mean the word")
    return str(value)


def _size(value: Any) -> int | str:
    if isinstance(value, str) and not value.lstrip("-").isdigit():
        if _SIZE.fullmatch(value):
            return value
        raise OptionError(f"must be an integer or a size such as 8k ({show(value)} given)")
    return _integer(value)


_CONVERTERS: dict[str, Any] = {
    "int": _integer,
    "float": _number,
    "str": _text,
    "expr": _text,
    "bool": _text,
    "size": _size,
}
_WORDS = {
    "int": "integer",
    "float": "number",
    "str": "text",
    "expr": "value",
    "bool": "text",
    "size": "size",
}


class OptionTable:
    """All options of one engine version."""

    def __init__(self, engine: str, version: str, options: Mapping[str, Option]) -> None:
        self.engine = engine
        self.version = version
        self.options = options
        self._aliases: dict[str, tuple[str, bool]] = {}
        for option in options.values():
            for flag in option.flags:
                self._aliases.setdefault(spelled(flag[2:]), (option.name, False))
        for option in options.values():
            for opposite in _opposites(option):
                self._aliases.setdefault(opposite, (option.name, True))

    def find(self, key: str) -> tuple[Option, bool] | None:
        """Return the option a key means, and whether the key says its opposite.

        `rope_fusion` is the opposite of `no_rope_fusion`. Hyphens, underscores, second spellings and the
        opposites of switches are all understood.
        """
        found = self._aliases.get(spelled(key))
        return (self.options[found[0]], found[1]) if found else None

    def twin(self, option: Option) -> Option | None:
        """Return the switch that sets the same attribute the other way, as `--no-x` does beside `--x`."""
        other = {"true": "false", "false": "true"}.get(option.kind)
        same = (item for item in self.options.values() if item.attribute == option.attribute)
        return next((item for item in same if item.kind == other), None)

    def nearest(self, key: str) -> str | None:
        """Return the option whose spelling is nearest to an unknown key, None when nothing is near."""
        near = get_close_matches(spelled(key), self._aliases, 1, 0.75)
        return near[0] if near else None

    def __contains__(self, key: object) -> bool:
        """Whether some spelling of an option is `key`."""
        return isinstance(key, str) and spelled(key) in self._aliases


def _opposites(option: Option) -> list[str]:
    """Return the names by which users switch an option the other way."""
    if option.kind == "pair" and option.negative:
        return [spelled(option.negative[2:])]
    if option.kind != "false":
        return []
    names = [option.dest] if option.dest else []
    return names + [spelled(flag[5:]) for flag in option.flags if flag.startswith("--no-")]


@functools.cache
def option_table(engine: str) -> OptionTable:
    """Return the option table of `megatron`, `vllm` or `transformers`.

    Raises:
        KeyError: no table is shipped for this engine.
    """
    text = files("flagscale_config").joinpath("data", _FILES[engine]).read_text(encoding="utf-8")
    raw = json.loads(text)
    options: dict[str, Option] = {}
    for item in raw["options"]:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in item.items()
        }
        options[item["name"]] = Option(**fields)
    return OptionTable(raw["engine"], raw["version"], options)
