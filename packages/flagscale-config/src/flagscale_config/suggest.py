"""What an unknown key may have meant, and where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from flagscale_config.options import OptionTable, option_table, spelled

__all__ = ["suggestion"]


def _homes() -> dict[str, list[str]]:
    """Return, for each key of the typed sections, where it belongs."""
    from flagscale_config.experiment_section import ExperimentSection
    from flagscale_config.runner import Cmds, Deploy, Runner, Task

    homes: dict[str, list[str]] = {}
    sections = {
        "experiment": ExperimentSection,
        "experiment.task": Task,
        "experiment.runner": Runner,
        "experiment.runner.deploy": Deploy,
        "experiment.cmds": Cmds,
    }
    for section, model in sections.items():
        for name in model.model_fields:
            homes.setdefault(name, []).append(section)
    return homes


def suggestion(
    name: str, table: OptionTable | None, path: Sequence[str | int], sections: Sequence[str] = ()
) -> str:
    """Return `; did you mean ...?` or `; it belongs under ...`, or nothing.

    `table` holds the options allowed where the key stands (None outside engine sections), `sections` other names allowed there.
    """
    name = spelled(name)
    here = get_close_matches(name, sections, 1, 0.7)
    if here:
        return f"; did you mean {here[0]}?"
    homes = _homes()
    if name in homes:
        return f"; it belongs under {' or '.join(homes[name])}"
    near = table.nearest(name) if table is not None else None
    if near:
        return f"; did you mean {near}?"
    in_train = path[:1] == ("train",)
    if not in_train and name in option_table("megatron"):
        return "; it belongs under train (any of system, model, data)"
    if path[:1] != ("serve",) and name in option_table("vllm"):
        return "; it belongs under serve[].engine_args"
    elsewhere = get_close_matches(name, homes, 1, 0.8)
    if elsewhere:
        return f"; did you mean {homes[elsewhere[0]][0]}.{elsewhere[0]}?"
    return ""
