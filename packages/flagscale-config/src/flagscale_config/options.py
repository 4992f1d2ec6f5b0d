"""The options of each engine, as its own parser knows them.

The tables under `data/` are written by `scripts/extract_*.py` from the engines' parsers, several versions of
an engine in one file. This module finds an option by any of its spellings, and turns a YAML value into the
value the engine would parse. What does not live here: which version of an engine is meant (`versions.py`),
FlagScale's own additions to Megatron (`megatron.py`) and command lines (`rendering.py`).
"""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from flagscale_config.errors import show
from flagscale_config.versions import choose, meant, precedes

__all__ = [
    "ENGINES",
    "Option",
    "OptionError",
    "OptionTable",
    "OptionValue",
    "known_versions",
    "option_table",
    "spelled",
]

OptionValue = bool | int | float | str | tuple[Any, ...] | Mapping[str, Any]
"""What an option can hold: scalars, sequences of scalars, or (for JSON options) mappings."""

ENGINES = ("llama_cpp", "megatron", "sglang", "transformers", "vllm")
"""Engines whose options are known."""

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
    """`int`, `float`, `str`, `bool` (text the engine calls `bool` on), `size` (1k, 2M, ...), `toggle`
    (`on`, `off`, perhaps `auto`), `expr` (text that the engine parses itself) or
    `tuple` (`(128,0)`, likewise)."""
    nargs: str | int | None = None
    choices: tuple[Any, ...] = ()
    default: Any = None
    help: str = ""
    negative: str | None = None
    """The `--no-x` flag of a `pair`."""
    dest: str | None = None
    """The attribute in the engine's parsed arguments, where it is not the name."""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """Range of a number: `ge`, `gt`, `le`, `lt`, as the engine checks it."""
    keys: tuple[str, ...] = ()
    """Keys of a `json` option that takes no others; empty where any will do."""
    since: str | None = None
    """The first version that has the option as it is here; None for the oldest version known."""
    removed: str | None = None
    """The first version that has it no more, or otherwise; None when the newest version known has it."""
    renamed_to: str | None = None
    """What replaces it where it was removed."""
    is_added: bool = False
    """Whether it is not the engine's but what we add to it, by the names of its fork."""

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
            return self._known_keys(_json(value))
        if self.kind == "optional" and isinstance(value, bool):
            return value
        if self.kind in {"list", "append"}:
            return self._sequence(value)
        return self._scalar(value)

    def _known_keys(self, value: OptionValue) -> OptionValue:
        """Refuse a key that the engine's own class does not have."""
        for key in value if self.keys and isinstance(value, Mapping) else ():
            if spelled(str(key)).partition(".")[0] not in self.keys:
                near = get_close_matches(spelled(str(key)), self.keys, 1, 0.6)
                hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(self.keys)}"
                raise OptionError(f"has no key {key}{hint}", self.keys, near[0] if near else None)
        return value

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

    def _check_bounds(self, number: float) -> None:
        if not all(_BOUNDS[name][0](number, limit) for name, limit in self.bounds.items()):
            allowed = " and ".join(f"{_BOUNDS[name][1]} {limit}" for name, limit in self.bounds.items())
            raise OptionError(f"must be {allowed} ({show(number)} given)")

    def _scalar(self, value: Any) -> OptionValue:
        if self.type == "expr" and isinstance(value, (list, tuple)):
            value = json.dumps(list(value), separators=(",", ":"))
        if self.type == "tuple" and isinstance(value, (list, tuple)):
            value = f"({','.join(map(str, value))})"
        if isinstance(value, (list, tuple, Mapping)):
            raise OptionError(f"takes one {_WORDS[self.type]} ({show(value)} given)")
        converted: OptionValue = _CONVERTERS[self.type](value)
        if self.bounds and isinstance(converted, (int, float)):
            self._check_bounds(converted)
        if self.choices and converted not in self.choices:
            near = get_close_matches(str(converted), [str(item) for item in self.choices], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"must be one of {', '.join(map(str, self.choices))} ({show(value)} given){hint}"
            raise OptionError(message, self.choices, near[0] if near else None)
        return converted


_BOUNDS: Mapping[str, tuple[Callable[[float, float], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


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


def _expression(value: Any) -> str:
    """Return an expression without blanks, which Megatron refuses in patterns: `([0]*1+[1]*3)`."""
    text = _text(value)
    return "".join(text.split()) if text.lstrip()[:1] in ("[", "(") else text


def _size(value: Any) -> int | str:
    if isinstance(value, str) and not value.lstrip("-").isdigit():
        if _SIZE.fullmatch(value):
            return value
        raise OptionError(f"must be an integer or a size such as 8k ({show(value)} given)")
    return _integer(value)


def _toggle(value: Any) -> str:
    """Return `on` or `off`, which YAML reads as true and false, or another word as it is."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return {"true": "on", "false": "off"}.get(str(value).lower(), str(value))


_CONVERTERS: dict[str, Any] = {
    "int": _integer,
    "float": _number,
    "str": _text,
    "expr": _expression,
    "tuple": _expression,
    "bool": _text,
    "size": _size,
    "toggle": _toggle,
}
_WORDS = {
    "int": "integer",
    "float": "number",
    "str": "text",
    "expr": "value",
    "tuple": "tuple",
    "bool": "text",
    "size": "size",
    "toggle": "word",
}


class _Records(Mapping[str, Option]):
    """Options by name, each built from its record when it is first asked for: a file names few of them."""

    def __init__(self, engine: str, records: Mapping[str, Mapping[str, Any]]) -> None:
        self.records = records
        self._engine = engine
        self._built: dict[str, Option] = {}

    def __getitem__(self, name: str) -> Option:
        if name not in self._built:
            self._built[name] = _option(self._engine, self.records[name])
        return self._built[name]

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


class OptionTable:
    """All options of one engine version."""

    def __init__(
        self,
        engine: str,
        version: str,
        options: Mapping[str, Option],
        others: Mapping[str, Option] | None = None,
    ) -> None:
        self.engine = engine
        self.version = version
        """The version whose options these are: the nearest one known to the version asked for."""
        self.options = options
        self.others = {} if others is None else others
        """Options that only other versions have."""
        self._aliases: dict[str, tuple[str, bool]] = {}
        self._twins: dict[tuple[str, str], str] = {}
        opposites = []
        for name, flags, kind, dest, negative in _spellings(options):
            for flag in flags:
                self._aliases.setdefault(spelled(flag[2:]), (name, False))
            if kind in _OPPOSITE:
                self._twins.setdefault((dest or name, kind), name)
            opposites += [(word, name) for word in _opposites(kind, flags, dest, negative)]
        for word, name in opposites:
            self._aliases.setdefault(word, (name, True))

    def find(self, key: str) -> tuple[Option, bool] | None:
        """Return the option a key means, and whether the key says its opposite.

        `rope_fusion` is the opposite of `no_rope_fusion`. Hyphens, underscores, second spellings and the
        opposites of switches are all understood.
        """
        found = self._aliases.get(spelled(key))
        return (self.options[found[0]], found[1]) if found else None

    def elsewhere(self, key: str) -> str:
        """Say which other version has an option that this one lacks, and what replaces it; "" for none.

        For example `removed in vllm 0.28.0`, `new in vllm 0.31.0 (this is 0.25.1)`,
        `only megatron 0.17.1+fl has it; to check for that version: ...`.
        """
        option = self.others.get(spelled(key))
        if option is None:
            return ""
        cure = f"; use {option.renamed_to}" if option.renamed_to else ""
        if option.since is not None and "+" in option.since:
            ask = f"flagscale-config check --engine {self.engine}={option.since}"
            return f"only {self.engine} {option.since} has it{cure}; to check for that version: {ask}"
        if option.removed is not None and not precedes(self.version, option.removed):
            return f"removed in {self.engine} {option.removed}{cure}"
        return f"new in {self.engine} {option.since} (this is {self.version}){cure}"

    def renamed(self, key: str) -> str | None:
        """Return the option of this table that another name of it means, None when there is none."""
        name = _renamed().get(self.engine, {}).get(spelled(key))
        return name if name in self.options else None

    def spellings(self) -> Iterator[tuple[str, str, bool]]:
        """Yield every spelling with underscores, the option it means, and whether it says its opposite."""
        for alias, (name, is_opposite) in self._aliases.items():
            yield alias, name, is_opposite

    def twin(self, option: Option) -> Option | None:
        """Return the switch that sets the same attribute the other way, as `--no-x` does beside `--x`."""
        name = self._twins.get((option.attribute, _OPPOSITE.get(option.kind, "")))
        return self.options[name] if name is not None else None

    def nearest(self, key: str) -> str | None:
        """Return the option whose spelling is nearest to an unknown key, None when nothing is near."""
        near = get_close_matches(spelled(key), self._aliases, 1, 0.75)
        return near[0] if near else None

    def __contains__(self, key: object) -> bool:
        """Whether some spelling of an option is `key`."""
        return isinstance(key, str) and spelled(key) in self._aliases


_OPPOSITE = {"true": "false", "false": "true"}

_Spelling = tuple[str, Sequence[str], str, str | None, str | None]


def _spellings(options: Mapping[str, Option]) -> Iterator[_Spelling]:
    """Yield name, flags, kind, attribute and negative flag of each option, without building any."""
    if not isinstance(options, _Records):
        for option in options.values():
            yield option.name, option.flags, option.kind, option.dest, option.negative
        return
    for name, record in options.records.items():
        kind = record.get("kind", "value")
        yield name, _flags(record), kind, record.get("dest"), _negative(record, kind)


def _flags(record: Mapping[str, Any]) -> Sequence[str]:
    """Return the flags of a record; the usual one, which follows from the name, is not written there."""
    found: Sequence[str] | None = record.get("flags")
    return found if found is not None else ("--" + record["name"].replace("_", "-"),)


def _negative(record: Mapping[str, Any], kind: str) -> str | None:
    if kind != "pair":
        return None
    return str(record.get("negative") or f"--no-{_flags(record)[0][2:]}")


def _opposites(kind: str, flags: Sequence[str], dest: str | None, negative: str | None) -> list[str]:
    """Return the names by which users switch an option the other way."""
    if kind == "pair" and negative:
        return [spelled(negative[2:])]
    if kind != "false":
        return []
    names = [dest] if dest else []
    return names + [spelled(flag[5:]) for flag in flags if flag.startswith("--no-")]


def option_table(engine: str, version: str | None = None) -> OptionTable:
    """Return the options of an engine: `megatron`, `sglang`, `vllm`, `llama_cpp` or `transformers`.

    Args:
        engine: the engine.
        version: its version, such as `0.33` or `0.17.1+fl` (FlagOS's Megatron-LM-FL); by default the one
            asked for around the call (`versions.using`), else the one installed beside this package, else
            the newest known. The nearest version known not newer than it is taken: `OptionTable.version`.

    Raises:
        KeyError: no table is shipped for this engine.
    """
    if engine not in ENGINES:
        raise KeyError(engine)
    return _table(engine, choose(_data(engine)["versions"], version or meant(engine)))


def known_versions(engine: str) -> tuple[str, ...]:
    """Return the versions of an engine whose options are known, oldest first, forks last.

    Raises:
        KeyError: no table is shipped for this engine.
    """
    if engine not in ENGINES:
        raise KeyError(engine)
    return tuple(_data(engine)["versions"])


def _read(name: str) -> Any:
    return json.loads(files("flagscale_config").joinpath("data", name).read_text(encoding="utf-8"))


@functools.cache
def _data(engine: str) -> Any:
    return _read(f"{engine}.json")


@functools.cache
def _help(engine: str) -> Any:
    return _read(f"{engine}.help.json")


@functools.cache
def _added() -> Any:
    return _read("flagscale-megatron.json")["added"]


@functools.cache
def _renamed() -> Any:
    return _read("renamed.json")


@functools.cache
def _table(engine: str, version: str) -> OptionTable:
    """Return the table of one known version."""
    data = _data(engine)
    position = data["versions"].index(version)
    options: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for record in data["options"]:
        held = record.get("in")
        if held is None or position in held:
            options[record["name"]] = record
        else:
            others[record["name"]] = record
    if engine == "megatron":
        # The fork's options that flagscale-train brings to every Megatron, and what it allows of them.
        added = {name: {**others[name], **more} for name, more in _added().items() if name in others}
        options |= {name: {**record, "in": None, "added": True} for name, record in added.items()}
    elsewhere = {name: record for name, record in others.items() if name not in options}
    return OptionTable(engine, version, _Records(engine, options), _Records(engine, elsewhere))


def _option(engine: str, record: Mapping[str, Any]) -> Option:
    name, kind = record["name"], record.get("kind", "value")
    since, removed = _span(record.get("in"), _data(engine)["versions"])
    default = record.get("default")
    return Option(
        name=name,
        flags=tuple(_flags(record)),
        kind=kind,
        type=record.get("type", "str"),
        nargs=record.get("nargs"),
        choices=tuple(record.get("choices", ())),
        default=tuple(default) if isinstance(default, list) else default,
        help=_help(engine).get(name, ""),
        negative=_negative(record, kind),
        dest=record.get("dest"),
        bounds={name: record[name] for name in _BOUNDS if name in record},
        keys=tuple(record.get("keys", ())),
        since=since,
        removed=removed,
        renamed_to=_renamed().get(engine, {}).get(name),
        is_added=record.get("added", False),
    )


def _span(held: list[int] | None, versions: list[str]) -> tuple[str | None, str | None]:
    """Return the first version that has a record, and the first that has it no more, None for the ends."""
    if held is None:
        return None, None
    plain = [position for position in held if "+" not in versions[position]]
    if not plain:
        return versions[held[0]], None
    last = plain[-1] + 1
    is_gone = last < len(versions) and "+" not in versions[last]
    return (versions[plain[0]] if plain[0] else None), (versions[last] if is_gone else None)
