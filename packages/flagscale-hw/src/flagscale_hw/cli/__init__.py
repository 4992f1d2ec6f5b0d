"""The command `flagscale-hw`: what this machine has, and how to use it.

Exit codes: 0 done, 1 a bug, 2 wrong input, 3 not found or not usable, 4 a run failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TextIO, TypeGuard

from flagscale_hw.__about__ import __version__

__all__ = ["main"]

_DESCRIPTION = "Show the processors and accelerators of this machine, and how programs select them."
_CHOICES_OF_FOR = ("train", "serve")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        return _run(argv)
    finally:
        _leave_closed_pipes()


def _run(argv: Sequence[str] | None) -> int:
    words, command = _split(list(sys.argv[1:] if argv is None else argv))
    parser = _parser()
    options = parser.parse_args(words)
    options.command = [*getattr(options, "command", []), *command]
    _check_scope(parser, options)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that the locale lacks becomes an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _action(options.action)(options)
        if sys.stdout is not None:  # the caller may have closed it
            with suppress(BrokenPipeError):  # all is done: nobody reads it, and the code stands
                sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the last frame: a user gets a line, not a traceback
        code = _code_of(error)
        with suppress(BrokenPipeError):  # nobody reads it
            _report(error, debug=options.debug)
    return code


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Separate our own words from a command behind `--`, whose options are not ours."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _check_scope(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what would be ignored: these options stand before the verb but are not for every verb."""
    options.chips = options.vendor.split(",") if options.vendor else None
    if options.chips and options.action not in ("show:show", "show:watch", "show:topo"):
        from flagscale_hw.detection import FORCED_VARIABLE

        parser.error(f"--vendor is for the table, watch and topo; elsewhere set {FORCED_VARIABLE}")
    if options.require and options.action != "show:show":
        parser.error("--require is for the table and --json only: leave the verb out")


def _action(name: str) -> Callable[[argparse.Namespace], int]:
    """Return a verb's function; its module is imported now, so that each verb costs only what it needs."""
    module, _, function = name.partition(":")
    action: Callable[[argparse.Namespace], int] = getattr(
        import_module(f"flagscale_hw.cli.{module}"), function
    )
    return action


def _leave_closed_pipes() -> None:
    """Python flushes both streams once more at exit, and exits with 120 where it cannot."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # the caller may have closed it
                stream.flush()
        except BrokenPipeError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Give what is still to be written somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _code_of(error: Exception) -> int:
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    return 4 if _is_full(error) else 1


def _is_full(error: Exception) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def _report(error: Exception, *, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(getattr(error, "exit_code", None), int):
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    elif _is_full(error):
        _discard(sys.stdout)
        where = error.filename or "writing"
        print(f"error: {where}: {error.strerror}: the output is not whole: make room", file=sys.stderr)
    else:
        print(f"error: a bug in flagscale-hw {__version__}: {type(error).__name__}: {error}", file=sys.stderr)
        print("run it again with --debug and report what it prints", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flagscale-hw", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"flagscale-hw {__version__}")
    _add_common(parser, default=None)
    parser.add_argument("--vendor", metavar="CHIP", help="look for these only, such as nvidia,ascend")
    parser.add_argument(
        "--require",
        type=_positive,
        nargs="?",
        const=1,
        metavar="N",
        help="exit 3 unless N (1) healthy devices are here for this shell's programs",
    )
    parser.set_defaults(action="show:show")
    verbs = parser.add_subparsers(title="verbs (none: the table)", metavar="VERB")
    for add in (_env, _topo, _doctor, _specs, _plugins, _watch, _record, _replay, _fake, _schema):
        _add_common(add(verbs), default=argparse.SUPPRESS)
    return parser


_Verbs = argparse._SubParsersAction  # noqa: SLF001 - argparse gives its own class no public name


def _env(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("env", help="print the variables that let a program use certain devices")
    verb.add_argument(
        "--devices",
        metavar="0,1",
        help="numbers as a program of this shell counts them, or UUIDs; default: all that it may use",
    )
    form = verb.add_mutually_exclusive_group()
    form.add_argument(
        "--container",
        choices=("docker", "kubernetes"),
        nargs="?",
        const="docker",
        help="print what gives a container the devices",
    )
    form.add_argument("--export", action="store_true", help="print lines for a shell (this is the default)")
    verb.set_defaults(action="choose:env")
    return verb


def _topo(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("topo", help="print links, islands, network cards and groups that fit")
    verb.add_argument("--dot", action="store_true", help="print a graph for Graphviz (dot -Tsvg)")
    verb.set_defaults(action="show:topo")
    return verb


def _doctor(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("doctor", help="check what stands in the way of using this machine")
    verb.add_argument(
        "--for",
        dest="purpose",
        choices=_CHOICES_OF_FOR,
        help="also ask the installed torch, Megatron, Transformer Engine or vLLM what they would select",
    )
    verb.add_argument("--python", metavar="PATH", help="ask those of this interpreter; default: our own")
    verb.add_argument(
        "--ask-timeout",
        type=_seconds,
        metavar="S",
        default=120.0,
        help="how long they may take to import, all together (120)",
    )
    verb.set_defaults(action="check:doctor")
    return verb


def _specs(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("specs", help="print published figures, with their sources")
    verb.add_argument("model", nargs="?", help="name exactly as the vendor's tool reports it; default: all")
    verb.set_defaults(action="choose:specs")
    return verb


def _watch(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("watch", help="show the table again and again, until Ctrl-C")
    verb.add_argument("-n", "--interval", type=_seconds, metavar="S", default=1.0, help="seconds (1)")
    verb.add_argument("--once", action="store_true", help="one picture, then end")
    verb.add_argument("--csv", action="store_true", help="one line per device and look, for a spreadsheet")
    verb.set_defaults(action="show:watch")
    return verb


def _plugins(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("plugins", help="list who describes which chip, and plug-ins that cannot be used")
    verb.set_defaults(action="check:plugins")
    return verb


def _record(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("record", help="keep this host's files and tool answers in a directory")
    verb.add_argument("directory", metavar="DIR", help="must not exist, or be empty")
    verb.add_argument("--redact", action="store_true", help="replace host name, UUIDs and serial numbers")
    verb.set_defaults(action="stage:record")
    return verb


def _replay(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("replay", help="run a command as if on a recorded host; none: print its table")
    verb.add_argument("directory", metavar="DIR", help="what `record` or `fake --out` made")
    verb.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER, help="command and its words")
    verb.set_defaults(action="stage:replay")
    return verb


def _fake(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "fake", help="run a command as if on a host with other chips; none: print its table"
    )
    verb.add_argument("chip", help="such as ascend")
    verb.add_argument("--count", type=int, default=8, metavar="N", help="number of devices (8)")
    verb.add_argument("--out", metavar="DIR", help="keep the host's files there")
    verb.add_argument("--hang", action="store_true", help="the vendor's tools never answer")
    verb.add_argument("--garbage", action="store_true", help="they print nonsense")
    verb.add_argument("--slow", type=float, default=0.0, metavar="S", help="they take this long")
    verb.add_argument("--rc", type=int, default=0, metavar="N", help="they end with this code")
    verb.add_argument("command", metavar="CMD", nargs="*", help="command and its words, behind --")
    verb.set_defaults(action="stage:fake")
    return verb


def _schema(verbs: _Verbs[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    verb = verbs.add_parser("schema", help="print the JSON Schema of what --json prints")
    verb.set_defaults(action="show:schema")
    return verb


def _add_common(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Add the options that may stand before or behind the verb."""
    false = False if default is None else default
    parser.add_argument("--json", action="store_true", default=false, help="print JSON instead of text")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        default=default,
        help="how long a vendor's library or tool may take (FLAGSCALE_HW_TIMEOUT, or 3)",
    )
    parser.add_argument("--debug", action="store_true", default=false, help="show the traceback of an error")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of devices, 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, above 0 and at most 600")
    return value
