"""What a file says to FlagScale's own program: `action:` and Hydra's settings.

Neither has an effect on our commands, which name the action themselves; a misspelt one is an error anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf

from flagscale_config.errors import show
from flagscale_config.findings import Findings
from flagscale_config.places import Path
from flagscale_config.resolve import MISSING

__all__ = ["ACTIONS", "HYDRA", "check_launch"]

ACTIONS = ("run", "dryrun", "test", "stop", "query", "auto_tune")
"""Actions of FlagScale's `run.py`."""

HYDRA: dict[str, tuple[str, ...]] = {
    "run": ("dir",),
    "sweep": ("dir", "subdir"),
    "job": ("name", "chdir", "override_dirname", "id", "num", "config_name", "env_set", "env_copy", "config"),
    **dict.fromkeys(("launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "env"), ()),
    **dict.fromkeys(
        ("mode", "searchpath", "callbacks", "output_subdir", "overrides", "runtime", "verbose"), ()
    ),
}
"""Hydra's own settings; those without a list are open."""


def check_launch(action: Any, findings: Findings) -> None:
    """Report an unknown action and unknown settings of Hydra."""
    if action is not None and action is not MISSING and action not in ACTIONS:
        near = get_close_matches(str(action), ACTIONS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        message = f"must be one of {', '.join(ACTIONS)} ({show(action)} given){hint}"
        findings.error("config/value", ("action",), message, action)
    config = findings.composed.config
    settings = config._get_node("hydra") if "hydra" in config else None  # noqa: SLF001
    if settings is None or settings._is_none() or settings._is_interpolation():  # noqa: SLF001
        return
    tree = OmegaConf.to_container(settings) if OmegaConf.is_config(settings) else settings._value()  # noqa: SLF001
    if not isinstance(tree, Mapping):
        findings.error("config/value", ("hydra",), f"must be a mapping ({show(tree)} given)", tree)
        return
    _check_keys(tree, tuple(HYDRA), ("hydra",), findings)
    for name, known in HYDRA.items():
        if known and isinstance(tree.get(name), Mapping):
            _check_keys(tree[name], known, ("hydra", name), findings)


def _check_keys(tree: Mapping[Any, Any], known: tuple[str, ...], path: Path, findings: Findings) -> None:
    for key, value in tree.items():
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; Hydra has {', '.join(known)}"
            findings.error("config/unknown-key", (*path, str(key)), f"unknown key{hint}")
        elif key in {"dir", "subdir"} and not isinstance(value, (str, type(None))):
            findings.error("config/value", (*path, key), f"must be text ({show(value)} given)", value)
