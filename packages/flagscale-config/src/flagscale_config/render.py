"""Options as the words of a command line, by the engine's own table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.options import Option, OptionError, OptionTable, option_table
from flagscale_config.suggest import suggestion

__all__ = ["render_engine", "render_megatron"]

_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # argparse's own rule


def render_megatron(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return Megatron's command line for options by canonical name, as `Train.options` holds them.

    Sorted by name, so that the same options give the same words. Megatron's parser reads the words back to
    the same values.

    Raises:
        ConfigError: a name is unknown or a value does not fit it.
    """
    return _render(option_table("megatron"), options)


def render_engine(engine: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the command line of `vllm serve` or `transformers serve` for options by name.

    The model as a positional argument is not part of it: `model` is rendered as any other option where the
    engine has one.

    Raises:
        ConfigError: the engine has no option table, a name is unknown or a value does not fit it.
    """
    try:
        table = option_table(engine)
    except KeyError:
        message = f"no option table for engine {engine!r}; known: megatron, transformers, vllm"
        raise ConfigError([Problem(code="config/unsupported", message=message)]) from None
    return _render(table, options)


def _render(table: OptionTable, options: Mapping[str, Any]) -> tuple[str, ...]:
    words: list[str] = []
    problems: list[Problem] = []
    for key in sorted(options):
        value = options[key]
        found = table.find(key)
        if found is None:
            hint = suggestion(key, table, ())
            message = f"unknown option of {table.engine} {table.version}{hint}"
            problems.append(
                Problem(code="config/unknown-key", message=message, key=key, suggestion=hint.suggestion)
            )
        elif value is not None:
            try:
                typed = found[0].coerce(value)
                words += _words(table, found[0], not typed if found[1] else typed)
            except OptionError as error:
                problems.append(Problem(code="config/value", message=str(error), key=key, given=value))
    if problems:
        raise ConfigError(problems)
    return tuple(words)


def _words(table: OptionTable, option: Option, value: Any) -> tuple[str, ...]:
    """Return the words of one option.

    Raises:
        OptionError: the engine's parser could not read the value back.
    """
    flag = option.flags[0]
    if option.is_switch:
        return _switch(table, option, is_on=value)
    if option.kind == "optional" and isinstance(value, bool):
        return (flag,) if value else ()
    if option.kind == "append":
        return tuple(f"{flag}={text(item)}" for item in value)
    if option.kind == "list":
        return (flag, *(_item(item) for item in value))
    rendered = _json_text(value) if option.kind == "json" else text(value)
    # One word, or argparse takes a value that starts with a dash for a flag.
    return (f"{flag}={rendered}",) if rendered.startswith("-") else (flag, rendered)


def _switch(table: OptionTable, option: Option, *, is_on: bool) -> tuple[str, ...]:
    """Return the flag that switches an option on or off; none when off is said by saying nothing."""
    if is_on:
        return (option.flags[0],)
    if option.kind == "pair":
        return (str(option.negative),)
    twin = table.twin(option)
    return (twin.flags[0],) if twin is not None else ()


def _item(value: Any) -> str:
    """Return one of several values; argparse reads those after the first as flags when they look like it."""
    word = text(value)
    if word.startswith("-") and not _NUMBER.fullmatch(word):
        raise OptionError(f"{word!r} starts with a dash; among several values the parser takes it for a flag")
    return word


def _json_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def text(value: Any) -> str:
    """Return a scalar as a word that parses back to it: `repr` keeps every digit of a float."""
    return repr(value) if isinstance(value, float) else str(value)
