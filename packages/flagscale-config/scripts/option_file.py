# ruff: noqa: INP001 - scripts beside each other, run by hand on one engine version; a surprise must stop them.
"""Write an engine's options as the compact JSON files that `flagscale_config.options` reads.

Each `extract_*.py` beside it writes the options of one version; this script joins the versions of one engine:

    python option_file.py ../src/flagscale_config/data vllm-0.25.1.json vllm-0.33.0.json

It writes `<engine>.json`, one record per line and sorted by name, so that a new version is a readable diff,
and `<engine>.help.json`, apart because only people read it. A record holds for all versions, or for those
whose positions are listed under `in`; an option that changed has several records. A fork
(`0.17.1+fl`) is a version of its own; name it last.
"""

from __future__ import annotations

import json
import sys
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
    """Write the options of one engine version to `path`."""
    text = json.dumps({"engine": engine, "version": version, "options": options}, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")


def _slim(option: dict[str, Any]) -> dict[str, Any]:
    """Return an option without its help and without what follows from its name."""
    flag = "--" + option["name"].replace("_", "-")
    usual = {"flags": [flag], "kind": "value", "type": "str", "negative": f"--no-{flag[2:]}"}
    return {
        key: value
        for key, value in option.items()
        if key != "help" and value not in (None, [], "") and usual.get(key) != value
    }


def _joined(versions: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the records of all versions, equal ones once."""
    records: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for position, options in enumerate(versions):
        for option in options.values():
            slim = _slim(option)
            key = json.dumps([slim["name"], slim], sort_keys=True)
            records.setdefault(key, (slim, []))[1].append(position)
    everywhere = list(range(len(versions)))
    ordered = sorted(records.values(), key=lambda item: (str(item[0]["name"]), item[1]))
    return [slim if held == everywhere else {**slim, "in": held} for slim, held in ordered]


def _lines(items: list[str]) -> str:
    return ",\n".join(items)


def join(folder: Path, sources: list[Path]) -> str:
    """Join the versions of one engine below `folder`; return what was written, in words."""
    raw = [json.loads(path.read_text(encoding="utf-8")) for path in sources]
    (engine,) = {item["engine"] for item in raw}
    versions = [{option["name"]: option for option in item["options"]} for item in raw]
    records = _joined(versions)
    head = {"engine": engine, "versions": [item["version"] for item in raw]}
    body = _lines([json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records])
    text = json.dumps(head)[:-1] + f', "options": [\n{body}\n]}}\n'
    (folder / f"{engine}.json").write_text(text, encoding="utf-8")
    helped = {
        name: option["help"] for options in versions for name, option in options.items() if option.get("help")
    }
    entries = [
        f"{json.dumps(name)}:{json.dumps(helped[name], ensure_ascii=False)}" for name in sorted(helped)
    ]
    (folder / f"{engine}.help.json").write_text(f"{{\n{_lines(entries)}\n}}\n", encoding="utf-8")
    return f"{engine}: {len(records)} records of {len(versions)} versions, {len(text) >> 10} KiB"


if __name__ == "__main__":
    sys.stdout.write(join(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]]) + "\n")
