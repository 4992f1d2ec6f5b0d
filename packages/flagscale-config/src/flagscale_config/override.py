"""Overrides: parsed by Hydra's grammar, applied by Hydra's code, explained by us."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf._utils import split_key
from omegaconf.errors import OmegaConfBaseException

from flagscale_config.errors import Origin, Problem
from flagscale_config.places import Path, Places, dotted, forget, place_value

__all__ = ["apply_overrides", "parse_overrides"]

MAX_CHARACTERS = 2000


def parse_overrides(texts: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Return the overrides, without those of Hydra's own settings, and what cannot be parsed."""
    if not texts:
        return [], []
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        if len(text) > MAX_CHARACTERS:  # the parser takes seconds for thousands of brackets
            shown, limit = f"{text[:60]}...", f"{MAX_CHARACTERS} are allowed"
            problems.append(_faulty(shown, f"an override of {len(text)} characters; {limit}"))
            continue
        if text.lstrip("+~").startswith("="):  # Hydra takes it for a choice in the root folder
            problems.append(_faulty(text, "the key is missing; an override is `key=value`"))
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(_faulty(text, _grammar_words(text, str(error))))
            continue
        if override.is_sweep_override():
            problems.append(
                _faulty(text, "is a sweep; one experiment takes one value: quote it if it is text")
            )
        elif not override.is_hydra_override() and not override.key_or_group.startswith("hydra/"):
            parsed.append(override)
    return parsed, problems


def _faulty(text: str, message: str, key: str = "") -> Problem:
    return Problem(code="config/override", message=message, key=key, origin=Origin(override=text), given=text)


def _grammar_words(text: str, error: str) -> str:
    """Word a grammar error; Hydra's own text is the first line of a long help message."""
    if "=" not in text and not text.startswith("~"):
        return "an override is `key=value`, `+key=value`, `++key=value` or `~key`"
    first = error.split("\n", maxsplit=1)[0]
    detail = first.removeprefix(f"Error parsing override '{text}'").strip() or "not understood"
    return f"{detail}; quote a value with special characters: key='...'"


def apply_overrides(config: DictConfig, places: Places, overrides: Sequence[Override]) -> list[Problem]:
    """Apply overrides in order to values and origins; return the ones that do not fit."""
    problems: list[Problem] = []
    for override in overrides:
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], config)  # noqa: SLF001  one at a time
        except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
            message = _explain(places, override, error)
            problems.append(_faulty(override.input_line or "", message, override.key_or_group))
            continue
        path = _split(override.key_or_group)
        if override.is_delete():
            forget(places, path)
        else:
            place_value(places, path, override.value(), Origin(override=override.input_line))
    return problems


def _split(key: str) -> Path:
    """Split a dotted key, `a.b[0]` too, into the parts of a path."""
    return tuple(int(part) if part.isdigit() else part for part in split_key(key))


def _explain(places: Places, override: Override, error: Exception) -> str:
    """Say why an override does not fit, and how to write it."""
    text, line = str(error), override.input_line or ""
    bare = line.lstrip("+")
    if override.package is not None or (override.is_delete() and "/" in override.key_or_group):
        return "no such config group"
    if "Could not override" in text and _split(override.key_or_group) in places:
        return f"holds keys that the files lack; to add them write +{line}"
    if "Could not override" in text:
        near = _nearest_key(places, override.key_or_group)
        return f"no such key in the files; {f'did you mean {near}? ' if near else ''}to add it write +{line}"
    if "Could not append" in text:
        return f"already set in the files; write {bare} to change it, or ++{bare}"
    if "Could not delete" in text:
        return "nothing to delete: " + ("the value differs" if "value of" in text else "no such key")
    return " ".join(str(error.__cause__ or error).split("\n", maxsplit=1)[0].split())


def _nearest_key(places: Places, key: str) -> str | None:
    """Return the key of the files nearest to a mistyped one: the same last part elsewhere, else similar."""
    known = [dotted(path) for path in places if path]
    last = key.rpartition(".")[2]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    return next(iter(elsewhere or get_close_matches(key, known, 1, 0.75)), None)
