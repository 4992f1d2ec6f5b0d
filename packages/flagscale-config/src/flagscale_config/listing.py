"""Everything an experiment asks for, one value after the other, with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from flagscale_config.errors import Origin
from flagscale_config.experiment import Experiment
from flagscale_config.loader import load
from flagscale_config.masking import masked

__all__ = ["Shown", "facts_of", "show"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One value of an experiment; a secret is `***`."""

    key: str
    """Path in the `Experiment`: `train.options.lr`."""
    value: Any
    origin: Origin | None
    """A line or an override; None for a default and for what follows from the file as a whole (`cwd`)."""
    is_default: bool
    """Whether neither the files nor an override say it."""


def show(
    source: str | PathLike[str], overrides: Sequence[str] = (), *, defaults: bool = False
) -> tuple[Shown, ...]:
    """Return what an experiment asks for, composed, resolved and checked, secrets masked.

    Args:
        source: an experiment file or a recipe.
        overrides: in Hydra's grammar.
        defaults: include what nobody said.

    Raises:
        ConfigError: everything that is wrong with the files and overrides.
    """
    experiment = load(source, overrides)
    stated = {key for key, _ in _flat(facts_of(experiment))}
    shown = []
    for key, value in _flat(facts_of(experiment, defaults=defaults)):
        origin = experiment.origin(key)
        is_placed = key in stated and bool(origin.line or origin.override)
        placed = origin if is_placed else None
        shown.append(Shown(key=key, value=value, origin=placed, is_default=key not in stated))
    return tuple(shown)


def facts_of(experiment: Experiment, *, defaults: bool = False) -> dict[str, Any]:
    """Return an experiment as plain data, secrets masked."""
    facts: dict[str, Any] = masked(experiment.model_dump(mode="json", exclude_defaults=not defaults))
    return facts


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every leaf."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and any(isinstance(item, (Mapping, list)) for item in tree):
        for index, value in enumerate(tree):
            yield from _flat(value, f"{path}.{index}")
    else:
        yield path, tree
