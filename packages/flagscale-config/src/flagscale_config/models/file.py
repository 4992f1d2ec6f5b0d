"""The model's options of a training file that need be neither finished nor free of mistakes.

Whoever asks which model a file is may not have filled in its paths yet, or may use options that are refused
here; the numbers of the model can be read all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import PurePath
from typing import Any

from flagscale_config.compose import compose
from flagscale_config.errors import ConfigError, Problem
from flagscale_config.loader import find
from flagscale_config.options import OptionError, option_table, spelled
from flagscale_config.resolve import is_incomplete, resolve

__all__ = ["read"]

_FLAGSCALES = ("multiple_of", "hidden_dim_multiplier")


def read(source: str | PathLike[str], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Return Megatron's options and the name of the script that a training file or recipe asks for.

    Values that are missing or do not fit their option are left out.

    Raises:
        ConfigError: the file cannot be read, or trains nothing.
    """
    data, _ = resolve(compose(find(source, "train"), overrides))
    if not isinstance(data.get("train"), Mapping):
        message = f"{source}: trains nothing, so there is no model to compare"
        raise ConfigError([Problem(code="config/model", message=message)])
    options = {}
    for key, value in _leaves(data["train"]):
        options.update(_typed(spelled(str(key)), value))
    return options, _script(data)


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        elif value is not None and not is_incomplete(value):
            yield key, value


def _typed(name: str, value: Any) -> dict[str, Any]:
    """Return the option of one leaf, by canonical name; nothing where it is none."""
    if name in _FLAGSCALES and isinstance(value, (int, float)):
        return {name: value}
    found = option_table("megatron").find(name)
    if found is None:
        return {}
    option, is_opposite = found
    try:
        typed = option.coerce(value)
    except OptionError:
        return {}
    return {option.name: not typed if is_opposite else typed}


def _script(data: Mapping[str, Any]) -> str:
    experiment = data.get("experiment")
    task = experiment.get("task") if isinstance(experiment, Mapping) else None
    entrypoint = task.get("entrypoint") if isinstance(task, Mapping) else None
    return PurePath(entrypoint).stem if isinstance(entrypoint, str) else ""
