"""Options as the words of a command line, by the engine's own table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.experiment import Experiment, ServeInstance
from flagscale_config.options import ENGINES, Option, OptionError, OptionTable, option_table
from flagscale_config.suggest import Hint, suggestion
from flagscale_config.translation import effective_options

__all__ = ["render", "render_engine", "render_megatron"]

_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # argparse's own rule


_POSITIONAL = frozenset({"vllm", "transformers"})
"""Engines that take the model as the first word, without a flag."""


def render(
    experiment: Experiment, serve_id: str | None = None, *, engine: str = "vllm", version: str | None = None
) -> tuple[str, ...]:
    """Return the words that follow the engine's program to do what an experiment asks for.

    For training these are Megatron's flags. For serving, those of one instance: its `engine_args` in the
    words of its engine, `engine_args_specific` of that engine over them, and the model where the engine takes
    it. `extra_args` come last, as they are.

    Args:
        experiment: a training or serving experiment.
        serve_id: which instance is meant; the only one by default.
        engine: the engine of an instance that names none.
        version: the engine's version; see `option_table`.

    Raises:
        ConfigError: there is no such instance, the task has no engine whose options are known, or an option
            cannot be said to that engine.
    """
    if experiment.train is not None:
        return (*render_megatron(experiment.train.options, version=version), *experiment.train.extra_args)
    instance = _instance(experiment, serve_id)
    engine = instance.engine or engine
    if engine not in ENGINES:
        raise _unsupported(engine)
    specific = instance.engine_args_specific.get(engine, {})
    translated = effective_options(engine, instance.engine_args, specific, version=version)
    options = dict(translated.options)
    model = options.pop("model", instance.engine_args.get("model")) if engine in _POSITIONAL else None
    left = {
        name: value for name, value in translated.untranslated.items() if name != "model" or model is None
    }
    if left:
        message = f"{engine} has no counterpart; say it under engine_args_specific.{engine}"
        raise ConfigError(
            [Problem(code="config/unsupported", message=message, key=k, given=v) for k, v in left.items()]
        )
    head = (str(model),) if model is not None else ()
    return (*head, *render_engine(engine, options, version=version), *instance.extra_args)


def _instance(experiment: Experiment, serve_id: str | None) -> ServeInstance:
    """Return the instance of that id, the only one for None."""
    known = {instance.serve_id: instance for instance in experiment.serve}
    if serve_id is None and len(known) == 1:
        return next(iter(known.values()))
    if serve_id in known:
        return known[str(serve_id)]
    said = "name one of its instances" if serve_id is None else f"no instance {serve_id!r}"
    message = f"{said}; known: {', '.join(known) or 'none: this task starts no engine of ours'}"
    raise ConfigError([Problem(code="config/value", message=message, key="serve", given=serve_id)])


def render_megatron(options: Mapping[str, Any], *, version: str | None = None) -> tuple[str, ...]:
    """Return Megatron's command line for options by canonical name, as `Train.options` holds them.

    Sorted by name, so that the same options give the same words. Megatron's parser reads the words back to
    the same values.

    Raises:
        ConfigError: a name is unknown or a value does not fit it.
    """
    return _render(option_table("megatron", version), options)


def render_engine(engine: str, options: Mapping[str, Any], *, version: str | None = None) -> tuple[str, ...]:
    """Return the command line of an engine's server for options by name.

    The model as a positional argument is not part of it: `model` is rendered as any other option where the
    engine has one.

    Raises:
        ConfigError: the engine has no option table, a name is unknown or a value does not fit it.
    """
    try:
        table = option_table(engine, version)
    except KeyError:
        raise _unsupported(engine) from None
    return _render(table, options)


def _unsupported(engine: str) -> ConfigError:
    message = f"no option table for engine {engine!r}; known: {', '.join(ENGINES)}"
    return ConfigError([Problem(code="config/unsupported", message=message)])


def _render(table: OptionTable, options: Mapping[str, Any]) -> tuple[str, ...]:
    words: list[str] = []
    problems: list[Problem] = []
    for key in sorted(options):
        value = options[key]
        found = table.find(key)
        if found is None:
            gone = table.elsewhere(key)
            hint = Hint(f": {gone}") if gone else suggestion(key, table, ())
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
    # One word, or argparse takes a value that starts with a dash for a flag; llama.cpp knows two words only.
    is_joined = rendered.startswith("-") and table.engine != "llama_cpp"
    return (f"{flag}={rendered}",) if is_joined else (flag, rendered)


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
