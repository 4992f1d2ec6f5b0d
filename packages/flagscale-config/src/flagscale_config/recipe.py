"""Recipes: experiment files that come with installed packages, found without importing those packages."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["recipes"]

_GROUP = "flagscale.recipes"


def _folder(module: str) -> Path | None:
    """Return the folder of a package, dotted name, without importing it or its parents."""
    parts = module.split(".")
    for entry in sys.path:
        folder = Path(entry or ".", *parts)
        if folder.is_dir():
            return folder
    return None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of each experiment file below a folder of recipes."""
    for path in sorted(folder.glob("*/conf/*.yaml")):
        yield f"{path.parent.parent.name}/{path.stem}", path


def recipes() -> Mapping[str, Path]:
    """Return every installed recipe by name (`qwen3/0_6b`), with the path of its experiment file.

    Packages offer recipes by the entry-point group `flagscale.recipes`, whose value names a package folder
    that holds `<model>/conf/<name>.yaml`. When two packages offer the same name, the one whose entry point
    sorts first is taken.
    """
    found: dict[str, Path] = {}
    points = importlib.metadata.entry_points(group=_GROUP)
    for point in sorted(points, key=lambda point: (point.name, point.value)):
        folder = _folder(point.module)
        for name, path in _files(folder) if folder else ():
            found.setdefault(name, path)
    return found
