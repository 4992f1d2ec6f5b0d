# ruff: noqa: INP001, S101 - scripts beside each other, run by hand on one engine version; a surprise must stop them.
"""Extract the options of `vllm serve` from vLLM's sources, without importing them.

vLLM builds its parser from dataclasses whose import needs torch and a platform, so this script reads the
sources: which flag is registered with which configuration field (`add_cli_args`), the field's annotation and
default, and then applies the rules of `vllm.engine.arg_utils._compute_kwargs` for turning an annotation into
an argument. Run on an unpacked wheel:

    pip download vllm==0.33.0 --no-deps && unzip vllm-*.whl 'vllm/*.py' && \
    python extract_vllm.py vllm 0.33.0 vllm-0.33.0.json

`tests/test_engine_parsers.py` compares the outcome with the real parser where a vLLM is installed.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import option_file


class Sources:
    """Every class and every module-level alias in the part of vLLM that defines options."""

    def __init__(self, root: Path) -> None:
        self.classes: dict[str, ast.ClassDef] = {}
        self.aliases: dict[str, ast.expr] = {}
        self.files: dict[str, ast.Module] = {}
        self.sizes: set[str] = set()
        for path in sorted(root.rglob("*.py")):
            if "models" in path.parts[:-1]:
                continue  # many, large, and without options
            tree = ast.parse(path.read_text(encoding="utf-8"))
            self.files[str(path.relative_to(root))] = tree
            for node in tree.body:
                self._keep(node)
        self.sizes = _sizes(self.files["engine/arg_utils.py"])

    def _keep(self, node: ast.stmt) -> None:
        if isinstance(node, ast.ClassDef):
            self.classes.setdefault(node.name, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            self.aliases.setdefault(node.targets[0].id, node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            self.aliases.setdefault(node.target.id, node.value)

    def fields(self, name: str) -> dict[str, tuple[ast.expr, ast.expr | None, str]]:
        """Return annotation, default and doc text of each field of a class, inherited ones first."""
        cls = self.classes[name]
        found: dict[str, tuple[ast.expr, ast.expr | None, str]] = {}
        for base in cls.bases:
            if isinstance(base, ast.Name) and base.id in self.classes:
                found.update(self.fields(base.id))
        for index, node in enumerate(cls.body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                after = cls.body[index + 1] if index + 1 < len(cls.body) else None
                found[node.target.id] = (node.annotation, node.value, _text_of(after))
        return found

    def computed(self, name: str) -> set[str]:
        """Return the fields of a class that cannot be given: `init=False`, and what is no field at all."""
        return {
            field
            for field, (hint, default, _) in self.fields(name).items()
            if _name(hint) == "ClassVar"
            or (isinstance(default, ast.Call) and any(word.arg == "init" for word in default.keywords))
        }

    def is_dataclass(self, name: str) -> bool:
        """Whether a class is one of vLLM's configuration classes, which are given as JSON."""
        marks = self.classes[name].decorator_list if name in self.classes else []
        return any(word in ast.unparse(mark) for mark in marks for word in ("config", "dataclass"))

    def kind(self, name: str) -> str:
        """Return `dict` for a class that is one, any other name as it is."""
        bases = self.classes[name].bases if name in self.classes else []
        return "dict" if any(_name(base) in {"dict", "TypedDict"} for base in bases) else name

    def parts(self, hint: ast.expr) -> list[ast.expr]:
        """Return the members of a union, aliases and `Annotated` unwrapped."""
        if isinstance(hint, ast.BinOp):
            return self.parts(hint.left) + self.parts(hint.right)
        if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
            return self.parts(ast.parse(hint.value, mode="eval").body)
        if isinstance(hint, ast.Name) and hint.id in self.aliases:
            return self.parts(self.aliases[hint.id])
        if isinstance(hint, ast.Subscript) and _name(hint) in {"Annotated", "SkipValidation"}:
            inner = hint.slice.elts[0] if isinstance(hint.slice, ast.Tuple) else hint.slice
            return self.parts(inner)
        if isinstance(hint, ast.Subscript) and _name(hint) in {"Optional", "Union"}:
            members = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
            extra: list[ast.expr] = [ast.Constant(None)] if _name(hint) == "Optional" else []
            return [part for member in members for part in self.parts(member)] + extra
        return [hint]


def _sizes(tree: ast.Module) -> set[str]:
    """Return the fields that take `1k` or `2M`: `_compute_kwargs` compares `name` with them."""
    compute = next(node for node in tree.body if getattr(node, "name", "") == "_compute_kwargs")
    names: set[str] = set()
    for node in ast.walk(compute):
        if isinstance(node, (ast.Set, ast.Tuple)):
            texts = [item.value for item in node.elts if isinstance(item, ast.Constant)]
            names |= {text for text in texts if isinstance(text, str)}
    assert "max_num_batched_tokens" in names
    return names | {"max_model_len"}


def _text_of(node: ast.stmt | None) -> str:
    """Return the docstring that follows a field, if one does."""
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return " ".join(node.value.value.split())
    return ""


def _name(node: ast.expr) -> str:
    """Return the outer name of an annotation: `list` of `list[int]`."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _literals(sources: Sources, node: ast.expr) -> list[Any]:
    """Return the values of a `Literal[...]`, nested aliases included."""
    assert isinstance(node, ast.Subscript)
    members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    values: list[Any] = []
    for member in members:
        if isinstance(member, ast.Constant):
            values.append(member.value)
        elif isinstance(member, ast.Starred):
            values += _literals(sources, sources.parts(member.value.slice)[0])  # type: ignore[attr-defined]
        else:
            values += _literals(sources, sources.parts(member)[0])
    return values


def _element(sources: Sources, node: ast.expr) -> dict[str, Any]:
    """Return type and choices of the elements of a list, tuple or set."""
    inner: ast.expr = ast.Name("str")
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
    parts = sources.parts(inner)
    if _name(parts[0]) == "Literal":
        return {"type": "str", "choices": sorted(_literals(sources, parts[0]))}
    return {"type": _name(parts[0]) if len(parts) == 1 and _name(parts[0]) in {"int", "float"} else "str"}


def _argument(sources: Sources, field: str, hint: ast.expr) -> dict[str, Any]:
    """Turn an annotation into kind, type and choices, by vLLM's own order of rules."""
    by_name = {sources.kind(_name(part)): part for part in sources.parts(hint)}
    if any(sources.is_dataclass(name) for name in by_name):
        return {"kind": "json"}
    if "bool" in by_name:
        is_optional_text = set(by_name) == {"bool", "str", ""}
        return {"kind": "optional", "type": "str"} if is_optional_text else {"kind": "pair"}
    if "Literal" in by_name:
        values = _literals(sources, by_name["Literal"])
        plain = "int" if isinstance(values[0], int) else "str"
        return {"kind": "value", "type": plain, "choices": [] if "str" in by_name else sorted(values)}
    collection = next((name for name in ("tuple", "list", "set") if name in by_name), None)
    if collection is not None:
        return {"kind": "list", "nargs": "+", **_element(sources, by_name[collection])}
    return _scalar(sources, field, set(by_name))


def _scalar(sources: Sources, field: str, names: set[str]) -> dict[str, Any]:
    """Return kind and type of an option with one value that is neither a switch nor a choice."""
    if "int" in names:
        return {"kind": "value", "type": "size" if field in sources.sizes else "int"}
    if "float" in names:
        return {"kind": "value", "type": "float"}
    return {"kind": "json"} if "dict" in names else {"kind": "value", "type": "str"}


def _default(node: ast.expr | None) -> Any:
    """Return a default that is written as a literal; a computed one is not data."""
    if isinstance(node, ast.Call):
        given = [word.value for word in node.keywords if word.arg == "default"]
        node = given[0] if given else (node.args[0] if node.args else None)
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _from_field(sources: Sources, cls: str, field: str, flags: list[str]) -> dict[str, Any]:
    """Return one option registered with a configuration field."""
    hint, default, text = sources.fields(cls)[field]
    described = {**_named(flags), **_argument(sources, field, hint), **_bounds(default)}
    if described["kind"] == "pair":
        described["negative"] = "--no-" + described["flags"][0][2:]
    if described["kind"] == "json":
        described["keys"] = _keys(sources, hint)
    return {**described, "default": option_file.jsonable(_default(default)), "help": text}


def _bounds(node: ast.expr | None) -> dict[str, Any]:
    """Return the range that `Field(ge=1, le=...)` gives a number."""
    words = node.keywords if isinstance(node, ast.Call) and _name(node.func) == "Field" else []
    return {word.arg: ast.literal_eval(word.value) for word in words if word.arg in {"ge", "gt", "le", "lt"}}


def _keys(sources: Sources, hint: ast.expr) -> list[str]:
    """Return the keys of a JSON option that is one of vLLM's configuration classes; they forbid others."""
    names = [_name(part) for part in sources.parts(hint)]
    found = [name for name in names if name in sources.classes and sources.is_dataclass(name)]
    if len(found) != 1 or any(sources.kind(name) == "dict" for name in names):
        return []
    return sorted(name for name in sources.fields(found[0]) if name not in sources.computed(found[0]))


def _named(flags: list[str]) -> dict[str, Any]:
    """Return name and long flags; `-tp` and its like are for typing, not for files."""
    long = [flag for flag in flags if flag.startswith("--")]
    return {"name": long[0][2:].replace("-", "_"), "flags": long}


def _from_call(sources: Sources, call: ast.Call, flags: list[str]) -> dict[str, Any]:
    """Return one option whose argument is spelled out in the call."""
    words = {word.arg: word.value for word in call.keywords if word.arg}
    kinds = {"store_true": "true", "append": "append"}
    action = words.get("action")
    kind = kinds.get(action.value, "value") if isinstance(action, ast.Constant) else "value"
    if isinstance(action, ast.Attribute):
        kind = "pair"
    described: dict[str, Any] = {**_named(flags), "kind": kind}
    if kind == "pair":
        described["negative"] = "--no-" + described["flags"][0][2:]
    if kind == "value":
        plain = _name(words.get("type", ast.Name("str")))
        described["type"] = plain if plain in {"int", "float"} else "str"
        described["choices"] = _written_choices(sources, words.get("choices"))
    described["default"] = option_file.jsonable(_default(words.get("default")))
    described["help"] = " ".join(str(_default(words.get("help")) or "").split())
    return described


def _written_choices(sources: Sources, node: ast.expr | None) -> list[Any]:
    """Return `choices=[...]` or `choices=get_args(X)`; a list that depends on the machine is left open."""
    if isinstance(node, ast.Call) and _name(node.func) == "get_args":
        return sorted(_literals(sources, sources.parts(node.args[0])[0]))
    try:
        return sorted(ast.literal_eval(node)) if node is not None else []
    except ValueError:
        return []


class _Registration:
    """How one `add_cli_args` ties flags to configuration fields, in any of vLLM's spellings."""

    def __init__(self, sources: Sources, function: ast.FunctionDef) -> None:
        self.sources = sources
        self.function = function
        self.owners: dict[str, str] = {}
        self.fields: dict[str, tuple[str, str]] = {}
        self.withheld: dict[tuple[str, str], set[str]] = {}
        for node in ast.walk(function):
            is_call = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            if is_call and _name(node.value.func) == "get_kwargs":
                self.owners[_name(node.targets[0])] = _name(node.value.args[0])
        for node in ast.walk(function):
            self._note(node)

    def _note(self, node: ast.AST) -> None:
        """Note `moe_kwargs = kernel_kwargs["moe_backend"]` and `x_kwargs["y"]["choices"].remove(NAME)`."""
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            field = self.field(node.value)
            if field is not None and isinstance(node.targets[0], ast.Name):
                self.fields[node.targets[0].id] = field
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "remove":
            inner = node.func.value
            field = self.field(inner.value) if isinstance(inner, ast.Subscript) else None
            if field is not None:
                gone = self.sources.aliases.get(_name(node.args[0]), node.args[0])
                self.withheld.setdefault(field, set()).add(ast.literal_eval(gone))

    def field(self, node: ast.AST) -> tuple[str, str] | None:
        """Return configuration class and field of `x_kwargs["field"]` or of a name for it."""
        if isinstance(node, ast.Name):
            return self.fields.get(node.id)
        if not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)):
            return None
        owner = self.owners.get(_name(node.value))
        if isinstance(node.value, ast.Call) and _name(node.value.func) == "get_kwargs":
            owner = _name(node.value.args[0])
        return (owner, str(node.slice.value)) if owner is not None else None

    def options(self) -> list[dict[str, Any]]:
        """Return the options registered, in order."""
        return [
            self._option(node)
            for node in ast.walk(self.function)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
            and any(str(arg.value).startswith("--") for arg in node.args if isinstance(arg, ast.Constant))
        ]

    def _option(self, call: ast.Call) -> dict[str, Any]:
        flags = [str(arg.value) for arg in call.args if isinstance(arg, ast.Constant)]
        spread = (node for word in call.keywords if word.arg is None for node in ast.walk(word.value))
        field = next(filter(None, map(self.field, spread)), None)
        if field is None:
            return _from_call(self.sources, call, flags)
        option = _from_field(self.sources, *field, flags)
        option["choices"] = [x for x in option.get("choices", []) if x not in self.withheld.get(field, ())]
        return option


def _frontend(sources: Sources) -> list[dict[str, Any]]:
    """Return the options of the HTTP server: every field of `FrontendArgs` is one."""
    found = []
    for field in sources.fields("FrontendArgs"):
        option = _from_field(sources, "FrontendArgs", field, ["--" + field.replace("_", "-")])
        found.append(option)
        # `_customize_cli_kwargs` of vLLM changes these by hand.
        if field in {"allowed_origins", "allowed_methods", "allowed_headers", "default_chat_template_kwargs"}:
            option.update(kind="json", nargs=None, type=None)
        if field == "middleware":
            option.update(kind="append", nargs=None, type="str")
        if field == "lora_modules":
            option.update(kind="list", nargs="+", type="str")
    return found


def main() -> int:
    """Write the table: ROOT VERSION OUTPUT."""
    sources = Sources(Path(sys.argv[1]))
    functions = [
        node
        for file, owner in (("engine/arg_utils.py", "EngineArgs"), ("engine/arg_utils.py", "AsyncEngineArgs"))
        for node in sources.classes[owner].body
        if isinstance(node, ast.FunctionDef) and node.name == "add_cli_args" and file in sources.files
    ]
    # The file has moved between releases: openai/, launchers/, common/.
    (cli,) = (tree for file, tree in sources.files.items() if file.endswith("/cli_args.py"))
    functions += [
        node for node in cli.body if isinstance(node, ast.FunctionDef) and node.name == "make_arg_parser"
    ]
    options = {option["name"]: option for option in _frontend(sources)}
    for function in functions:
        options.update({option["name"]: option for option in _Registration(sources, function).options()})
    option_file.write(Path(sys.argv[3]), "vllm", sys.argv[2], list(options.values()))
    sys.stdout.write(f"{len(options)} options of vllm {sys.argv[2]}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
