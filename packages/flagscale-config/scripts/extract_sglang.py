# ruff: noqa: INP001, SLF001 - scripts beside each other, run by hand on one engine version; a surprise must stop them.
"""Extract the options of SGLang's server from SGLang's own parser.

    pip install msgspec
    pip download sglang==0.5.23 --no-deps && unzip sglang-*.whl 'sglang/*.py'
    python extract_sglang.py sglang 0.5.23 sglang.json

`ServerArgs.add_cli_args` itself runs, on the fields declared under `arg_groups/fields`. What else its module
imports (torch, kernels, model code: gigabytes) is replaced by placeholders that bear the names asked for;
the parser calls none of them, it only stores them as the `type` of an option.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import option_file

_REAL = (
    "sglang.srt.server_args",
    "sglang.srt.arg_groups.arg_utils",
    "sglang.srt.arg_groups.argparse_actions",
    "sglang.srt.arg_groups.choices",
    "sglang.srt.arg_groups.field_order",
    "sglang.srt.arg_groups.fields",
    "sglang.srt.parser.reasoning_parser_names",
    "sglang.srt.function_call.parser_names",
    "sglang.kernels.ops.kv_canary.consts",
    "sglang.srt.environ",
    "sglang.srt.model_executor.cuda_graph_config",
)
_PLAIN = {int: "int", float: "float", str: "str", None: "str"}
_NAMED = {
    "json_list_type": "json",
    "loads": "json",
    "parse_cuda_graph_config_arg": "json",
    "human_readable_int": "size",
}


def _constant(name: str, path: Path) -> Any:
    """Return a constant written out in a source file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AttributeError(name)


class _Placeholder(types.ModuleType):
    """A module in which every name exists; constants have their values."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self.path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.isupper():
            return _constant(name, self.path)
        if name[0].isupper():
            return type(name, (), {})
        function = types.FunctionType((lambda *_args, **_kwargs: None).__code__, {}, name)
        function.__name__ = name
        return function


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the few modules that declare options, and placeholders for all others of SGLang."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return where a module of SGLang comes from."""
        if name.partition(".")[0] != "sglang":
            return None
        place = self.root.joinpath(*name.split(".")[1:])
        if name in _REAL or name.startswith("sglang.srt.arg_groups.fields."):
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            folders = [str(place)] if place.is_dir() else None
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return a placeholder."""
        place = self.root.joinpath(*spec.name.split(".")[1:])
        return _Placeholder(spec.name, place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))

    def exec_module(self, _module: types.ModuleType) -> None:
        """Do nothing: a placeholder has no code."""


def parser(root: Path) -> argparse.ArgumentParser:
    """Return SGLang's own parser."""
    sys.meta_path.insert(0, _Finder(root))
    module = importlib.import_module("sglang.srt.server_args")
    built = argparse.ArgumentParser(allow_abbrev=False)
    module.ServerArgs.add_cli_args(built)
    return built


def _kind(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "pair"
    name = type(action).__name__
    if "StoreTrue" in name:
        return "true"
    if "StoreFalse" in name:
        return "false"
    if isinstance(action, argparse._AppendAction):
        return "append"
    if action.nargs == "?":
        return "optional"
    return "list" if action.nargs is not None and action.nargs != 0 else "value"


def _describe(action: argparse.Action) -> dict[str, Any]:
    """Return one option as data, under the name by which SGLang keeps it where that is one of its flags."""
    kind = _kind(action)
    flags = [flag for flag in action.option_strings if flag.startswith("--")]
    negative = [flag for flag in flags if kind == "pair" and flag.startswith("--no-")]
    positive = [flag for flag in flags if flag not in negative]
    described: dict[str, Any] = {"name": positive[0][2:].replace("-", "_"), "flags": positive, "kind": kind}
    described["negative"] = negative[0] if negative else None
    described["dest"] = action.dest if action.dest != described["name"] else None
    if kind in {"value", "list", "append", "optional"}:
        named = _NAMED.get(getattr(action.type, "__name__", ""))
        described["type"] = _PLAIN.get(action.type, "expr") if named in {None, "json"} else named
        if named == "json":
            described.update(kind="json", type=None)
        described["nargs"] = action.nargs if kind == "list" else None
        described["choices"] = sorted({option_file.jsonable(item) for item in action.choices or ()}, key=str)
    default = None if isinstance(action.default, (types.FunctionType, type)) else action.default
    is_own = default != argparse.SUPPRESS and (action.choices is None or default in action.choices)
    described["default"] = option_file.jsonable(default) if is_own else None
    described["help"] = " ".join(str(action.help or "").replace("%%", "%").split())
    return described


def main() -> int:
    """Write the table: ROOT VERSION OUTPUT."""
    actions = [action for action in parser(Path(sys.argv[1]))._actions if action.dest != "help"]
    option_file.write(Path(sys.argv[3]), "sglang", sys.argv[2], [_describe(action) for action in actions])
    sys.stdout.write(f"{len(actions)} options of sglang {sys.argv[2]}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
