"""Recipes: experiment files that come with installed packages, found without importing those packages."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["recipes", "task_of"]

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


def _offers() -> Mapping[str, list[Path]]:
    """Return every experiment file that installed packages offer, by recipe name, first package first."""
    offers: dict[str, list[Path]] = {}
    points = importlib.metadata.entry_points(group=_GROUP)
    for point in sorted(points, key=lambda point: (point.name, point.value)):
        folder = _folder(point.module)
        for name, path in _files(folder) if folder else ():
            offers.setdefault(name, []).append(path)
    return offers


def task_of(path: Path) -> str:
    """Return the task type that an experiment file states; empty where it cannot be read."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return str(content["experiment"]["task"]["type"])
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError):
        return ""


def recipes(task: str | None = None) -> Mapping[str, Path]:
    """Return every installed recipe by name (`qwen3/0_6b`), with the path of its experiment file.

    Packages offer recipes by the entry-point group `flagscale.recipes`, whose value names a package folder
    that holds `<model>/conf/<name>.yaml`. A name may be offered for several tasks (to train and to serve the
    same model): with `task` the one for that task is meant; without, each is listed as `<task>:<name>`. Of
    two files with the same name and task, the one whose entry point sorts first is taken.
    """
    found: dict[str, Path] = {}
    for name, paths in _offers().items():
        if len(paths) == 1:
            found[name] = paths[0]
            continue
        for path in paths:
            kind = task_of(path)
            found.setdefault(f"{kind}:{name}", path)
            if kind == task:
                found.setdefault(name, path)
    return found
