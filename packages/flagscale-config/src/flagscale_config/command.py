"""The frame of every command line of the project: errors become one line and an exit code."""

from __future__ import annotations

import errno
import gc
import io
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TextIO, TypeGuard

__all__ = ["is_override", "parse", "run"]

_INTERRUPTED = 130
_BUG = 1
_FAILED = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call a command's `main` with its arguments and return the process's exit code.

    An exception with an int `exit_code` is the user's: `error: ...` on standard error and that code; on a
    terminal the problems of a `ConfigError` are shown with their source lines. Ctrl-C is 130, a reader that
    closed the pipe ends the command quietly with 0 (a command that is at its end, or has an error that it
    cannot tell, keeps its code), a full disk is 4, anything else is a bug: one line that says so and 1. With
    `--debug` (anywhere before `--`; it is removed) or FLAGSCALE_DEBUG=1 tracebacks are shown.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    limit = words.index("--") if "--" in words else len(words)
    is_debug = "--debug" in words[:limit] or os.environ.get("FLAGSCALE_DEBUG") == "1"
    words = [word for word in words[:limit] if word != "--debug"] + words[limit:]
    # What a start imports stays: looking for garbage in it, again and again, took a twentieth of the time.
    gc.set_threshold(100_000)
    _open_closed_streams()
    _let_every_letter_pass()
    code = _call(main, words, is_debug=is_debug)
    _leave_closed_pipes()
    return code


def _call(main: Callable[[list[str]], int], words: list[str], *, is_debug: bool) -> int:
    try:
        code = main(words)
        with suppress(BrokenPipeError):  # all is done: nobody reads it, and the code stands
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        return 0
    except SystemExit as error:  # argparse
        return _exit_code(error)
    except Exception as error:  # noqa: BLE001  the one place where a bug becomes a line and exit code 1
        code = _code_of(error)
        with suppress(BrokenPipeError):  # nobody reads it
            _tell(error, is_debug=is_debug)
    return code


def _open_closed_streams() -> None:
    """Give a stream that the caller has closed the null device.

    Otherwise the next file to be opened becomes standard output, here and in what is started.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number is taken: this one, because those below are open by now.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _let_every_letter_pass() -> None:
    """Print what the locale cannot write as an escape, as Python does on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave_closed_pipes() -> None:
    """Python flushes both streams once more at exit, and exits with 120 where it cannot."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Give what is still to be written somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line whose overrides may stand anywhere among the options.

    They are a list argument named `overrides`. argparse itself understands them in one place only: `FILE
    --json a.b=c` would be an error.
    """
    options, rest = parser.parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def is_override(word: str) -> bool:
    """Whether a word is an override (`a.b=c`, `+a.b=c`, `~a.b`) and not the name of a file."""
    looks_so = word.startswith("~") or "=" in word
    return looks_so and not os.path.exists(word)  # noqa: PTH110  any text is allowed here, `\0` too


def _exit_code(error: SystemExit) -> int:
    if isinstance(error.code, str):
        with suppress(BrokenPipeError):
            sys.stderr.write(f"error: {error.code}\n")
        return 2
    return error.code or 0


def _code_of(error: Exception) -> int:
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    return _FAILED if _is_full(error) else _BUG


def _is_full(error: Exception) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in _FULL


def _tell(error: Exception, *, is_debug: bool) -> None:
    """Say what went wrong."""
    if is_debug:
        import traceback

        traceback.print_exception(error)
    is_known = isinstance(getattr(error, "exit_code", None), int)
    if is_known and hasattr(error, "problems"):
        from flagscale_config.terminal import report

        report(error.problems)
    elif is_known:
        sys.stderr.write(
            "".join(f"error: {line}\n" for line in str(error).splitlines() or [type(error).__name__])
        )
    elif _is_full(error):
        _tell_full(error)
    else:
        what = " ".join(str(error).split())
        sys.stderr.write(
            f"error: bug in flagscale: {type(error).__name__}: {what}; run again with --debug and report it\n"
        )


def _tell_full(error: OSError) -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)
    where = error.filename or "writing"
    sys.stderr.write(f"error: {where}: {error.strerror}: the output is not whole: make room and run again\n")
