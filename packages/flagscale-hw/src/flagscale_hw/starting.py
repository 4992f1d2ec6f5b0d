"""Start the guardian of a run, and undo the start when anything stops it half-way.

Until the launcher lets go, the run hangs on a pipe that the kernel closes when the launcher dies, whatever
the death.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import time
import uuid
from io import FileIO
from pathlib import Path

from flagscale_hw.__about__ import __version__
from flagscale_hw.cause import first_cause
from flagscale_hw.errors import LaunchError, LaunchRefused
from flagscale_hw.identity import identify
from flagscale_hw.order import KEEP, LET_GO, Order
from flagscale_hw.plan import Plan
from flagscale_hw.rundir import RunDirectory

__all__ = ["Start", "reap_guardians"]

_ANSWER_LIMIT_S = 300.0  # more than a coordinator takes to give up its hosts
_END_LIMIT_S = 60.0
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from flagscale_hw.supervisor import main; raise SystemExit(main())"
)

_guardians: set[int] = set()
"""Guardians that this very process started and has to reap."""
_lifelines: list[int] = []
"""Kept open as long as this process lives."""


class Start:
    """The few moments in which a run depends on its launcher."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._lifeline = -1
        self._answer = -1
        self._lent: list[FileIO] = []
        self.is_let_go = False
        """Whether the run may have been told that it can live without us."""

    def begin(self, plan: Plan, run_id: str | None = None) -> None:
        """Start the guardian and wait until the supervisor has put itself on record.

        Args:
            plan: what to run.
            run_id: given where this is a part of a run; nothing is started then until `keep`.

        Raises:
            LaunchRefused: a port asked for is taken.
            LaunchError: the supervisor could not do its work, or broke.
        """
        launcher = identify(os.getpid())
        if launcher is None:
            raise LaunchError("/proc: not readable: mount it, the launcher identifies processes by it")
        order = Order(
            plan=plan,
            run_id=run_id or uuid.uuid4().hex,
            launcher=launcher,
            versions=_versions(),
            is_held=run_id is not None,
        )
        try:
            self._start_guardian(order)
        except OSError as error:
            raise LaunchError(
                f"{self._directory.path}: cannot start the supervisor: {error.strerror}"
            ) from error
        said = self._wait_for_answer()
        if "refused" in said:
            raise LaunchRefused(said["refused"])
        if "problem" in said:
            raise LaunchError(said["problem"])
        if "run_id" not in said:
            text = _last_words(self._directory.supervisor_log)
            raise LaunchError(f"{self._directory.path}: the supervisor ended before it had begun: {text}")

    def _start_guardian(self, order: Order) -> None:
        told = self._lend(_nameless_file(order.to_json()))
        self._answer, report = os.pipe()
        self._lend(report)
        hang, self._lifeline = os.pipe()
        self._lend(hang)
        log = self._lend(
            os.open(self._directory.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        )
        # Moved out of the way first: a target number may be one of the sources.
        sources = [
            self._lend(fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 10))
            for handle in (told, log, log, report, hang)
        ]
        package_root = str(Path(__file__).resolve().parents[1])
        pid = os.posix_spawn(
            sys.executable,
            # -I -S: neither the user's site nor a json.py in the working directory has a say in it.
            [sys.executable, "-I", "-S", "-c", _START, package_root, str(self._directory.path)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(sources)],
            setsid=True,
            setsigmask=(),
            # A launcher that ignores SIGCHLD would pass that on, and no wait would ever return a child.
            setsigdef=(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT),
        )
        _guardians.add(pid)
        self._close_lent()

    def _lend(self, handle: int) -> int:
        """Note a handle that only the guardian needs.

        As a file object it can be closed twice without harm, which an interrupted `_close_lent` leads to.
        """
        self._lent.append(os.fdopen(handle, "rb", buffering=0))
        return handle

    def _close_lent(self) -> None:
        for file in self._lent:
            file.close()

    def _wait_for_answer(self) -> dict[str, str]:
        data = b""
        deadline = time.monotonic() + _ANSWER_LIMIT_S
        while not data.endswith(b"\n") and _is_readable(self._answer, deadline):
            chunk = os.read(self._answer, 4096)
            if not chunk:
                break
            data += chunk
        try:
            said: dict[str, str] = json.loads(data)
        except ValueError:
            return {}
        return said

    def let_go(self) -> None:
        """Let the run outlive this process."""
        self.is_let_go = True  # before the fact: an interrupt may come right after it
        with contextlib.suppress(BrokenPipeError):  # a short run is over by now
            os.write(self._lifeline, LET_GO)
        self._close()

    def keep(self) -> None:
        """Bind the run to the life of this process."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._lifeline, KEEP)
        _lifelines.append(self._lifeline)
        self._lifeline = -1
        self._close()

    def abort(self) -> None:
        """End what has been started, and wait until it is gone."""
        self._close_lent()
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)
        # The guardian holds the other end of this pipe until it ends, so its end is the end of everything.
        deadline = time.monotonic() + _END_LIMIT_S
        while self._answer >= 0 and _is_readable(self._answer, deadline) and os.read(self._answer, 4096):
            pass
        self._close()
        reap_guardians()

    def _close(self) -> None:
        for handle in (self._lifeline, self._answer):
            if handle >= 0:
                os.close(handle)
        self._lifeline = self._answer = -1


def _nameless_file(text: str) -> int:
    handle = os.memfd_create("flagscale-order", os.MFD_CLOEXEC)
    with os.fdopen(handle, "wb", closefd=False) as file:
        file.write(text.encode())
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def _is_readable(handle: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _last_words(log: Path) -> str:
    return first_cause(log) or "it said nothing"


def _versions() -> dict[str, str]:
    """Return the installed FlagScale packages, by file names: importlib.metadata costs 100 ms."""
    found = {"flagscale-hw": __version__}
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for entry in Path(folder or ".").glob("flagscale_*.dist-info"):
                name, _, version = entry.stem.partition("-")
                found.setdefault(name.replace("_", "-"), version)
    return found


def reap_guardians() -> None:
    """Collect guardians that have ended, so that a long-lived launcher gathers no zombies."""
    for pid in tuple(_guardians):
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        except ChildProcessError:
            pass  # the calling program reaps all children itself
        _guardians.discard(pid)
