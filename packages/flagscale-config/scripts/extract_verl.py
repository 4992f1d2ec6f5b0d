# ruff: noqa: INP001, D103 - a script beside others, run by hand on one engine version.
"""Write the key table of verl from an installed verl's own configuration, without importing verl.

    python -m pip install --no-deps verl==0.9.1
    python scripts/extract_verl.py > src/flagscale_config/data/verl-0.9.json

verl composes its configuration with Hydra and ships the result as `_generated_*.yaml`; Hydra refuses every
key that is not in it, so these files are verl's parser. A key's type is that of its default: where that is
null or an interpolation, any value may stand; an empty mapping is open.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import yaml

CONFIGS = ("ppo_trainer", "ppo_megatron_trainer")


def kind(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: kind(item) for key, item in value.items()} if value else "map"
    if isinstance(value, str):
        return _kind_of_text(value)
    names = {bool: "bool", int: "number", float: "number", list: "list"}
    return names.get(type(value), "any")


def _kind_of_text(value: str) -> str:
    if "${" in value:
        return "any"
    try:
        float(value)
    except ValueError:
        return "text"
    return "number"  # `1e-6` is text to PyYAML


def table() -> dict[str, Any]:
    folder = Path(str(distribution("verl").locate_file("verl/trainer/config")))
    configs = {
        name: kind(yaml.safe_load((folder / f"_generated_{name}.yaml").read_text(encoding="utf-8")))
        for name in CONFIGS
    }
    return {"engine": "verl", "version": version("verl"), "configs": configs}


if __name__ == "__main__":
    json.dump(table(), sys.stdout, separators=(",", ":"), sort_keys=True)
    sys.stdout.write("\n")
