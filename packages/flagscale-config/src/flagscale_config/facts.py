"""What the files say, value by value: resolved, and with the engine option each becomes.

For `explain`, `diff` and `migrate`, which must also work on files that are not complete or not right yet;
`load()` is for those that are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flagscale_config.compose import Composed
from flagscale_config.errors import Origin
from flagscale_config.megatron import renamed_option, renamed_value
from flagscale_config.options import Option, OptionError, OptionTable, option_table, spelled
from flagscale_config.places import Path, dotted
from flagscale_config.resolve import MISSING, resolve

__all__ = ["Fact", "facts", "is_megatron", "table_of"]

_ENGINES = ("vllm", "sglang", "llama_cpp", "transformers")
_NO_LEAVES = ("runtime_env",)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One value of an experiment's files."""

    path: Path
    """Where it stands, as it is written there."""
    name: str
    """The same for every section and spelling of an option: `train.lr`; for other values the dotted path."""
    value: Any
    """Interpolations resolved, typed as the engine's parser types it where it fits; `???` when the user must
    still give it."""
    origin: Origin
    engine: str = ""
    """The engine whose option it is."""
    option: Option | None = None

    @property
    def key(self) -> str:
        """The path as users write it."""
        return dotted(self.path)


def table_of(engine: str) -> OptionTable | None:
    """Return the option table of an engine, None where none is shipped."""
    try:
        return option_table(engine)
    except KeyError:
        return None


def is_megatron(data: Mapping[str, Any]) -> bool:
    """Whether the `train` section of a file holds Megatron's options."""
    experiment = data.get("experiment")
    task = experiment.get("task") if isinstance(experiment, Mapping) else None
    backend = task.get("backend") if isinstance(task, Mapping) else None
    return backend in {None, "megatron"}


def facts(composed: Composed) -> tuple[Fact, ...]:
    """Return every value of a composed experiment, in the order of its files."""
    data, _ = resolve(composed)
    found = []
    for path, value in _leaves(data, ()):
        engine = _engine(data, path)
        table = table_of(engine) if engine else None
        option, typed = _typed(table, str(path[-1]), value) if table is not None else (None, value)
        name = dotted(path)
        if option is not None:
            name = f"train.{option.name}" if engine == "megatron" else _serve_name(data, path, option.name)
        elif path[0] == "serve":
            name = _serve_name(data, path, str(path[-1]))
        found.append(
            Fact(
                path=path,
                name=name.replace("experiment.deploy.", "experiment.runner.deploy."),
                value="???" if value is MISSING else typed,
                origin=composed.origin(path),
                engine=engine if option is not None else "",
                option=option,
            )
        )
    return tuple(found)


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield path and value of everything that is not a mapping, or a list of mappings."""
    if isinstance(tree, Mapping) and tree and path[-1:] not in [(name,) for name in _NO_LEAVES]:
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for index, value in enumerate(tree):
            yield from _leaves(value, (*path, index))
    elif path:
        yield path, tree


def _engine(data: Mapping[str, Any], path: Path) -> str:
    """Return the engine whose option a path is by its place, empty when it is none."""
    if path[0] == "train" and len(path) > 2 and path[1] != "extra_args" and is_megatron(data):
        return "megatron"
    if path[0] == "serve" and len(path) > 3 and path[2] == "engine_args":
        return "vllm"
    if path[0] == "serve" and len(path) > 4 and path[2] == "engine_args_specific" and path[3] in _ENGINES:
        return str(path[3])
    return ""


def _typed(table: OptionTable, key: str, value: Any) -> tuple[Option | None, Any]:
    """Return the option a key means and the value as the engine would have it."""
    name = renamed_option(key) if table.engine == "megatron" else spelled(key)
    found = table.find(name)
    if found is None:
        return None, value
    option, is_opposite = found
    if value is None or value is MISSING or value == "None":
        return option, None if value == "None" else value
    try:
        typed = option.coerce(renamed_value(option.name, value) if table.engine == "megatron" else value)
    except OptionError:
        return option, value
    return option, not typed if is_opposite else typed


def _serve_name(data: Mapping[str, Any], path: Path, last: str) -> str:
    """Return the name of a value of a serve item: items are known by their ids, not by their order."""
    items, index = data.get("serve"), path[1] if len(path) > 1 else None
    item = items[index] if isinstance(items, list) and isinstance(index, int) else None
    label = item.get("serve_id", index) if isinstance(item, Mapping) else index
    return dotted(("serve", os.fspath(label) if isinstance(label, str) else str(label), *path[2:-1], last))
