"""Which checkpoint of a directory is whole, told from the files alone (no torch).

Megatron writes `iter_N/__R_K.distcp` (data), then `.metadata` (what lies where), then `metadata.json` (the
format), then the tracker file. A save that is cut off leaves a directory that looks like a checkpoint; here
it counts only if all three are there and every data file is as long as `.metadata` says. `.metadata` is a
pickle: it is read by an unpickler that can build nothing but inert records, so that a hostile file runs no
code.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TRACKER", "Choice", "choose", "fault", "prune"]

TRACKER = "latest_checkpointed_iteration.txt"
"""File in which Megatron notes the last checkpoint it finished; only a hint here."""

_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load from a directory, and what was passed over."""

    path: Path | None
    """Directory of the newest whole checkpoint; None if there is none."""
    iteration: int = 0
    release: bool = False
    """True for a `release` checkpoint: weights only, training starts at iteration 0."""
    skipped: tuple[str, ...] = ()
    """One sentence for each newer directory that is not whole, newest first."""


def choose(root: Path, iteration: int | None = None) -> Choice:
    """Pick the newest whole checkpoint below `root`, or check the one asked for.

    Args:
        root: directory that holds `iter_N` directories; need not exist.
        iteration: take this one and no other.

    Returns:
        The choice; its `path` is None if nothing whole was found.
    """
    skipped: list[str] = []
    for number, path in _iterations(root):
        if iteration is not None and number != iteration:
            continue
        problem = fault(path)
        if problem is None:
            return Choice(path, number, skipped=tuple(skipped))
        skipped.append(f"checkpoint {path} is not whole ({problem}) and is passed over")
    release = root / "release"
    if iteration is None and release.is_dir():
        problem = fault(release)
        if problem is None:
            return Choice(release, 0, release=True, skipped=tuple(skipped))
        skipped.append(f"checkpoint {release} is not whole ({problem}) and is passed over")
    return Choice(None, skipped=tuple(skipped))


def prune(root: Path, keep: int, saved: int) -> tuple[Path, ...]:
    """Delete what is older than the `keep` newest whole checkpoints below `root`, whole or not.

    With fewer whole ones nothing is deleted, and never what was saved last, although newer ones of an earlier
    run may lie beside it. Cut off at any moment it leaves what is not whole, never what
    only looks so. Links are left alone.

    Args:
        root: directory that holds `iter_N` directories.
        keep: how many whole checkpoints stay, at least 1.
        saved: step of the checkpoint that was saved last.

    Returns:
        What was deleted, oldest first.
    """
    found = _iterations(root)
    whole = [number for number, path in found if fault(path) is None][: max(1, keep)]
    if len(whole) < max(1, keep):
        return ()
    oldest = min(whole[-1], saved)
    old = [path for number, path in reversed(found) if number < oldest and not path.is_symlink()]
    for path in old:
        (path / "metadata.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    return tuple(old)


def _iterations(root: Path) -> list[tuple[int, Path]]:
    """Return step and directory of each checkpoint, newest first."""
    return sorted(
        (
            (int(match.group(1)), path)
            for path in _directories(root)
            if (match := _ITERATION.fullmatch(path.name))
        ),
        reverse=True,
    )


def _directories(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def fault(directory: Path) -> str | None:
    """Say why a checkpoint directory is not whole.

    Returns:
        A short reason such as `metadata.json is missing`, or None if the checkpoint is whole.
    """
    try:
        described = json.loads((directory / "metadata.json").read_text(encoding="utf-8"))
        backend = described.get("sharded_backend") if isinstance(described, dict) else None
    except FileNotFoundError:
        return "metadata.json is missing: the save was cut off"
    except (OSError, ValueError) as error:
        return f"metadata.json cannot be read: {error}"
    if backend != "torch_dist":
        return f"metadata.json names the format {backend!r}, torch_dist is what can be loaded"
    try:
        with (directory / ".metadata").open("rb") as stream:
            described = _Inert(stream).load()
        needed = _bytes_per_file(described)
    except FileNotFoundError:
        return ".metadata is missing: the save was cut off"
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
    ) as error:
        return f".metadata cannot be read: {error}"
    return _short_file(directory, needed)


def _short_file(directory: Path, needed: Mapping[str, int]) -> str | None:
    for name, size in sorted(needed.items()):
        if "/" in name or name.startswith(".."):
            return f".metadata points outside the checkpoint: {name}"
        try:
            present = (directory / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if present < size:
            return f"{name} has {present} bytes of {size}"
    return None


def _bytes_per_file(described: Any) -> dict[str, int]:
    needed: dict[str, int] = {}
    for place in described.storage_data.values():
        end = int(place.offset) + int(place.length)
        needed[place.relative_path] = max(end, needed.get(place.relative_path, 0))
    if not needed:
        raise ValueError("it lists no data")
    return needed


class _Record:
    """Stands for every object of the pickle: takes any arguments and any state, does nothing."""

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # Dataclasses without slots give a dict; those with slots a pair (dict or None, dict).
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                vars(self).update(part)


class _Inert(pickle.Unpickler):
    """Unpickler that never imports or calls anything named in the file."""

    def find_class(self, module: str, name: str) -> type[Any]:
        return dict if (module, name) == ("collections", "OrderedDict") else _Record
