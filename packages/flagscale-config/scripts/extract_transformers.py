# ruff: noqa: INP001, S101 - scripts beside each other, run by hand on one engine version; a surprise must stop them.
"""Extract the options of `transformers serve` from its signature, read without importing it.

    python extract_transformers.py SITE_PACKAGES/transformers/cli/serve.py 5.23.0 transformers-5.23.0.json

and join the versions of the table with `option_file.py`.

The command is a typer class: each parameter of `Serve.__init__` is one option, a boolean one has a `--no-`
twin.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import option_file


def _help(annotation: ast.expr) -> tuple[str, str]:
    """Return which typer marker annotates the parameter, and its help text."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            words = {word.arg: word.value for word in node.keywords}
            text = ast.literal_eval(words["help"]) if "help" in words else ""
            return node.func.attr, " ".join(text.split())
    return "Option", ""


def _describe(
    name: str, annotation: ast.expr, default: Any, enums: dict[str, list[str]]
) -> dict[str, Any] | None:
    """Return one option as data, None for the positional argument."""
    marker, text = _help(annotation)
    if marker == "Argument":
        return None
    assert isinstance(annotation, ast.Subscript)
    assert isinstance(annotation.slice, ast.Tuple)
    hint = ast.unparse(annotation.slice.elts[0]).removesuffix(" | None")
    flag = "--" + name.replace("_", "-")
    described: dict[str, Any] = {"name": name, "flags": [flag], "kind": "pair" if hint == "bool" else "value"}
    if hint == "bool":
        described["negative"] = "--no-" + flag[2:]
    else:
        described["type"] = hint if hint in {"int", "float"} else "str"
        described["choices"] = enums.get(hint, [])
    return {**described, "default": default, "help": text}


def main() -> int:
    """Write the table: SERVE_PY VERSION OUTPUT."""
    tree = ast.parse(Path(sys.argv[1]).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    enums = {
        name: [
            item.value.value
            for item in node.body
            if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
        ]
        for name, node in classes.items()
        if any("Enum" in ast.unparse(base) for base in node.bases)
    }
    init = next(
        item
        for item in classes["Serve"].body
        if isinstance(item, ast.FunctionDef) and item.name == "__init__"
    )
    parameters = init.args.args[1:]
    options = []
    for parameter, default in zip(parameters, init.args.defaults, strict=True):
        value = default.value if isinstance(default, ast.Constant) else None
        assert parameter.annotation is not None
        described = _describe(parameter.arg, parameter.annotation, value, enums)
        if described is not None:
            options.append(described)
    option_file.write(Path(sys.argv[3]), "transformers", sys.argv[2], options)
    sys.stdout.write(f"{len(options)} options of transformers {sys.argv[2]}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
