"""Where every value of a composed configuration comes from, by path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig

from flagscale_config.errors import Origin

__all__ = ["Path", "Places", "dotted", "forget", "merge_places", "mismatch", "place_value"]

Path = tuple[str | int, ...]
Places = dict[Path, Origin]


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as users write it."""
    return ".".join(map(str, path))


def forget(places: Places, prefix: Path) -> None:
    """Remove everything at or below a path."""
    for path in [path for path in places if path[: len(prefix)] == prefix]:
        del places[path]


def merge_places(places: Places, new: Places, config: DictConfig) -> None:
    """Merge a file's positions as OmegaConf merges its values, `config`: mappings by key, else whole."""
    for path, place in new.items():
        if path in places and not isinstance(_node(config, path), DictConfig):
            forget(places, path)
        places[path] = place


def mismatch(one: Any, two: Any) -> Path | None:
    """Return the first path at which one holds a mapping and the other a list; OmegaConf names no place."""
    if _is_open(one, DictConfig) and _is_open(two, DictConfig):
        for key in two:
            below = mismatch(one._get_node(key), two._get_node(key))  # noqa: SLF001
            if below is not None:
                return (str(key), *below)
    is_clash = any(_is_open(x, DictConfig) and _is_open(y, ListConfig) for x, y in ((one, two), (two, one)))
    return () if is_clash else None


def _is_open(node: Any, kind: type) -> bool:
    """Whether a node is a container with content, not null, `???` or an interpolation."""
    return isinstance(node, kind) and not (
        node._is_none() or node._is_missing() or node._is_interpolation()  # type: ignore[attr-defined]  # noqa: SLF001
    )


def place_value(places: Places, path: Path, value: Any, place: Origin) -> None:
    """Record one origin for a value and for everything in it; a mapping is merged, anything else replaces."""
    if not isinstance(value, dict):
        forget(places, path)
    places[path] = place
    if isinstance(value, dict):
        for key, item in value.items():
            place_value(places, (*path, str(key)), item, place)


def _node(config: Any, path: Sequence[str | int]) -> Any:
    """Return the raw node at a path, a container or the node of a scalar; None when there is none."""
    node = config
    for part in path:
        if not _is_open(node, DictConfig) and not _is_open(node, ListConfig):
            return None
        node = node._get_node(part)  # noqa: SLF001
    return node
