"""The command `flagscale-config`: check, show, schema, recipes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flagscale_config.__about__ import __version__
from flagscale_config.command import parse, run

__all__ = ["main"]


def _check(options: argparse.Namespace) -> int:
    """Print everything wrong with a file; exit code 2 when there is an error."""
    from flagscale_config.loader import check

    problems = check(options.file, options.overrides)
    errors = [problem for problem in problems if problem.severity == "error"]
    if options.json:
        print(
            json.dumps({"ok": not errors, "problems": [problem.to_dict() for problem in problems]}, indent=2)
        )
        return 2 if errors else 0
    for problem in problems:
        stream = sys.stderr if problem.severity == "error" else sys.stdout
        print(f"{problem.severity}: {problem} [{problem.code}]", file=stream)
    if errors:
        print(f"{len(errors)} error{'s' * (len(errors) != 1)}", file=sys.stderr)
        return 2
    print(f"{options.file}: ok")
    return 0


def _show(options: argparse.Namespace) -> int:
    """Print the resolved experiment, secrets masked."""
    from flagscale_config.loader import load
    from flagscale_config.masking import masked

    experiment = load(options.file, options.overrides)
    given = masked(experiment.model_dump(mode="json", exclude_defaults=True))
    facts = masked(experiment.model_dump(mode="json")) if options.all else given
    origins: dict[str, str] = {}
    if options.origin:
        stated = {key for key, _ in _flat(given)}
        for key, _ in _flat(facts):
            origin = experiment.origin(key)
            is_placed = bool(origin.line or origin.override)
            origins[key] = "default" if key not in stated else str(origin) if is_placed else ""
    if options.json:
        print(
            json.dumps(
                {**facts, "origins": origins} if options.origin else facts, indent=2, ensure_ascii=False
            )
        )
        return 0
    for key, value in _flat(facts):
        origin_text = f"    # {origins[key]}" if origins.get(key) else ""
        print(f"{key}: {json.dumps(value, ensure_ascii=False)}{origin_text}")
    return 0


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every leaf."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and any(isinstance(item, (Mapping, list)) for item in tree):
        for index, value in enumerate(tree):
            yield from _flat(value, f"{path}.{index}")
    else:
        yield path, tree


def _schema(options: argparse.Namespace) -> int:
    """Print a JSON Schema, or compare it with a file."""
    from flagscale_config.schema import check_schema, schema_text

    if options.check is not None:
        check_schema(options.kind, options.check)
        print(f"{options.check}: up to date")
        return 0
    sys.stdout.write(schema_text(options.kind))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    """Print the recipes of the installed packages."""
    from flagscale_config.recipe import recipes

    found = {name: str(path) for name, path in recipes().items()}
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:<{width}}  {path}")
    if not found:
        print("no recipes installed; flagscale-train and flagscale-serve bring some")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flagscale-config",
        description="Check and explain FlagScale experiment files.",
        epilog="--debug shows tracebacks. Exit codes: 0 fine, 2 the file is wrong.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text, function in (
        ("check", "report every mistake in a file, with its place and its cure", _check),
        ("show", "print what a file asks for, composed and resolved", _show),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("file", metavar="FILE", help="experiment file, or a recipe such as qwen3/0_6b")
        verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides in Hydra's grammar")
        verb.add_argument("--json", action="store_true", help="print JSON")
        verb.set_defaults(function=function)
        if name == "show":
            verb.add_argument("--origin", action="store_true", help="say where each value comes from")
            verb.add_argument("--all", action="store_true", help="print defaults too")
    from flagscale_config.schema import KINDS

    schema = verbs.add_parser("schema", help="print a JSON Schema", description="Print a JSON Schema.")
    schema.add_argument("kind", choices=KINDS, help="what to describe")
    schema.add_argument(
        "--check", metavar="PATH", help="compare with this file instead; exit code 2 when it differs"
    )
    schema.set_defaults(function=_schema)
    listed = verbs.add_parser("recipes", help="list installed recipes", description="List installed recipes.")
    listed.add_argument("--json", action="store_true", help="print JSON")
    listed.set_defaults(function=_recipes)
    return parser


def _dispatch(argv: list[str]) -> int:
    options = parse(_parser(), argv)
    code: int = options.function(options)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run(_dispatch, argv)


if __name__ == "__main__":
    raise SystemExit(main())
