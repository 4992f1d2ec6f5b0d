"""What an unknown key may have meant, and where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from pydantic import BaseModel

from flagscale_config.experiment_section import ExperimentSection
from flagscale_config.options import OptionTable, option_table, spelled
from flagscale_config.runner import Cmds, Deploy, Runner, Task

__all__ = ["suggestion"]

_SECTIONS: dict[str, type[BaseModel]] = {
    "experiment": ExperimentSection,
    "experiment.task": Task,
    "experiment.runner": Runner,
    "experiment.runner.deploy": Deploy,
    "experiment.cmds": Cmds,
}


def _homes() -> dict[str, list[str]]:
    """Return, for each key of the typed sections, where it belongs."""
    homes: dict[str, list[str]] = {}
    for section, model in _SECTIONS.items():
        for name in model.model_fields:
            homes.setdefault(name, []).append(section)
    return homes


def suggestion(
    name: str, table: OptionTable | None, path: Sequence[str | int], sections: Sequence[str] = ()
) -> str:
    """Return `; did you mean ...?` or `; it belongs under ...`, or nothing.

    `table` holds the options allowed where the key stands (None outside engine sections), `sections` other
    names allowed there.
    """
    name = spelled(name)
    near = get_close_matches(name, sections, 1, 0.7)
    if near:
        return f"; did you mean {near[0]}?"
    if name in (homes := _homes()):
        return f"; it belongs under {' or '.join(homes[name])}"
    option = table.nearest(name) if table is not None else None
    return f"; did you mean {option}?" if option else _elsewhere(name, path, homes)


def _elsewhere(name: str, path: Sequence[str | int], homes: dict[str, list[str]]) -> str:
    """Say in which other part of a file an exact or similar key is known."""
    if path[:1] != ("train",) and name in option_table("megatron"):
        return "; it belongs under train (any of system, model, data)"
    if path[:1] != ("serve",) and name in option_table("vllm"):
        return "; it belongs under serve[].engine_args"
    near = get_close_matches(name, homes, 1, 0.8)
    return f"; did you mean {homes[near[0]][0]}.{near[0]}?" if near else ""
