# ruff: noqa: INP001 - scripts beside each other, run by hand on one engine version; a surprise must stop them.
"""Write an engine's options as the compact JSON file that `flagscale_config.options` reads.

Shared by the `extract_*.py` scripts beside it. One option per line, sorted by name, so that a new engine
version is a readable diff.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

__all__ = ["jsonable", "write"]


def jsonable(value: Any) -> Any:
    """Return a default value as JSON can hold it; enumerations by name, whatever else by its text."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    return str(getattr(value, "name", value))


def write(path: Path, engine: str, version: str, options: list[dict[str, Any]]) -> None:
    """Write the options of one engine version to `path`; what is empty is left out."""
    lines = []
    for option in sorted(options, key=lambda item: str(item["name"])):
        slim = {key: value for key, value in option.items() if value not in (None, [], "")}
        lines.append(json.dumps(slim, ensure_ascii=False, separators=(",", ":")))
    head = f'{{"engine":{json.dumps(engine)},"version":{json.dumps(version)},"options":[\n'
    path.write_text(head + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
