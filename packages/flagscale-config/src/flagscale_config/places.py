"""Where every value of a composed configuration comes from, by path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig

from flagscale_config.errors import Origin

__all__ = ["Path", "Places", "dotted", "forget", "merge_places", "place_value"]

Path = tuple[str | int, ...]
Places = dict[Path, Origin]


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as users write it."""
    return ".".join(map(str, path))


def forget(places: Places, prefix: Path) -> None:
    """Remove everything at or below a path."""
    for path in [path for path in places if path[: len(prefix)] == prefix]:
        del places[path]


def merge_places(places: Places, prefix: Path, new: Places, config: Any) -> None:
    """Merge a file's positions as OmegaConf merges its values.

    Mappings are merged by key, anything else is replaced whole. `config` holds the file's values, `prefix` is
    the package they go to, `new` must hold the file's start under the empty path.
    """
    for path, place in new.items():
        target = (*prefix, *path)
        if path and target in places and not isinstance(_node(config, path), DictConfig):
            forget(places, target)
        places[target] = place
    for length in range(1, len(prefix)):
        places.setdefault(prefix[:length], new[()])


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
        is_container = isinstance(node, (DictConfig, ListConfig)) and not node._is_none()  # noqa: SLF001
        if not is_container or node._is_missing() or node._is_interpolation():  # noqa: SLF001
            return None
        node = node._get_node(part)  # noqa: SLF001
    return node
