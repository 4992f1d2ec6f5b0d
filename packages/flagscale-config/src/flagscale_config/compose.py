"""Composition as Hydra does it, with the origin of every value.

The order of files, packages and group choices is decided by Hydra's own defaults-list code, values are merged by
OmegaConf, overrides are parsed and applied by Hydra: the result equals `hydra.compose` by construction (and by a test).
Ours are the reading of files (`document.py`), the origins, and the words of the errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_config.document import Document, Places, below, read_document, shown_path
from flagscale_config.errors import ConfigError, Origin, Problem

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

__all__ = ["Composed", "compose"]


@dataclass
class Composed:
    """A composed configuration, interpolations not yet resolved.

    `places` maps each path to its origin; a path that is missing has the origin of its nearest parent.
    """

    config: DictConfig
    places: Places
    source: Path
    notes: list[Problem] = field(default_factory=list)

    def origin(self, path: Sequence[str | int]) -> Origin:
        """Return where the value at `path`, or the nearest thing that contains it, comes from."""
        here = tuple(path)
        while here and here not in self.places:
            here = here[:-1]
        return self.places.get(here, Origin(shown_path(self.source)))


def compose(source: Path, overrides: Sequence[str] = ()) -> Composed:
    """Compose an experiment file with the files its defaults list names, and apply the overrides.

    Raises:
        ConfigError: a file is missing or broken, a defaults list or an override cannot be applied.
    """
    root = read_document(source)
    if root.data is not None and not isinstance(root.data, dict):
        raise _problem("config/not-a-mapping", "the file must hold `key: value` pairs", Origin(shown_path(source), 1, 1))
    parsed = _parse(overrides)
    repository = _repository(source, root)
    with _quiet(repository, root):
        return _Composer(repository, source).run(parsed)


def _problem(code: str, message: str, origin: Origin | None, key: str = "") -> ConfigError:
    return ConfigError([Problem(code=code, message=message, key=key, origin=origin)])


def _parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar; all faulty ones are reported."""
    if not overrides:
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(_grammar_problem(text, str(error)))
            continue
        if override.is_sweep_override():
            message = "is a sweep; one experiment takes one value: quote it if it is meant as text"
            problems.append(Problem(code="config/override", message=message, origin=Origin(override=text)))
        elif not override.is_hydra_override() and not override.key_or_group.startswith("hydra/"):
            parsed.append(override)
    if problems:
        raise ConfigError(problems)
    return parsed


def _grammar_problem(text: str, error: str) -> Problem:
    """Word a grammar error: Hydra's own text is the first line of a long help message."""
    if "=" not in text and not text.startswith("~"):
        message = "an override is `key=value`, `+key=value`, `++key=value` or `~key`"
    else:
        detail = error.split("\n")[0].removeprefix(f"Error parsing override '{text}'").strip() or "not understood"
        message = f"{detail}; quote a value with special characters: key='...'"
    return Problem(code="config/override", message=message, origin=Origin(override=text), given=text)


@contextmanager
def _quiet(repository: Any, root: Document) -> Iterator[None]:
    """Turn whatever Hydra and OmegaConf raise while composing into located problems."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a missing `_self_` is reported by us, with its place
            yield
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, RecursionError, AssertionError) as error:
        # AssertionError too: Hydra asserts on odd defaults lists (`- {1: x}`).
        text = " ".join(str(error).split()) or type(error).__name__
        place = root.places.get(("defaults",), Origin(shown_path(root.path), 1, 1))
        raise _problem("config/compose", text, place, "defaults") from None


def _repository(source: Path, root: Document) -> Any:
    """Return a Hydra config repository over the experiment file's folder, which remembers positions."""
    from hydra._internal.config_repository import ConfigRepository
    from hydra.core.object_type import ObjectType
    from hydra.plugins.config_source import ConfigResult, ConfigSource
    from omegaconf import OmegaConf

    class FolderRepository(ConfigRepository):  # type: ignore[misc]
        """Files below one folder; Hydra asks it for documents, groups and defaults lists."""

        def __init__(self) -> None:
            self.folder = source.parent
            self.documents: dict[str, Document] = {}
            self.results: dict[str, ConfigResult | None] = {}

        def file_of(self, config_path: str) -> Path:
            if config_path == source.name:
                return source
            name = config_path if config_path.endswith(".yaml") else f"{config_path}.yaml"
            return Path(self.folder, name)

        def document(self, config_path: str) -> Document:
            file = self.file_of(config_path)
            document = root if file == source else read_document(file)
            if document.data is not None and not isinstance(document.data, dict):
                place = Origin(shown_path(file), 1, 1)
                message = "a file named in a defaults list must hold `key: value` pairs (a list only below a key)"
                if not isinstance(document.data, list):
                    raise _problem("config/not-a-mapping", message, place)
            self.documents[config_path] = document
            return document

        def load_config(self, config_path: str) -> ConfigResult | None:
            if config_path not in self.results:
                self.results[config_path] = self._load(config_path) if self.config_exists(config_path) else None
            return self.results[config_path]

        def _load(self, config_path: str) -> ConfigResult:
            document = self.document(config_path)
            header = ConfigSource._get_header_dict(document.text)  # noqa: SLF001  the `# @package` line
            config = OmegaConf.create({} if document.data is None else document.data)
            result = ConfigResult(provider="main", path=str(self.folder), config=config, header=header)
            raw = self._extract_defaults_list(config_path, config)
            result.defaults_list = self._create_defaults_list(config_path, raw)
            return result

        def config_exists(self, config_path: str) -> bool:
            return self.file_of(config_path).is_file()

        def group_exists(self, config_path: str) -> bool:
            return Path(self.folder, config_path).is_dir()

        def get_group_options(self, group_name: str, results_filter: Any = ObjectType.CONFIG) -> list[str]:
            del results_filter
            return sorted(file.stem for file in Path(self.folder, group_name).glob("*.yaml"))

        def get_sources(self) -> list[Any]:
            return []

    return FolderRepository()


class _Composer:
    """Merges the files in Hydra's order, and their positions in parallel."""

    def __init__(self, repository: Any, source: Path) -> None:
        self.repository = repository
        self.source = source
        self.places: Places = {}

    def run(self, overrides: list[Override]) -> Composed:
        from hydra._internal.defaults_list import create_defaults_list
        from omegaconf import OmegaConf

        self._check_files(overrides)
        listing = create_defaults_list(
            repo=self.repository,
            config_name=self.source.name,
            overrides_list=overrides,
            prepend_hydra=False,
            skip_missing=False,
        )
        config = OmegaConf.create({})
        for default in listing.defaults:
            config.merge_with(self._embedded(default))
        composed = Composed(config, self.places, self.source, self._notes())
        OmegaConf.set_struct(config, True)  # as Hydra does: a plain override may not add a key
        _apply(composed, listing.config_overrides)
        return composed

    def _embedded(self, default: Any) -> Any:
        """Return a file's content below its package, and record where its values are."""
        from omegaconf import OmegaConf

        result = self.repository.load_config(default.config_path)
        document = self.repository.documents[default.config_path]
        package = default.package if default.package is not None else result.header["package"]
        prefix: tuple[str | int, ...] = tuple(package.split(".")) if package else ()
        places = {path: place for path, place in document.places.items() if path[:1] != ("defaults",)}
        _merge_places(self.places, prefix, places, result.config)
        if not package:
            return result.config
        outer = OmegaConf.create({})
        OmegaConf.update(outer, package, result.config, merge=False)
        return outer

    def _notes(self) -> list[Problem]:
        """Collect the notes of all files read, and the missing `_self_`."""
        notes = [note for document in self.repository.documents.values() for note in document.notes]
        for document in self.repository.documents.values():
            listed = document.data.get("defaults") if isinstance(document.data, dict) else None
            if isinstance(listed, list) and listed and "_self_" not in listed:
                message = "has no `_self_`; this file is then applied after the files it names: write `_self_` where you mean it"
                notes.append(
                    Problem(
                        code="config/no-self",
                        message=message,
                        key="defaults",
                        origin=document.places.get(("defaults",)),
                        severity="note",
                    )
                )
        return notes

    def _check_files(self, overrides: list[Override]) -> None:
        """Report missing group files ourselves, with the line that names them; Hydra knows no lines."""
        chosen = {item.key_or_group: item for item in overrides if isinstance(item.value(), str)}
        problems: list[Problem] = []
        listed = self.repository.document(self.source.name).data
        entries = listed.get("defaults") if isinstance(listed, dict) else None
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            problem = self._missing(entry, index, chosen)
            if problem is not None:
                problems.append(problem)
        if problems:
            raise ConfigError(problems)

    def _missing(self, entry: Any, index: int, chosen: dict[str, Override]) -> Problem | None:
        document = self.repository.documents[self.source.name]
        place = document.places.get(("defaults", index))
        if isinstance(entry, str):
            name, group = entry.partition("@")[0], ""
        elif isinstance(entry, dict) and len(entry) == 1:
            words, value = next(iter(entry.items()))
            group = str(words).split(" ")[-1].partition("@")[0].lstrip("/")
            if not isinstance(value, str) or "optional" in str(words).split(" ")[:-1] or "${" in value:
                return None
            if group in chosen:
                value, place = chosen[group].value(), Origin(override=chosen[group].input_line)
            name = f"{group}/{value}"
        else:
            return None
        name = name.lstrip("/")
        if name in {"_self_", "???"} or name.endswith("/???") or self.repository.config_exists(name):
            return None
        return Problem(
            code="config/no-file",
            message=f"no such file: {shown_path(self.repository.file_of(name))}{self._available(group, name)}",
            key="defaults" if place is None or place.override is None else group,
            origin=place,
            given=name,
        )

    def _available(self, group: str, name: str) -> str:
        """Say which files the group folder does hold."""
        options = self.repository.get_group_options(group) if group else []
        if not options:
            return ""
        near = get_close_matches(name.rpartition("/")[2], options, 1)
        return f"; did you mean {near[0]}?" if near else f"; available: {', '.join(options)}"



def _merge_places(places: Places, prefix: tuple[str | int, ...], new: Places, config: Any) -> None:
    """Merge a file's positions as OmegaConf merges its values: mappings by key, anything else replaced whole."""
    from omegaconf import DictConfig

    for path, place in new.items():
        target = (*prefix, *path)
        if path and not isinstance(_node(config, path), DictConfig):
            for old in list(below(places, target)):
                del places[old]
        places[target] = place
    for length in range(1, len(prefix)):
        places.setdefault(prefix[:length], new[()])


def _node(config: Any, path: Sequence[str | int]) -> Any:
    """Return the raw node at a path (a container, or the node of a scalar); None when there is none."""
    from omegaconf import DictConfig, ListConfig

    node = config
    for part in path:
        if not isinstance(node, (DictConfig, ListConfig)) or node._is_none() or node._is_missing():  # noqa: SLF001
            return None
        if node._is_interpolation():  # noqa: SLF001
            return None
        node = node._get_node(part)  # noqa: SLF001
    return node


def _apply(composed: Composed, overrides: Sequence[Override]) -> None:
    """Apply overrides one at a time through Hydra, and report each that does not fit."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: list[Problem] = []
    for override in overrides:
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], composed.config)  # noqa: SLF001
        except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
            problems.append(_override_problem(composed, override, error))
            continue
        parts = _split_key(override.key_or_group)
        if override.is_delete():
            for old in list(below(composed.places, parts)):
                del composed.places[old]
            continue
        place = Origin(override=override.input_line)
        value = override.value()
        if not OmegaConf.is_dict(OmegaConf.create(value) if isinstance(value, (dict, list)) else None):
            for old in list(below(composed.places, parts)):
                del composed.places[old]
        _place_value(composed.places, parts, value, place)
    if problems:
        raise ConfigError(problems)


def _place_value(places: Places, parts: tuple[str | int, ...], value: Any, place: Origin) -> None:
    """Record an override as the origin of a value and of everything in it."""
    places[parts] = place
    if isinstance(value, dict):
        for key, item in value.items():
            _place_value(places, (*parts, str(key)), item, place)


def _split_key(key: str) -> tuple[str | int, ...]:
    """Split a dotted override key, `a.b[0]` too, into the parts of a path."""
    from omegaconf._utils import split_key

    return tuple(int(part) if part.isdigit() else part for part in split_key(key))


def _override_problem(composed: Composed, override: Override, error: Exception) -> Problem:
    """Say why an override does not fit, and how to write it."""
    key = override.key_or_group
    line = override.input_line or ""
    text = str(error)
    if override.package is not None or (override.is_delete() and "/" in key):
        message = "no such config group"
    elif "Could not override" in text:
        near = _nearest_key(composed, key)
        hint = f"did you mean {near}? " if near else ""
        message = f"no such key in the files; {hint}to add a new key write +{line}"
    elif "Could not append" in text:
        message = f"already set in the files; write {line.lstrip('+')} to change it, or ++{line.lstrip('+')}"
    elif "Could not delete" in text:
        message = "nothing to delete: " + ("the value differs" if "value of" in text else "no such key")
    else:
        message = " ".join((str(error.__cause__ or error)).split("\n")[0].split())
    return Problem(code="config/override", message=message, key=key, origin=Origin(override=line), given=line)


def _nearest_key(composed: Composed, key: str) -> str | None:
    """Return the dotted key of the files nearest to a mistyped one: same last part elsewhere, else similar."""
    known = [".".join(map(str, path)) for path in composed.places if path]
    last = key.rpartition(".")[2]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    if elsewhere:
        return elsewhere[0]
    near = get_close_matches(key, known, 1, 0.75)
    return near[0] if near else None
