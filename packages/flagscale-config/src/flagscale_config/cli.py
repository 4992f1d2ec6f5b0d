"""The command `flagscale-config`: words in, one public function each, text or JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_config.__about__ import __version__
from flagscale_config.command import is_override, parse, run

if TYPE_CHECKING:
    from flagscale_config.errors import ConfigError, Problem
    from flagscale_config.explanation import Explanation

__all__ = ["main"]

_EXIT_CODES = "exit codes: 0 done, 1 bug, 2 the file or the command line is wrong, 130 interrupted"
_FILE = "experiment file, or a recipe such as qwen3/0_6b"
_OVERRIDES = "overrides in Hydra's grammar: a.b=c, +a.b=c, ++a.b=c, ~a.b"
_OPTION_READERS = ("check", "show", "explain", "diff", "models")
"""Verbs that read a file by the option tables of engines."""


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
        raise _usage("no file to check: flagscale-config check FILE... [a.b=c ...]")
    found = {file: check(file, overrides) for file in files}
    is_wrong = any(problem.severity == "error" for problems in found.values() for problem in problems)
    with suppress(BrokenPipeError):  # whether somebody reads it or not, the exit code tells
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
    from flagscale_config.errors import escaped
    from flagscale_config.terminal import Style, count, wants_color

    errors = [problem for problem in problems if problem.severity == "error"]
    notes = len(problems) - len(errors)
    also = f", {count(notes, 'note')}" if notes else ""
    if not errors:
        style = Style(is_on=wants_color(sys.stdout))
        print(f"{escaped(file)}: {style('ok', 'ok')}{also}", flush=True)
        return
    more = f"flagscale-config explain {errors[0].code}"
    found = f"{count(len(errors), 'error')}{also}"
    print(f"{escaped(file)}: {found}; for more: {more}", file=sys.stderr, flush=True)


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
    from flagscale_config.listing import facts_of, show
    from flagscale_config.loader import load

    if options.json and not options.origin:
        _print_json(facts_of(load(options.file, options.overrides), defaults=options.all))
        return 0
    shown = show(options.file, options.overrides, defaults=options.all)
    origins = {each.key: "default" if each.is_default else str(each.origin or "") for each in shown}
    if options.json:
        facts = facts_of(load(options.file, options.overrides), defaults=options.all)
        _print_json({**facts, "origins": origins})
        return 0
    for each in shown:
        origin = f"    # {origins[each.key]}" if options.origin and origins[each.key] else ""
        print(f"{each.key}: {json.dumps(each.value, ensure_ascii=False)}{origin}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    """Print what a key of a file, or a code, is about."""
    words = [*options.words, *options.overrides]
    names = [word for word in words if not is_override(word)]
    if len(names) == 1:
        return _explain_code(names[0], as_json=options.json)
    if len(names) != 2:
        message = "explain takes a file and one key, or a code: flagscale-config explain FILE KEY [a.b=c ...]"
        raise _usage(message)
    from flagscale_config.explanation import explain

    found = explain(names[0], names[1], [word for word in words if is_override(word)])
    if options.json:
        _print_json([each.to_dict() for each in found])
        return 0
    print("\n\n".join("\n".join(_explained(each)) for each in found))
    return 0


def _explain_code(name: str, *, as_json: bool) -> int:
    from flagscale_config.codes import code_named

    code = code_named(name)
    if as_json:
        _print_json({"code": code.code, "title": code.title, "meaning": code.meaning, "cure": code.cure})
        return 0
    print(f"{code.code}: {code.title}\n\n{_wrapped(code.meaning)}\n\n{_wrapped(f'What to do: {code.cure}')}")
    return 0


def _explained(found: Explanation) -> Iterator[str]:
    """Yield the lines that explain one key."""
    value = json.dumps(found.value, ensure_ascii=False, default=str)
    yield f"{found.key}: {value}" if found.is_set else f"{found.key} is not set (default {value})"
    default = "" if found.default is None else f", default {json.dumps(found.default, default=str)}"
    facts = {
        "from": str(found.origin) if found.is_set else "",
        "engine": found.engine,
        "becomes": " ".join(found.words),
        "type": f"{found.type}{default}" if found.type else "",
        "choices": ", ".join(map(str, found.choices)),
        "belongs in": "; ".join(found.sections),
        "help": found.help,
    }
    for name, text in facts.items():
        if text:
            yield _wrapped(text, f"  {name:<11}")
    for index, rule in enumerate(found.checks):
        yield _wrapped(rule, f"  {'checked by' if index == 0 else '':<11}")
    for problem in found.problems:
        yield _wrapped(f"{problem.message} [{problem.code}]", f"  {problem.severity:<11}")


def _wrapped(text: str, label: str = "") -> str:
    """Return text in lines of 100 letters, a label before the first."""
    import textwrap

    return textwrap.fill(
        text, 100, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False
    )


def _usage(message: str) -> ConfigError:
    from flagscale_config.errors import ConfigError, Problem

    return ConfigError([Problem(code="config/usage", message=message)])


def _diff(options: argparse.Namespace) -> int:
    """Print what two experiments ask for differently."""
    from flagscale_config.difference import diff
    from flagscale_config.terminal import Style, wants_color

    both = options.overrides
    found = diff(options.one, options.two, [*both, *options.override_a], [*both, *options.override_b])
    if options.json:
        _print_json([each.to_dict() for each in found])
    style = Style(is_on=wants_color(sys.stdout))
    for each in () if options.json else found:
        for sign, value, origin, kind in (
            ("-", each.before, each.origin_before, "removed"),
            ("+", each.after, each.origin_after, "added"),
        ):
            if each.kind in {kind, "changed"}:
                place = f"    # {origin if origin is not None else 'default'}"
                line = f"{sign} {each.name}: {json.dumps(value, ensure_ascii=False, default=str)}"
                print(f"{style('error' if sign == '-' else 'ok', line)}{place}")
    if not found and not options.json:
        print("equal")
    return 3 if found and options.exit_code else 0


def _migrate(options: argparse.Namespace) -> int:
    """Print how old files would change, or change them."""
    from flagscale_config.document import shown_path
    from flagscale_config.migration import migrate
    from flagscale_config.terminal import count

    changed = migrate(options.file, write=options.write)
    if options.json:
        _print_json(
            [{"file": str(each.path), "changes": each.changes, "diff": each.diff} for each in changed]
        )
        return 0
    for each in changed:
        done = f"{shown_path(each.path)}: {count(len(each.changes), 'change')} written\n"
        print(done if options.write else each.diff, end="")
    if not changed:
        print(f"{options.file}: nothing to migrate")
    elif not options.write:
        print(f"not written; to write: flagscale-config migrate --write {options.file}")
    return 0


def _new(options: argparse.Namespace) -> int:
    """Copy a recipe and say how to go on."""
    from flagscale_config.document import shown_path
    from flagscale_config.recipe import task_of
    from flagscale_config.starting import new

    copies = [shown_path(path) for path in new(options.recipe, options.folder)]
    task = task_of(Path(copies[0]))
    then = [f"flagscale-config check {copies[0]}"]
    then += [f"flagscale-{task} run {copies[0]}"] if task in {"train", "serve"} else []
    if options.json:
        _print_json({"files": copies, "next": then})
        return 0
    print("".join(f"wrote {copy}\n" for copy in copies) + "".join(f"next: {line}\n" for line in then), end="")
    return 0


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
    if name in _OPTION_READERS:
        parser.add_argument(
            "--engine", action="append", default=[], metavar="NAME=VERSION", dest="engines",
            help="read options by this version of an engine, such as vllm=0.25.1, instead of the one "
            "installed here, or the newest known; may be repeated",
        )  # fmt: skip
    parser.set_defaults(function=function, engines=[])
    return parser


def _versions(words: Sequence[str]) -> dict[str, str]:
    """Return the versions that `--engine NAME=VERSION` asks for."""
    from flagscale_config.options import ENGINES, known_versions
    from flagscale_config.versions import is_known

    found: dict[str, str] = {}
    for word in words:
        engine, _, version = word.partition("=")
        if engine not in ENGINES:
            raise _usage(f"--engine {word}: no engine {engine!r}; known: {', '.join(ENGINES)}")
        known = known_versions(engine)
        if not is_known(known, version):
            asked = f"no options of {engine} {version} are known" if version else "names no version"
            raise _usage(f"--engine {word}: {asked}; known versions: {', '.join(known)}")
        found[engine] = version
    return found


def _models(options: argparse.Namespace) -> int:
    """Print published models, or which of them a file is."""
    from flagscale_config.models.cli import run as run_models

    return run_models(options)


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
    _add_models(verbs)
    return parser


def _add_check(verbs: Any) -> None:
    text = "report every mistake in a file, with its place and its cure"
    examples = (
        "check conf/tiny.yaml",
        "check conf/tiny.yaml --engine megatron=0.17.1",
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
    text = "say where a value comes from and what it becomes, or what an error code means"
    examples = ("explain conf/tiny.yaml lr", "explain config/unknown-key")
    verb = _verb(verbs, "explain", _explain, text, examples)
    verb.add_argument("words", metavar="FILE KEY", nargs="+", help=f"{_FILE}, and a key; or a code")
    verb.add_argument("overrides", nargs="*", metavar="a.b=c", help=_OVERRIDES)
    text = "print what two experiments ask for differently, by resolved value"
    examples = (
        "diff conf/tiny.yaml conf/small.yaml",
        "diff conf/tiny.yaml conf/tiny.yaml -b train.model.num_layers=8",
    )
    verb = _verb(verbs, "diff", _diff, text, examples)
    verb.add_argument("one", metavar="A", help=_FILE)
    verb.add_argument("two", metavar="B", help="the other one")
    verb.add_argument("overrides", nargs="*", metavar="a.b=c", help=f"{_OVERRIDES}; they hold for both")
    for name in ("a", "b"):
        verb.add_argument(
            f"-{name}", f"--override-{name}", action="append", default=[], metavar="a.b=c",
            help=f"an override for {name.upper()} only",
        )  # fmt: skip
    verb.add_argument(
        "--exit-code", action="store_true", help="exit with 3 when they differ, as scripts need"
    )


def _add_making(verbs: Any) -> None:
    from flagscale_config.schema import KINDS

    text = "print a JSON Schema, for editors and other programs"
    verb = _verb(verbs, "schema", _schema, text, ("schema experiment > experiment.json",))
    verb.add_argument("kind", choices=KINDS, help="what to describe")
    verb.add_argument(
        "--check", metavar="PATH", help="compare with this file instead; exit code 2 when it differs"
    )
    text = "rewrite what older FlagScale versions spelled differently, comments and layout kept"
    examples = ("migrate conf/tiny.yaml", "migrate --write conf/tiny.yaml")
    verb = _verb(verbs, "migrate", _migrate, text, examples)
    verb.add_argument(
        "file", metavar="FILE", help="experiment file; the files its defaults list names follow"
    )
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--diff", action="store_true", help="print the change and write nothing (default)")
    how.add_argument("--write", action="store_true", help="write the files")
    text = "start an experiment of your own from a recipe"
    verb = _verb(verbs, "new", _new, text, ("new train:qwen3/0_6b my-experiment",))
    verb.add_argument("recipe", metavar="RECIPE", help="name that `recipes` lists, or an experiment file")
    verb.add_argument(
        "folder", metavar="DIR", help="where to; files are written to DIR/conf, none overwritten"
    )
    _verb(verbs, "recipes", _recipes, "list the ready-made experiments of installed packages", ("recipes",))


def _add_models(verbs: Any) -> None:
    text = "list the published models, show one, or say which one a training file is"
    verb = _verb(
        verbs, "models", _models, text, ("models", "models qwen3-0.6b", "models match conf/tiny.yaml")
    )
    verb.add_argument("name", nargs="?", metavar="NAME", help="model, Hugging Face repository, or `match`")
    verb.add_argument(
        "rest", nargs="*", metavar="FILE a.b=c", help="after `match`: experiment file, overrides"
    )


def _dispatch(argv: list[str]) -> int:
    from flagscale_config.versions import using

    options = parse(_parser(), argv)
    function: Callable[[argparse.Namespace], int] = options.function
    with using(_versions(options.engines) if options.engines else None):
        return function(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run(_dispatch, argv)


if __name__ == "__main__":
    raise SystemExit(main())
