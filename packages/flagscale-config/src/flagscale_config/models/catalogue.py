"""The published models, read from the wheel's own table."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.models.facts import ModelFacts
from flagscale_config.models.parts import (
    Audio,
    DeltaNet,
    Experts,
    GroupedAttention,
    LatentAttention,
    Rwkv7,
    Vision,
)

__all__ = ["names", "published"]

_KINDS = {"grouped": GroupedAttention, "latent": LatentAttention, "rwkv7": Rwkv7}
_PARTS = {"linear_attention": DeltaNet, "experts": Experts, "vision": Vision, "audio": Audio}


@functools.cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    text = files("flagscale_config").joinpath("data", "models.json").read_text(encoding="utf-8")
    return {entry["name"]: entry for entry in json.loads(text)}


def names() -> tuple[str, ...]:
    """Return the names of all models of the catalogue, families together, small to large.

    Those that start with `flagscale-` are shapes of FlagScale's own examples, without published weights.
    """
    return tuple(_table())


@functools.cache
def published(name: str) -> ModelFacts:
    """Return the facts of a model of the catalogue (`qwen3-0.6b`), or of a Hugging Face repository's.

    Raises:
        ConfigError: there is no such model.
    """
    entry = _table().get(name.lower()) or next(
        (entry for entry in _table().values() if entry.get("hf_repo") == name), None
    )
    if entry is None:
        from difflib import get_close_matches

        close = get_close_matches(name.lower(), names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "`flagscale-config models` lists them"
        raise ConfigError([Problem(code="config/model", message=f"{name}: no such model; {hint}")])
    fields = {
        key: _PARTS[key](**_tuples(value)) if key in _PARTS else value
        for key, value in _tuples(entry).items()
    }
    kind = dict(fields.pop("attention"))
    return ModelFacts(**fields, attention=_KINDS[kind.pop("kind")](**kind))


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
