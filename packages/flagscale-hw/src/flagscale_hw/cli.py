"""The command `flagscale-hw`: what this machine has, and how to use it.

Exit codes: 0 done, 1 a bug, 2 wrong input, 3 not found, 4 a run failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Sequence

from flagscale_hw.__about__ import __version__

__all__ = ["main"]

_DESCRIPTION = "Show the processors and accelerators of this machine, and how programs select them."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    action: Callable[[argparse.Namespace], int] = options.action
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that the locale lacks becomes an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = action(options)
        if sys.stdout is not None:  # the caller may have closed it
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        _discard_output()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the last frame: a user gets a line, not a traceback
        return _report(error, debug=options.debug)
    return code


def _discard_output() -> None:
    """Python flushes standard output once more at exit: give it another place."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: Exception, *, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        print(f"error: {error}", file=sys.stderr)
        return code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "writing"
        print(f"error: {where}: {error.strerror}: the output is not whole: make room", file=sys.stderr)
        _discard_output()
        return 4
    print(f"error: a bug in flagscale-hw {__version__}: {type(error).__name__}: {error}", file=sys.stderr)
    print("run it again with --debug and report what it prints", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flagscale-hw", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"flagscale-hw {__version__}")
    _add_common(parser, default=None)
    parser.set_defaults(action=_show)
    verbs = parser.add_subparsers(title="verbs (none: the table)", metavar="VERB")
    env = verbs.add_parser("env", help="print the variables that let a program use certain devices")
    env.add_argument("--devices", metavar="0,1", help="indices of the devices; default: all that are visible")
    env.set_defaults(action=_env)
    doctor = verbs.add_parser("doctor", help="check what stands in the way of using this machine")
    doctor.set_defaults(action=_doctor)
    for verb in (env, doctor):
        _add_common(verb, default=argparse.SUPPRESS)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Add the options that may stand before or behind the verb."""
    false = False if default is None else default
    parser.add_argument("--json", action="store_true", default=false, help="print JSON instead of text")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        default=3.0 if default is None else default,
        help="how long a vendor's library or tool may take (3)",
    )
    parser.add_argument("--debug", action="store_true", default=false, help="show the traceback of an error")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, above 0 and at most 600")
    return value


def _show(options: argparse.Namespace) -> int:
    from flagscale_hw.detection import detect
    from flagscale_hw.table import render

    machine = detect(timeout_s=options.timeout)
    if options.json:
        print(json.dumps(machine.to_dict(), indent=2, ensure_ascii=False))
        return 0
    print(render(machine))
    _print_problems(machine.problems)
    return 0


def _print_problems(problems: Sequence[object]) -> None:
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)


def _env(options: argparse.Namespace) -> int:
    import shlex

    from flagscale_hw.chips import env
    from flagscale_hw.detection import detect

    machine = detect(timeout_s=options.timeout)
    chosen = machine.visible if options.devices is None else machine.select(_indices(options.devices))
    variables = env(chosen)
    if options.json:
        print(json.dumps(variables, indent=2))
    else:
        for name, value in variables.items():
            print(f"export {name}={shlex.quote(value)}")
    _print_problems(machine.problems)
    return 0


def _indices(text: str) -> list[int]:
    from flagscale_hw.errors import InputError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--devices {text!r}: give indices separated by commas, such as 0,1") from None


def _doctor(options: argparse.Namespace) -> int:
    from flagscale_hw.doctor import examine

    findings = examine(timeout_s=options.timeout)
    if options.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2, ensure_ascii=False))
    else:
        for finding in findings:
            print(finding)
    return 0 if all(finding.is_good for finding in findings) else 3


if __name__ == "__main__":
    raise SystemExit(main())
