"""The verb `models` of `flagscale-config`: list the published models, show one, match a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from flagscale_config.models.catalogue import names, published
from flagscale_config.models.matching import match

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Print what was asked for; exit code 0, also where a file is no published model.

    `options` has `name` (None, a model, or `match`), `rest` (after `match`: file and overrides) and `json`.
    """
    if options.name is None:
        return _list(as_json=options.json)
    if options.name == "match":
        return _match(options.rest, as_json=options.json)
    facts = published(options.name).to_dict()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in _flat(facts):
        print(f"{key}: {value:,}" if type(value) is int else f"{key}: {value}")
    return 0


def _list(*, as_json: bool) -> int:
    facts = [published(name) for name in names()]
    if as_json:
        print(json.dumps({each.name: each.to_dict() for each in facts}, indent=2))
        return 0
    print(f"{'model':<30} {'parameters':>17} {'active':>15}  KV/token  weights")
    for each in facts:
        cache = f"{each.kv_cache_bytes_per_token() / 1024:.1f} KiB"
        counts = f"{each.num_parameters:>17,} {each.num_active_parameters:>15,}"
        print(f"{each.name:<30} {counts} {cache:>9}  {each.hf_repo or each.source}")
    return 0


def _match(rest: list[str], *, as_json: bool) -> int:
    from flagscale_config.errors import ConfigError, Problem

    if not rest:
        message = "models match: a file is needed: flagscale-config models match FILE"
        raise ConfigError([Problem(code="config/usage", message=message)])
    found = match(rest[0], rest[1:])
    print(json.dumps(found.to_dict(), indent=2) if as_json else f"{rest[0]}: {found}")
    return 0


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every leaf that says something."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        elif value is not None:
            yield path + key, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
