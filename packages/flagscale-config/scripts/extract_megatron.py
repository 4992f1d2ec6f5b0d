# ruff: noqa: INP001, SLF001 - scripts beside each other, run by hand on one engine version; a surprise must stop them.
"""Extract Megatron's training options from Megatron's own parser.

Run where megatron-core (with `megatron.training`) is installed, from this folder:

    python extract_megatron.py megatron-0.19.2.json

and join the versions of the table with `option_file.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import warnings
from pathlib import Path
from typing import Any

import option_file

_PLAIN = {int: "int", float: "float", str: "str", bool: "bool", None: "str"}


def _kind(action: argparse.Action) -> str:
    """Return how the option is written on a command line."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "pair"
    if type(action).__name__ in {"_StoreTrueAction", "_StoreFalseAction"}:
        return "true" if type(action).__name__ == "_StoreTrueAction" else "false"
    return "list" if action.nargs is not None else "value"


def _describe(action: argparse.Action) -> dict[str, Any]:
    """Return one option as data."""
    kind = _kind(action)
    flags = [flag for flag in action.option_strings if flag.startswith("--")]
    negative = [flag for flag in flags if kind == "pair" and flag.startswith("--no-")]
    positive = [flag for flag in flags if flag not in negative]
    described: dict[str, Any] = {"name": positive[0][2:].replace("-", "_"), "flags": positive, "kind": kind}
    described["negative"] = negative[0] if negative else None
    described["dest"] = action.dest if action.dest != described["name"] else None
    if kind in {"value", "list"}:
        # A function that Megatron calls on the text (an enumeration, a layer pattern) takes text from us.
        other = "tuple" if getattr(action.type, "__name__", "") == "tuple_type" else "expr"
        described["type"] = _PLAIN.get(action.type, other)
        described["nargs"] = action.nargs
        described["choices"] = [option_file.jsonable(item) for item in action.choices or ()]
    described["default"] = option_file.jsonable(action.default)
    described["help"] = " ".join(str(action.help or "").split())
    return described


def main() -> int:
    """Write the table named on the command line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.arguments import add_megatron_arguments
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    actions = [action for action in parser._actions if action.dest != "help"]
    version = sys.argv[2] if len(sys.argv) > 2 else importlib.metadata.version("megatron-core")
    option_file.write(Path(sys.argv[1]), "megatron", version, [_describe(action) for action in actions])
    sys.stdout.write(f"{len(actions)} options of megatron-core {version}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
