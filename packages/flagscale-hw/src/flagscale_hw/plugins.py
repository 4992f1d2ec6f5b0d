r"""Backends from other distributions: entry points of the group `flagscale_hw.backends`.

The name of the entry point is the chip, its value a module with `look(host, timeout_s) -> Found`. Beside
that module lies `flagscale_hw_backend.json` with the gate, so that nothing of a plug-in is imported on a
host without its chip; elsewhere it is imported in a process of its own:

    {"api": 1, "pci": [{"vendor": "0x1edb", "classes": ["0302"]}], "nodes": "vastai\\d+", "runtime": {...}}
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flagscale_hw.backend import ACCELERATORS, Backend, Found, PciRule
from flagscale_hw.host import Host
from flagscale_hw.machine import Problem

__all__ = ["API", "GROUP", "MANIFEST", "main", "plugin_problems", "plugins"]

GROUP = "flagscale_hw.backends"
MANIFEST = "flagscale_hw_backend.json"
API = 1
"""The version of this interface; a plug-in that asks for a newer one is refused with a reason."""


@dataclass(frozen=True, kw_only=True)
class _Plugin(Backend):
    """A backend whose code runs in another process only."""

    def look(self, host: Host, timeout_s: float) -> Found:
        import json

        from flagscale_hw.asking import Asker

        asker = Asker(host, self.chip, timeout_s)
        arguments = (self.module, json.dumps(sys.path), str(host.root), str(timeout_s))
        return asker.helper(__name__, *arguments)


def plugins() -> tuple[Backend, ...]:
    """Return the plug-ins that are installed, without importing them."""
    return _scan(tuple(sys.path))[0]


def plugin_problems() -> tuple[Problem, ...]:
    """Return why plug-ins that are installed cannot be used."""
    return _scan(tuple(sys.path))[1]


@cache
def _scan(search_path: tuple[str, ...]) -> tuple[tuple[Backend, ...], tuple[Problem, ...]]:
    # `importlib.metadata` costs a hundred milliseconds to import; this scan costs a fraction of one.
    found: dict[str, Backend] = {}
    problems = []
    entries = list(_entries(search_path))
    if not entries:
        return (), ()
    import json

    for distribution, chip, module in entries:
        try:
            gate = json.loads(_manifest(module, search_path).read_text(encoding="utf-8"))
            backend = _backend(chip, module, distribution, gate)
        except (OSError, ValueError, KeyError, TypeError, re.error) as error:
            problems.append(Problem(where=chip, text=f"plug-in {distribution}: cannot be used: {error}"))
            continue
        if chip in found:
            text = f"plug-in {distribution}: not used: {found[chip].origin} describes this chip too"
            problems.append(Problem(where=chip, text=text, hint="uninstall one of them"))
        else:
            found[chip] = backend
    return tuple(found.values()), tuple(problems)


def _backend(chip: str, module: str, distribution: str, gate: dict[str, Any]) -> Backend:
    if gate["api"] > API:
        raise ValueError(f"it is made for interface {gate['api']} and this is {API}: update flagscale-hw")
    rules = [
        PciRule(rule["vendor"], frozenset(rule.get("classes") or ACCELERATORS))
        for rule in gate.get("pci", ())
    ]
    for pattern in (gate.get("nodes", ""), gate.get("shared_nodes", "")):
        re.compile(pattern)
    return _Plugin(
        chip=chip,
        module=module,
        pci=tuple(rules),
        nodes=gate.get("nodes", "(?!)"),
        shared_nodes=gate.get("shared_nodes", "(?!)"),
        origin=distribution,
        runtime=gate.get("runtime", {}),
    )


def _entries(search_path: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Yield distribution and version, chip and module."""
    for folder in search_path:
        try:
            names = sorted(os.listdir(folder or "."))  # noqa: PTH208 - an entry costs a tenth of a Path
        except OSError:
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                text = _text(f"{folder}/{name}/entry_points.txt")
                if GROUP in text:
                    yield from _entries_of(name, text)


def _entries_of(folder_name: str, text: str) -> Iterator[tuple[str, str, str]]:
    import configparser  # not needed on most machines

    distribution = folder_name.rpartition(".")[0].replace("-", " ", 1)
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=False)
    try:
        parser.read_string(text)
        entries = parser.items(GROUP)
    except configparser.Error:
        return
    for chip, value in entries:
        yield distribution, chip, value.partition(":")[0].strip()


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - once per distribution
            return file.read()
    except OSError:
        return ""


def _manifest(module: str, search_path: tuple[str, ...]) -> Path:
    """Return where the gate lies: in the module's folder, whether it is a file or a package."""
    whole = module.replace(".", "/")
    for folder in search_path:
        for inside in (whole, whole.rpartition("/")[0]):
            path = Path(folder, inside, MANIFEST)
            if path.is_file():
                return path
    raise ValueError(f"there is no {MANIFEST} beside its module {module}")


def main(argv: list[str]) -> int:
    """Import a plug-in and print what it finds; a program of its own, because it is somebody else's code."""
    import json
    from dataclasses import asdict
    from importlib import import_module

    module, search_path, root, timeout_s = argv
    sys.path[:] = [*sys.path, *json.loads(search_path)]
    found: Found = import_module(module).look(Host(Path(root)), float(timeout_s))
    for device in found.devices:
        sys.stdout.write(json.dumps({"device": asdict(device)}) + "\n")
    for problem in found.problems:
        sys.stdout.write(json.dumps({"problem": asdict(problem)}) + "\n")
    sys.stdout.write(json.dumps({"done": True}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[3:]))
