"""A new experiment from a recipe: its files copied to where the user can change them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from flagscale_config.compose import compose
from flagscale_config.errors import ConfigError, Origin, Problem
from flagscale_config.loader import find

__all__ = ["new"]


def new(recipe: str | PathLike[str], folder: str | PathLike[str]) -> tuple[Path, ...]:
    """Copy a recipe's files below `folder`, in FlagScale's two-level layout, and return where they are.

    Args:
        recipe: name of a recipe (`qwen3/0_6b`), or an experiment file to start from.
        folder: made where it is missing; the experiment file is copied to `<folder>/conf`.

    Returns:
        The copies, the experiment file first.

    Raises:
        ConfigError: there is no such recipe, or a file of that name exists already; nothing is copied then.
    """
    source = find(recipe)
    root = source.absolute().parent
    files = dict.fromkeys([source.absolute(), *(file.absolute() for file in compose(source).files)])
    copies = {file: Path(folder, "conf", file.relative_to(root)) for file in files}
    problems = [_taken(copy) for copy in copies.values() if copy.exists()]
    if problems:
        raise ConfigError(problems)
    for file, copy in copies.items():
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with copy.open("xb") as opened:
                opened.write(file.read_bytes())
        except OSError as error:
            place = Origin(file=str(copy))
            message = f"cannot be written: {error.strerror}"
            raise ConfigError([Problem(code="config/write", message=message, origin=place)]) from None
    return tuple(copies.values())


def _taken(copy: Path) -> Problem:
    message = "exists already and is not overwritten; choose another directory"
    return Problem(code="config/write", message=message, origin=Origin(file=str(copy)))
