"""Options of single device types or hosts: `device_type_specific`, `node_specific` beside `experiment`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_config.errors import show
from flagscale_config.findings import Findings
from flagscale_config.options import OptionError, option_table, spelled
from flagscale_config.places import Path
from flagscale_config.resolve import is_incomplete
from flagscale_config.suggest import Hint, suggestion

__all__ = ["read_overlays"]

_FIELDS = {"device_type_specific": "device_type_args", "node_specific": "node_specific_args"}
_OWN = ("build_dir",)


def read_overlays(data: Mapping[str, Any], task: str | None, findings: Findings) -> dict[str, Any]:
    """Return the fields of `Experiment` that hold the overlays; faults are reported.

    Each is a mapping of device types or hosts to Megatron options, and `build_dir`, where the chip's build of
    Megatron lies. FlagScale applies switches only and ignores everything else in silence.
    """
    fields: dict[str, Any] = {}
    for section, field in _FIELDS.items():
        tree = data.get(section)
        if tree is None or is_incomplete(tree):
            continue
        if not isinstance(tree, Mapping):
            message = f"must be a mapping of names to options ({show(tree)} given)"
            findings.error("config/value", (section,), message, tree)
            continue
        if task != "train":
            message = "has no effect: only train tasks have options by device type or host"
            findings.note("config/no-effect", (section,), message)
        fields[field] = {
            name: _read_options(options, (section, name), findings) for name, options in tree.items()
        }
    return fields


def _read_options(tree: Any, path: Path, findings: Findings) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        findings.error("config/value", path, f"must be a mapping of options ({show(tree)} given)", tree)
        return {}
    typed: dict[str, Any] = {}
    for key, value in tree.items():
        here = (*path, key)
        if key not in _OWN:
            typed.update(_read_option(key, value, here, findings))
        elif isinstance(value, str):
            typed[key] = value
        else:
            findings.error("config/value", here, f"must be text ({show(value)} given)", value)
    return typed


def _read_option(key: str, value: Any, path: Path, findings: Findings) -> dict[str, Any]:
    table = option_table("megatron")
    found = table.find(key)
    if found is None:
        gone = table.elsewhere(key)
        hint = Hint(f": {gone}") if gone else suggestion(spelled(key), table, ("train",), sections=_OWN)
        findings.error("config/unknown-key", path, f"unknown option of Megatron {table.version}{hint}")
    if found is None or value is None:
        return {}
    option, is_opposite = found
    try:
        typed = option.coerce(value)
    except OptionError as error:
        findings.error("config/value", path, str(error), value)
        return {}
    return {option.name: not typed if is_opposite else typed}
