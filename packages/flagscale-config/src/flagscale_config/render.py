"""Options as the words of a command line, by the engine's own table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.options import Option, OptionTable, option_table
from flagscale_config.suggest import suggestion

__all__ = ["render_engine", "render_megatron"]


def render_megatron(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return Megatron's command line for options by canonical name, as `Train.options` holds them.

    Sorted by name, so that the same options give the same words. Megatron's parser reads the words back to the same
    values.

    Raises:
        ConfigError: a name is unknown or a value does not fit it.
    """
    return _render(option_table("megatron"), options)


def render_engine(engine: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the command line of `vllm serve` or `transformers serve` for options by name, without the model's positional
    argument: `model` is rendered as any other option where the engine has it.

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
            message = f"unknown option of {table.engine} {table.version}{suggestion(key, table, ())}"
            problems.append(Problem(code="config/unknown-key", message=message, key=key))
        elif value is not None:
            try:
                typed = found[0].coerce(value)
            except ValueError as error:
                problems.append(Problem(code="config/value", message=str(error), key=key, given=value))
                continue
            words += _words(table, found[0], not typed if found[1] else typed)
    if problems:
        raise ConfigError(problems)
    return tuple(words)


def _words(table: OptionTable, option: Option, value: Any) -> Iterator[str]:
    """Yield the words of one option."""
    flag = option.flags[0]
    if option.kind == "pair":
        yield flag if value else str(option.negative)
    elif option.is_switch:
        if value:
            yield flag
        elif (twin := table.twin(option)) is not None:
            yield twin.flags[0]
    elif option.kind == "optional" and isinstance(value, bool):
        if value:
            yield flag
    elif option.kind == "append":
        for item in value:
            yield f"{flag}={text(item)}"
    elif option.kind == "list":
        yield flag
        yield from (text(item) for item in value)
    else:
        # One word, so that a value that starts with a dash is not taken for a flag.
        rendered = _json_text(value) if option.kind == "json" else text(value)
        if rendered.startswith("-"):
            yield f"{flag}={rendered}"
        else:
            yield flag
            yield rendered


def _json_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value if not isinstance(value, tuple) else list(value), ensure_ascii=False, separators=(",", ":"))


def text(value: Any) -> str:
    """Return a scalar as a word that parses back to it: `repr` keeps every digit of a float."""
    return repr(value) if isinstance(value, float) else str(value)
