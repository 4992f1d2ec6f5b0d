"""FlagScale's `rl:` section: a tree of verl's own keys, nested or dotted.

verl refuses keys that its configuration does not have, unless they are added (`append_kargs`, which FlagScale
passes as `+key=value`). `data/verl-*.json` holds verl's keys, so that the refusal comes before a cluster is
started. Which keys there are depends on `config-name`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from flagscale_config.errors import show
from flagscale_config.findings import Findings
from flagscale_config.places import Path
from flagscale_config.reinforcement import ReinforcementLearning
from flagscale_config.resolve import is_incomplete
from flagscale_config.suggest import Hint

__all__ = ["read_rl", "verl_keys", "verl_tree"]

_CONFIG = "ppo_trainer"
_OWN = ("config-path", "config-name", "append_kargs")
_FORK = {
    "actor_rollout_ref.actor.balance_algorithm": "text",
    "actor_rollout_ref.actor.policy_loss.seqpack_loss": "any",
}
"""Keys that only FlagOS's verl has."""
_WORDS = {
    "bool": "true or false",
    "number": "a number",
    "text": "text",
    "list": "a list",
    "map": "a mapping",
    "any": "a value",
}


@functools.cache
def _table() -> dict[str, Any]:
    text = files("flagscale_config").joinpath("data", "verl-0.9.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@functools.cache
def verl_keys(config_name: str = _CONFIG) -> Mapping[str, str]:
    """Return verl's keys by dotted path with their kinds: bool, number, text, list, map (open), any.

    Raises:
        KeyError: verl has no such configuration.
    """
    return {**dict(_flat(_table()["configs"][config_name])), **_FORK}


def verl_tree() -> dict[str, Any]:
    """Return the keys of all of verl's configurations as one tree; the leaves are kinds."""
    tree: dict[str, Any] = {}
    for name in _table()["configs"]:
        for key, kind in verl_keys(name).items():
            *sections, last = key.split(".")
            here = tree
            for section in sections:
                below = here.setdefault(section, {})
                here = below if isinstance(below, dict) else here
            here[last] = kind
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_rl(tree: Any, findings: Findings) -> ReinforcementLearning | None:
    """Return the task of a file's `rl` section; None when it is not a mapping. Faults are reported."""
    if not isinstance(tree, Mapping):
        findings.error("config/value", ("rl",), f"must be a mapping of verl's keys ({show(tree)} given)")
        return None
    name = _config_name(tree.get("config-name"), tree.get("config-path"), findings)
    reader = _Reader(name, findings)
    reader.walk({key: value for key, value in tree.items() if key not in _OWN}, "", ("rl",))
    added = _appended(tree.get("append_kargs"), findings)
    path = tree.get("config-path")
    if path is not None and not isinstance(path, str):
        findings.error("config/value", ("rl", "config-path"), f"must be text ({show(path)} given)", path)
        return None
    return ReinforcementLearning(
        config_path=path, config_name=name or str(tree["config-name"]), options=reader.options, added=added
    )


def _config_name(given: Any, path: Any, findings: Findings) -> str | None:
    """Return the name of one of verl's configurations, None when it is the user's own."""
    name = _CONFIG if given is None else str(given).removesuffix(".yaml")
    known = sorted(_table()["configs"])
    if name in known:
        return name
    if path in (None, "config"):  # verl's own folder
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        message = f"{name} is no PPO configuration of verl; known: {', '.join(known)}{hint}"
        findings.error("config/value", ("rl", "config-name"), message, given)
    return None


def _appended(tree: Any, findings: Findings) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        message = f"must be a mapping of keys to add ({show(tree)} given)"
        findings.error("config/value", ("rl", "append_kargs"), message, tree)
        return {}
    added: dict[str, Any] = {}
    for key, value, path in _leaves(tree, ("rl", "append_kargs")):
        if not is_incomplete(value):
            added[key] = value
        if key in verl_keys():
            message = "verl has this key; write it without append_kargs (Hydra refuses to add what exists)"
            findings.error("config/unsupported", path, message, value)
    return added


def _leaves(tree: Mapping[str, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, Any, Path]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value, (*path, key)


class _Reader:
    def __init__(self, config_name: str | None, findings: Findings) -> None:
        self.keys = verl_keys(config_name) if config_name else None
        self.findings = findings
        self.options: dict[str, Any] = {}

    def walk(self, tree: Mapping[str, Any], prefix: str, path: Path) -> None:
        """Read a mapping of verl's tree; a dotted key stands for the mappings it names."""
        for key, value in tree.items():
            name, here = f"{prefix}{key}", (*path, key)
            if isinstance(value, Mapping) and not self._is_leaf(name):
                if self._is_section(name, here):
                    self.walk(value, f"{name}.", here)
            else:
                self._read(name, value, here)

    def _is_leaf(self, name: str) -> bool:
        return self.keys is not None and name in self.keys

    def _is_section(self, name: str, path: Path) -> bool:
        """Report a section that verl lacks, once, not key by key."""
        if self.keys is None or any(key.startswith(f"{name}.") for key in self.keys):
            return True
        self._unknown(name, path, {".".join(key.split(".")[: name.count(".") + 1]) for key in self.keys})
        return False

    def _read(self, name: str, value: Any, path: Path) -> None:
        if self.keys is not None and name not in self.keys:
            if not any(key.startswith(f"{name}.") for key in self.keys):
                self._unknown(name, path, self.keys)
            elif not is_incomplete(value):
                message = f"must be a mapping ({show(value)} given)"
                self.findings.error("config/value", path, message, value)
            return
        if is_incomplete(value):
            return
        kind = self.keys[name] if self.keys is not None else "any"
        if value is not None and not _fits(value, kind):
            message = f"must be {_WORDS[kind]} ({show(value)} given)"
            self.findings.error("config/value", path, message, value)
        elif name in self.options and self.options[name] != value:
            before = show(self.options[name])
            message = f"given twice: {show(value)} here, {before} in another spelling; keep one"
            self.findings.error("config/conflict", path, message, value)
        else:
            self.options[name] = value
            self.findings.origins[f"rl.options.{name}"] = self.findings.composed.origin(path)

    def _unknown(self, name: str, path: Path, known: Any) -> None:
        near = get_close_matches(name, known, 1, 0.8)
        last = name.rpartition(".")[2]
        elsewhere = [key for key in known if key.rpartition(".")[2] == last]
        hint = f"; verl {_table()['version']} has no such key; to add it, write it under rl.append_kargs"
        if near:
            hint = f"; did you mean {near[0]}?"
        elif elsewhere:
            hint = f"; it belongs under {' or '.join(key.rpartition('.')[0] for key in elsewhere[:3])}"
        meant = Hint(suggestion=near[0] if near else None)
        self.findings.error("config/unknown-key", path, f"unknown key{hint}", hint=meant)


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of a kind; a list may stand for one text (files) and one text for a list."""
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "map":
        return isinstance(value, Mapping)
    if kind == "any":
        return True
    if kind == "text" and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return not isinstance(value, (Mapping, bool))
