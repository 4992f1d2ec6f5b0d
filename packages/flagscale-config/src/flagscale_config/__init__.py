"""Typed configuration contract for FlagScale: load, check and explain experiment files.

Names are loaded on first use, so that importing the package costs nothing that is not needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flagscale_config.__about__ import __version__

if TYPE_CHECKING:
    from flagscale_config.codes import Code, code_named, codes
    from flagscale_config.difference import Difference, diff
    from flagscale_config.errors import ConfigError, Origin, Problem
    from flagscale_config.experiment import Experiment, Parallelism, ServeInstance, Train
    from flagscale_config.explanation import Explanation, explain
    from flagscale_config.listing import Shown, show
    from flagscale_config.loader import check, load
    from flagscale_config.migration import Migrated, migrate
    from flagscale_config.options import Option, OptionTable, option_table
    from flagscale_config.recipe import recipes
    from flagscale_config.rendering import render, render_engine, render_megatron
    from flagscale_config.runner import Cmds, Deploy, Runner, Task
    from flagscale_config.starting import new

__all__ = [
    "Cmds",
    "Code",
    "ConfigError",
    "Deploy",
    "Difference",
    "Experiment",
    "Explanation",
    "Migrated",
    "Option",
    "OptionTable",
    "Origin",
    "Parallelism",
    "Problem",
    "Runner",
    "ServeInstance",
    "Shown",
    "Task",
    "Train",
    "__version__",
    "check",
    "code_named",
    "codes",
    "diff",
    "explain",
    "load",
    "migrate",
    "new",
    "option_table",
    "recipes",
    "render",
    "render_engine",
    "render_megatron",
    "show",
]

_HOMES = {
    "codes": ("Code", "code_named", "codes"),
    "difference": ("Difference", "diff"),
    "explanation": ("Explanation", "explain"),
    "listing": ("Shown", "show"),
    "migration": ("Migrated", "migrate"),
    "starting": ("new",),
    "errors": ("ConfigError", "Origin", "Problem"),
    "experiment": ("Experiment", "Parallelism", "ServeInstance", "Train"),
    "loader": ("check", "load"),
    "options": ("Option", "OptionTable", "option_table"),
    "recipe": ("recipes",),
    "rendering": ("render", "render_engine", "render_megatron"),
    "runner": ("Cmds", "Deploy", "Runner", "Task"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when it is first asked for."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
