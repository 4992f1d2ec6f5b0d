"""Interpolations resolved, one value at a time, so that every failure has a place."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from flagscale_config.compose import Composed
from flagscale_config.errors import Problem
from flagscale_config.places import Path, dotted

__all__ = ["MISSING", "is_incomplete", "resolve"]

_UNSET = re.compile(r"Environment variable '(\w+)' not found")
MAX_VALUES = 50_000
MAX_DEPTH = 60


class _Missing:
    """The value of a key that the user must still give; it has been reported."""

    def __repr__(self) -> str:
        return "???"

    def __bool__(self) -> bool:
        return False


MISSING: Any = _Missing()


def is_incomplete(value: Any) -> bool:
    """Whether a value, or anything in it, is still to be given by the user."""
    if isinstance(value, dict):
        return any(is_incomplete(item) for item in value.values())
    return any(is_incomplete(item) for item in value) if isinstance(value, list) else value is MISSING


def resolve(
    composed: Composed, skip: frozenset[str] = frozenset({"hydra"})
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the composed configuration as plain data, and what could not be resolved.

    Values required from the user (`???`) are reported and stand as `MISSING` in the data. Top-level keys in
    `skip` are left out.
    """
    walk = _Resolver(composed)
    data = {
        str(key): walk.child(composed.config, key, (str(key),))
        for key in composed.config
        if str(key) not in skip
    }
    return data, walk.problems


class _Resolver:
    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        self.problems: list[Problem] = []
        self.count = 0

    def child(self, parent: Any, key: Any, path: Path) -> Any:
        """Return the plain value of one child of a container."""
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            if self.count <= MAX_VALUES or self.count == MAX_VALUES + 1:
                self.report(
                    "config/too-big", path, "interpolations expand to too many or too deeply nested values"
                )
            return MISSING
        node = parent._get_node(key)  # noqa: SLF001  OmegaConf's only access to the unresolved node
        if node is None:
            return None
        if node._is_missing():  # noqa: SLF001
            self.required(path)
            return MISSING
        try:
            value = node._dereference_node() if node._is_interpolation() else node  # noqa: SLF001
            if value._is_missing():  # noqa: SLF001
                self.required(path)
                return MISSING
        except (OmegaConfBaseException, RecursionError) as error:
            self.unresolved(path, node._value(), error)  # noqa: SLF001
            return MISSING
        return self.plain(value, path)

    def plain(self, node: Any, path: Path) -> Any:

        if isinstance(node, DictConfig) and node._is_none():  # noqa: SLF001
            return None
        if isinstance(node, DictConfig):
            return {str(key): self.child(node, key, (*path, str(key))) for key in list(node.keys())}
        if isinstance(node, ListConfig):
            if node._is_none():  # noqa: SLF001
                return None
            return [self.child(node, index, (*path, index)) for index in range(len(node))]
        return node._value()  # noqa: SLF001

    def report(self, code: str, path: Path, message: str, given: Any = None) -> None:
        key = dotted(path)
        self.problems.append(
            Problem(code=code, message=message, key=key, origin=self.composed.origin(path), given=given)
        )

    def required(self, path: Path) -> None:
        key = dotted(path)
        self.report(
            "config/required", path, f"required from the user: set it in the file or pass {key}=...", "???"
        )

    def unresolved(self, path: Path, text: Any, error: Exception) -> None:
        reason = "it refers to itself" if isinstance(error, RecursionError) else str(error).split("\n", 1)[0]
        reason = reason.removeprefix("Interpolation key ")
        unset = _UNSET.search(reason)
        if unset is not None:
            name = unset[1]
            reason = (
                f"the environment variable {name} is not set; set it, or write ${{oc.env:{name},default}}"
            )
        if "recursive interpolation" in reason.lower() or "to parent node" in reason:
            reason = "it refers to itself"
        self.report("config/interpolation", path, f"cannot resolve {text!r}: {reason}", text)
