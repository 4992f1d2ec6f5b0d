"""JSON Schemas of the contract: deterministic, so that a change of the contract is visible in review."""

from __future__ import annotations

import json
from difflib import unified_diff
from os import PathLike
from pathlib import Path

from flagscale_config.errors import ConfigError, Origin, Problem

_INDENT = {"experiment": 2}
"""Schemas of files are one line: editors read them, and the option tables in them are reviewed as tables."""

__all__ = ["KINDS", "check_schema", "schema_text"]

KINDS = (
    "experiment",
    "experiment-file",
    "train-file",
    "serve-file",
    "inference-file",
    "compress-file",
    "rl-file",
)
"""The resolved contract, and the files that users write."""


def schema_text(kind: str) -> str:
    """Return the JSON Schema of a kind as text: sorted keys, two spaces, one newline at the end.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in KINDS:
        message = f"no schema named {kind!r}; known: {', '.join(KINDS)}"
        raise ConfigError([Problem(code="config/value", message=message, given=kind)])
    from flagscale_config.experiment import SCHEMA_VERSION, Experiment

    if kind == "experiment":
        schema = Experiment.model_json_schema(mode="serialization")
    else:
        from flagscale_config.file_schema import file_schema

        schema = file_schema(kind)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["$id"] = f"urn:flagscale:{kind}:{SCHEMA_VERSION}"
    return json.dumps(schema, indent=_INDENT.get(kind), sort_keys=True, ensure_ascii=False) + "\n"


def check_schema(kind: str, path: str | PathLike[str]) -> None:
    """Do nothing when the file at `path` holds the schema of `kind`.

    Raises:
        ConfigError: the file is missing or differs.
    """
    wanted = schema_text(kind)
    place = Origin(file=str(path))
    try:
        found = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [Problem(code="config/no-file", message=f"cannot be read: {error}", origin=place)]
        ) from None
    if found != wanted:
        lines = unified_diff(found.splitlines(), wanted.splitlines(), lineterm="", n=0)
        first = next((line for line in lines if line[:1] in "+-" and line[:3] not in {"+++", "---"}), "")
        cure = f"write it anew: flagscale-config schema {kind} > {path}"
        message = f"differs from the contract ({first.strip()[:100]}); {cure}"
        raise ConfigError([Problem(code="config/schema", message=message, origin=place)])
