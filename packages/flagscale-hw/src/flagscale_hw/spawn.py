"""Start one planned process: own session, own log, dies with the supervisor.

What does not live here: which processes, and when (`supervisor.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from flagscale_hw.errors import LaunchError
from flagscale_hw.kernel import die_with_parent

__all__ = ["Command", "fork_helper", "spawn"]

_ORDINARY = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD),
    # Every Python process ignores these two; an engine expects the kernel's own defaults.
    *(signal.SIGPIPE, signal.SIGXFSZ),
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A process with every placeholder replaced."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """The whole environment, nothing is added to it."""
    cwd: Path
    log: Path
    """Standard output and standard error are appended to it."""
    stdio: int | None = None
    """A socket that is standard input and standard output instead."""


def spawn(command: Command) -> int:
    """Start the process and return its pid once the new program runs.

    Call it from the main thread of a process that has no other thread: it forks.

    Raises:
        LaunchError: the program, the working directory or the log cannot be opened.
    """
    listen, report = os.pipe()
    parent = os.getpid()
    pid = _fork()
    if pid == 0:
        _become(command, parent, report)
    os.close(report)
    with os.fdopen(listen, encoding="utf-8", errors="replace") as answers:
        problem = answers.read()
    if problem:
        os.waitpid(pid, 0)
        raise LaunchError(f"{command.name}: cannot start `{command.argv[0]}`: {problem}")
    return pid


def fork_helper() -> int:
    """Fork a helper of the supervisor that runs no other program; 0 in the helper, its pid in the supervisor.

    The helper answers signals by dying, and dies with the supervisor.
    """
    parent = os.getpid()
    pid = _fork()
    if pid == 0:
        _reset_signals()
        die_with_parent(parent)
    return pid


def _fork() -> int:
    """Fork with every signal held back; in the child they stay so until `_reset_signals`.

    A signal that reached the child any earlier would go to the supervisor's handlers, which it has inherited,
    and be lost: the child would outlive the polite request.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid != 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _become(command: Command, parent_pid: int, report: int) -> NoReturn:
    """Turn the forked child into the program; never returns, never unwinds into the supervisor's code."""
    try:
        _reset_signals()
        os.setsid()
        die_with_parent(parent_pid)
        log = os.open(command.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null if command.stdio is None else command.stdio, 0)
        os.dup2(log if command.stdio is None else command.stdio, 1)
        os.dup2(log, 2)
        try:
            os.chdir(command.cwd)
        except OSError as error:
            _say(report, f"working directory {command.cwd}: {error.strerror}")
            os._exit(127)
        os.execvpe(command.argv[0], list(command.argv), dict(command.env))  # noqa: S606 - that is the point
    except (OSError, ValueError) as error:
        _say(report, getattr(error, "strerror", None) or str(error))
    finally:
        os._exit(127)


def _say(report: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(report, text.encode(errors="replace"))


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for signum in _ORDINARY:
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
