"""Composition as Hydra does it, with the origin of every value.

The order of files, packages and group choices is decided by Hydra's own defaults-list code, values are merged
by OmegaConf, overrides are parsed and applied by Hydra: the result equals `hydra.compose` by construction
(and by a test). Ours are the reading of files (`document.py`), the origins, and the words of the errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any

from hydra import version
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flagscale_config.document import Document, read_document, shown_path
from flagscale_config.errors import ConfigError, Origin, Problem
from flagscale_config.override import apply_overrides, parse_overrides
from flagscale_config.places import Path, Places, dotted, merge_places, mismatch
from flagscale_config.repository import FolderRepository

__all__ = ["Composed", "compose"]


@dataclass
class Composed:
    """A composed configuration, interpolations not yet resolved.

    `places` maps each path to its origin; a path that is missing has the origin of its nearest parent.
    `problems` are the faults that did not prevent composing (duplicate keys, overrides) and notes.
    """

    config: DictConfig
    places: Places
    source: FilePath
    problems: list[Problem] = field(default_factory=list)
    files: tuple[FilePath, ...] = ()
    """Every file read, the experiment file among them."""

    def move(self, old: Path, new: Path) -> None:
        """Let the values below `old` be found below `new`, where they are read."""
        for path in [path for path in self.places if path[: len(old)] == old]:
            self.places[(*new, *path[len(old) :])] = self.places[path]

    def origin(self, path: Sequence[str | int]) -> Origin:
        """Return where the value at `path`, or the nearest thing that contains it, comes from."""
        here = tuple(path)
        while here and here not in self.places:
            here = here[:-1]
        return self.places[here] if here in self.places else Origin(shown_path(self.source))


def compose(source: FilePath, overrides: Sequence[str] = ()) -> Composed:
    """Compose an experiment file with the files its defaults list names, and apply the overrides.

    Raises:
        ConfigError: a file is missing or cannot be read, or a defaults list cannot be followed.
    """
    root = read_document(source)
    if root.data is not None and not isinstance(root.data, dict):
        place = Origin(shown_path(source), 1, 1)
        message = "the file must hold `key: value` pairs"
        raise ConfigError([Problem(code="config/not-a-mapping", message=message, origin=place)])
    with _current_hydra():
        parsed, faulty = parse_overrides(overrides)
        try:
            with _located(root):
                composed = _compose(FolderRepository(root), parsed)
        except ConfigError as error:
            raise ConfigError([*faulty, *error.problems]) from None
    composed.problems += faulty
    return composed


@contextmanager
def _current_hydra() -> Iterator[None]:
    """Compose by Hydra's current rules, as FlagScale does (`version_base=None`).

    They are a setting of the process; a program that uses Hydra itself keeps its own.
    """
    state = version.VersionBase.instance()
    before = state.version_base
    version.setbase(None)
    try:
        yield
    finally:
        state.version_base = before


@contextmanager
def _located(root: Document) -> Iterator[None]:
    """Turn whatever Hydra and OmegaConf raise while composing into a located problem.

    Hydra asserts on odd defaults lists (`- {1: x}`), hence AssertionError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a missing `_self_` is reported by us, with its place
            yield
    except (
        HydraException,
        OmegaConfBaseException,
        ValueError,
        TypeError,
        RecursionError,
        AssertionError,
    ) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        place = root.places.get(("defaults",), Origin(shown_path(root.path), 1, 1))
        raise ConfigError(
            [Problem(code="config/compose", message=text, key="defaults", origin=place)]
        ) from None


def _compose(repository: FolderRepository, overrides: list[Override]) -> Composed:
    """Merge the files in Hydra's order, their positions in parallel, then apply the overrides."""
    _check_files(repository, overrides)
    root = repository.root
    listing = create_defaults_list(
        repo=repository,
        config_name=root.path.name,
        overrides_list=overrides,
        prepend_hydra=False,
        skip_missing=False,
    )
    config = OmegaConf.create({})
    places: Places = {}
    prefixes: dict[FilePath, Path] = {}
    for default in listing.defaults:
        prefix, content, content_places = _packaged(repository, default)
        prefixes[repository.document(default.config_path).path] = prefix
        _merge(config, places, content, content_places)
    problems = [
        problem
        for document in repository.documents.values()
        for problem in _about(document, prefixes.get(document.path, ()))
    ]
    OmegaConf.set_struct(config, value=True)  # as Hydra does: a plain override may not add a key
    problems += apply_overrides(config, places, listing.config_overrides)
    files = tuple(document.path for document in repository.documents.values())
    return Composed(config, places, root.path, problems, files)


def _packaged(repository: FolderRepository, default: Any) -> tuple[Path, DictConfig, Places]:
    """Return a file's package (the path it stands below), its content there, and where its values are."""
    config_path = default.config_path
    result = repository.load_config(config_path)
    if result is None:
        raise ValueError(f"no such file: {shown_path(repository.file_of(config_path))}")
    package = default.package if default.package is not None else result.header["package"]
    prefix: Path = tuple(package.split(".")) if package else ()
    document = repository.document(config_path)
    first = document.places[()]
    places: Places = {prefix[:length]: first for length in range(1 if prefix else 0, len(prefix) + 1)}
    for path, place in document.places.items():
        if path and path[0] != "defaults":
            places[(*prefix, *path)] = place
    # The content is read once, by the merge that follows, so it need not be copied into its package.
    if not prefix:
        return prefix, result.config, places
    outer = OmegaConf.create({}, flags={"no_deepcopy_set_nodes": True})
    OmegaConf.update(outer, package, result.config, merge=False)
    return prefix, outer, places


def _merge(config: DictConfig, places: Places, new: DictConfig, new_places: Places) -> None:
    """Merge one file into what has been composed so far.

    Raises:
        ConfigError: a key is a mapping in one file and a list in the other.
    """
    clash = mismatch(config, new)
    if clash is not None:
        here, there = new_places.get(clash), places.get(clash)
        message = f"is a mapping in one place and a list in the other ({there}); they cannot be merged"
        raise ConfigError([Problem(code="config/compose", message=message, key=dotted(clash), origin=here)])
    config.merge_with(new)
    merge_places(places, new_places, new)


def _about(document: Document, prefix: Path) -> list[Problem]:
    """Return what reading a file showed, and a note where its defaults list lacks `_self_`."""
    problems = [
        replace(problem, key=dotted((*prefix, problem.key)).rstrip(".")) for problem in document.problems
    ]
    listed = document.data.get("defaults") if isinstance(document.data, dict) else None
    if not isinstance(listed, list) or not listed or "_self_" in listed:
        return problems
    message = "has no `_self_`: this file wins over the files named here; write `_self_` where you mean it"
    place = document.places.get(("defaults",))
    note = Problem(code="config/no-self", message=message, key="defaults", origin=place, severity="note")
    return [*problems, note]


def _check_files(repository: FolderRepository, overrides: list[Override]) -> None:
    """Report missing files of the experiment's defaults list with the line that names them.

    Hydra would find them too, one at a time and without lines.
    """
    root = repository.document(repository.root.path.name)
    listed = root.data.get("defaults") if isinstance(root.data, dict) else None
    chosen = {item.key_or_group: item for item in overrides if isinstance(item.value(), str)}
    problems = []
    for index, entry in enumerate(listed if isinstance(listed, list) else ()):
        group, name = _named(entry)
        place, key = root.places.get(("defaults", index)), "defaults"
        if group in chosen:
            name, place, key = chosen[group].value(), Origin(override=chosen[group].input_line), group
        file = f"{group}/{name}".lstrip("/")
        if name is None or repository.config_exists(file):
            continue
        message = f"no such file: {shown_path(repository.file_of(file))}{_available(repository, group, name)}"
        problems.append(Problem(code="config/no-file", message=message, key=key, origin=place, given=file))
    problems += [problem for item in overrides if (problem := _odd_choice(repository, item)) is not None]
    if problems:
        raise ConfigError(problems)


def _odd_choice(repository: FolderRepository, override: Override) -> Problem | None:
    """Refuse to choose something that is not a name from a group's folder; Hydra stumbles over it."""
    value = override.value()
    names = value if isinstance(value, list) else [value]
    is_group = repository.group_exists(override.key_or_group) and not override.is_delete()
    if not is_group or isinstance(value, dict) or all(isinstance(name, str) for name in names):
        return None
    group = override.key_or_group
    message = f"is a folder of files; choose one of them by name{_available(repository, group, '')}"
    place = Origin(override=override.input_line)
    return Problem(code="config/override", message=message, key=group, origin=place, given=value)


def _named(entry: Any) -> tuple[str, str | None]:
    """Return group and name of the file an entry of a defaults list needs, None when it needs none.

    Entries Hydra must work out itself (optional, `???`, interpolations, odd shapes) are left to it.
    """
    if isinstance(entry, str):
        name = entry.partition("@")[0]
        return "", None if name == "_self_" else name
    if not isinstance(entry, dict) or len(entry) != 1:
        return "", None
    words, value = next(iter(entry.items()))
    *keywords, last = str(words).split(" ")
    is_plain = isinstance(value, str) and value != "???" and "${" not in value and "optional" not in keywords
    return last.partition("@")[0].lstrip("/"), value if is_plain else None


def _available(repository: FolderRepository, group: str, name: str) -> str:
    """Say which files the group folder does hold."""
    options = repository.get_group_options(group) if group else []
    near = get_close_matches(name, options, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; available: {', '.join(options)}" if options else ""
