"""The command `flagscale-config`: words in, one public function each, text or JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flagscale_config.__about__ import __version__
from flagscale_config.command import is_override, parse, run

if TYPE_CHECKING:
    from flagscale_config.errors import Problem

__all__ = ["main"]

_EXIT_CODES = "exit codes: 0 done, 1 bug, 2 the file or the command line is wrong, 130 interrupted"
_FILE = "experiment file, or a recipe such as qwen3/0_6b"
_OVERRIDES = "overrides in Hydra's grammar: a.b=c, +a.b=c, ++a.b=c, ~a.b"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _check(options: argparse.Namespace) -> int:
    """Print everything wrong with some files; exit code 2 when there is an error."""
    from flagscale_config.loader import check
    from flagscale_config.terminal import report

    words = [*options.words, *options.overrides]
    files = [word for word in words if not is_override(word)]
    overrides = [word for word in words if is_override(word)]
    if not files:
        raise SystemExit("no file to check: flagscale-config check FILE... [a.b=c ...]")
    found = {file: check(file, overrides) for file in files}
    is_wrong = any(problem.severity == "error" for problems in found.values() for problem in problems)
    if options.json:
        _print_checked(found, is_single=len(files) == 1)
    else:
        for file, problems in found.items():
            report(problems, options.format, is_quiet=options.quiet)
            if not options.quiet:
                _conclude(file, problems)
        if len(files) > 1 and not options.quiet:
            _summarize(found)
    return 2 if is_wrong else 0


def _print_checked(found: Mapping[str, Sequence[Problem]], *, is_single: bool) -> None:
    """Print the problems of one file, or of several by file, as JSON."""
    checked = {
        file: {
            "ok": not any(problem.severity == "error" for problem in problems),
            "problems": [problem.to_dict() for problem in problems],
        }
        for file, problems in found.items()
    }
    _print_json(next(iter(checked.values())) if is_single else checked)


def _conclude(file: str, problems: Sequence[Problem]) -> None:
    """Say in a line how a file stands."""
    from flagscale_config.terminal import Style, count, wants_color

    errors = [problem for problem in problems if problem.severity == "error"]
    notes = len(problems) - len(errors)
    also = f", {count(notes, 'note')}" if notes else ""
    if not errors:
        style = Style(is_on=wants_color(sys.stdout))
        print(f"{file}: {style('ok', 'ok')}{also}", flush=True)
        return
    more = f"flagscale-config explain {errors[0].code}"
    print(f"{file}: {count(len(errors), 'error')}{also}; for more: {more}", file=sys.stderr, flush=True)


def _summarize(found: Mapping[str, Sequence[Problem]]) -> None:
    """Say in a line how several files stand."""
    from flagscale_config.terminal import count

    problems = [problem for of_file in found.values() for problem in of_file]
    errors = sum(problem.severity == "error" for problem in problems)
    wrong = sum(any(problem.severity == "error" for problem in of_file) for of_file in found.values())
    total = f"{count(errors, 'error')}, {count(len(problems) - errors, 'note')}"
    print(
        f"{count(len(found), 'file')}: {len(found) - wrong} ok, {wrong} with errors ({total})",
        file=sys.stderr if errors else sys.stdout,
    )


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
        _print_json({**facts, "origins": origins} if options.origin else facts)
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


def _explain(options: argparse.Namespace) -> int:
    """Print what a code means."""
    from flagscale_config.codes import code_named

    code = code_named(options.target)
    if options.json:
        _print_json({"code": code.code, "title": code.title, "meaning": code.meaning, "cure": code.cure})
        return 0
    print(f"{code.code}: {code.title}\n\n{_wrapped(code.meaning)}\n\n{_wrapped(f'What to do: {code.cure}')}")
    return 0


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100)


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
        _print_json(found)
        return 0
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:<{width}}  {path}")
    if not found:
        print("no recipes installed; flagscale-train and flagscale-serve bring some")
    return 0


def _verb(
    verbs: Any, name: str, function: Callable[[argparse.Namespace], int], text: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Add a verb; `examples` are command lines, shown by its `--help` and run by a test."""
    shown = "\n".join(f"  flagscale-config {example}" for example in examples)
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"examples:\n{shown}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if name != "schema":
        parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(function=function)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flagscale-config",
        description="Check and explain FlagScale experiment files.",
        epilog=f"flagscale-config VERB --help shows examples; --debug shows tracebacks.\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_check(verbs)
    _add_looking(verbs)
    _add_making(verbs)
    return parser


def _add_check(verbs: Any) -> None:
    text = "report every mistake in a file, with its place and its cure"
    examples = (
        "check conf/tiny.yaml",
        "check conf/*.yaml --quiet",
        "check conf/tiny.yaml train.model.num_layers=8",
    )
    verb = _verb(verbs, "check", _check, text, examples)
    verb.add_argument("words", metavar="FILE", nargs="+", help=f"{_FILE}; several may be given")
    verb.add_argument("overrides", metavar="a.b=c", nargs="*", help=f"{_OVERRIDES}; they hold for every file")
    verb.add_argument("-q", "--quiet", action="store_true", help="print errors only, one line each")
    verb.add_argument(
        "--format",
        choices=("full", "line"),
        help="full: with the source line (on a terminal the default); line: one line per problem",
    )


def _add_looking(verbs: Any) -> None:
    text = "print what a file asks for, composed and resolved, secrets masked"
    verb = _verb(verbs, "show", _show, text, ("show conf/tiny.yaml", "show conf/tiny.yaml --origin --all"))
    verb.add_argument("file", metavar="FILE", help=_FILE)
    verb.add_argument("overrides", nargs="*", metavar="a.b=c", help=_OVERRIDES)
    verb.add_argument("--origin", action="store_true", help="say where each value comes from")
    verb.add_argument("--all", action="store_true", help="print defaults too")
    text = "say what an error code means"
    verb = _verb(verbs, "explain", _explain, text, ("explain config/unknown-key",))
    verb.add_argument("target", metavar="CODE", help="code that check prints, such as config/unknown-key")


def _add_making(verbs: Any) -> None:
    text = "print a JSON Schema, for editors and other programs"
    verb = _verb(verbs, "schema", _schema, text, ("schema experiment > experiment.json",))
    verb.add_argument("kind", choices=["experiment"], help="what to describe")
    verb.add_argument(
        "--check", metavar="PATH", help="compare with this file instead; exit code 2 when it differs"
    )
    _verb(verbs, "recipes", _recipes, "list the ready-made experiments of installed packages", ("recipes",))


def _dispatch(argv: list[str]) -> int:
    options = parse(_parser(), argv)
    function: Callable[[argparse.Namespace], int] = options.function
    return function(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run(_dispatch, argv)


if __name__ == "__main__":
    raise SystemExit(main())
