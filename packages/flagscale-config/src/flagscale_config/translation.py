"""vLLM's option names, which FlagScale's serve files speak, in the words of the other engines.

The pairs are data (`data/translation.json`), after FlagScale's own mapping and the engines' option tables.
What has no counterpart is named, never dropped in silence: whether it only costs speed or changes what
clients get is for the caller to say.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from flagscale_config.options import option_table, spelled

__all__ = ["Translation", "counterpart", "effective_options", "translate"]

_POWERS = {"k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_POWERS |= {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Translation:
    """Options in an engine's own names, and those that it has no word for."""

    options: Mapping[str, Any]
    """By canonical name of the engine's option table."""
    untranslated: Mapping[str, Any]
    """Options by vLLM's name that this engine, or this value of them, has no counterpart for."""


def _size(value: Any) -> Any:
    """Return `32k` as vLLM reads it, 32000, and `32K` as 32768; `auto` and -1 say nothing."""
    if value in {"auto", -1, "-1"}:
        return None
    text = str(value)
    return int(float(text[:-1]) * _POWERS[text[-1]]) if text[-1] in _POWERS else int(text)


def _words(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


_RULES: dict[str, Callable[[Any], Any]] = {
    "same": lambda value: value,
    "size": _size,
    "first": lambda value: _words(value)[0],
    "commas": lambda value: ",".join(_words(value)),
    "invert": lambda value: not value,
    "present": lambda value: True if value else None,
    "whole": int,
}


@functools.cache
def _pairs() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    text = files("flagscale_config").joinpath("data", "translation.json").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return loaded


def counterpart(engine: str, name: str) -> str | None:
    """Return what another engine calls an option of vLLM's; None where it has no word for it."""
    pair = _pairs().get(engine, {}).get(spelled(name))
    target = pair["to"] if pair is not None else None
    return target[0] if isinstance(target, list) else target


def translate(engine: str, options: Mapping[str, Any], *, version: str | None = None) -> Translation:
    """Return options given in vLLM's vocabulary in that of another engine.

    Args:
        engine: `vllm`, `sglang`, `llama_cpp` or `transformers`.
        options: by vLLM's canonical name, typed, as `ServeInstance.engine_args` holds them.
        version: the engine's version; see `option_table`.

    Raises:
        KeyError: no table is shipped for this engine.
    """
    table = option_table(engine, version)
    if engine == "vllm":
        return Translation(dict(options), {})
    found: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for name, value in options.items():
        pair = _pairs()[engine].get(spelled(name))
        if value is None:
            continue
        if pair is None:
            left[name] = value
            continue
        values = pair.get("values", {})
        said = values.get(str(value).lower() if isinstance(value, bool) else str(value), value)
        said = _RULES[pair.get("rule", "same")](said) if said is not None else None
        targets = pair["to"] if isinstance(pair["to"], list) else [pair["to"]]
        if said is None:
            continue
        if not all(_accepts(table.find(target), said) for target in targets):
            left[name] = value
        else:
            found.update(dict.fromkeys(targets, said))
    return Translation(found, left)


def _accepts(found: tuple[Any, bool] | None, value: Any) -> bool:
    """Whether an option exists in this version of the engine and takes a value."""
    if found is None:
        return False
    try:
        found[0].coerce(value)
    except ValueError:
        return False
    return True


def effective_options(
    engine: str, engine_args: Mapping[str, Any], specific: Mapping[str, Any], *, version: str | None = None
) -> Translation:
    """Return the options an instance is started with: what is said for the engine alone wins.

    Args:
        engine: the engine that serves it.
        engine_args: options in vLLM's vocabulary.
        specific: options in the engine's own (`engine_args_specific.<engine>`).
        version: the engine's version; see `option_table`.

    Raises:
        KeyError: no table is shipped for this engine.
    """
    table = option_table(engine, version)
    translated = translate(engine, engine_args, version=version)
    options = dict(translated.options)
    for name, value in specific.items():
        found = table.find(name)
        canonical = found[0].name if found is not None else name
        options[canonical] = not value if found is not None and found[1] else value
    return Translation(options, translated.untranslated)
