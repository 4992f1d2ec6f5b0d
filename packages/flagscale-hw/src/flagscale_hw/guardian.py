"""The guardian: parent of the supervisor, with one duty.

If the supervisor is killed, everything below it falls to the guardian (it is a sub-reaper too), which ends
it and writes how the run ended. It holds no other resource and does nothing else, so that there is nothing
in it to fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from flagscale_hw.attempts import Attempts
from flagscale_hw.demands import SHORT_GRACE_S
from flagscale_hw.ending import end_children
from flagscale_hw.errors import HwError, LaunchRefused
from flagscale_hw.kernel import become_subreaper
from flagscale_hw.order import Order
from flagscale_hw.record import Record, say
from flagscale_hw.rundir import RunDirectory
from flagscale_hw.supervisor import Supervisor

__all__ = ["ANSWER", "LIFELINE", "guard"]

ANSWER = 3
"""File descriptor on which the launcher is told that the run is recorded, or why it cannot be."""
LIFELINE = 4
"""File descriptor that ends with the launcher; see `KEEP` and `LET_GO`."""

_REFUSED = 3
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def guard(run_dir: Path) -> int:
    """Fork the supervisor, wait for it, and clean up after it if it did not do so itself.

    Returns:
        The exit code of the guardian process: 0 when the end of the run is on record.
    """
    try:
        os.fstat(ANSWER)
        os.fstat(LIFELINE)
    except OSError:
        sys.stderr.write("flagscale_hw.supervisor: it is started by flagscale_hw.launch, not by hand\n")
        return 2
    with os.fdopen(0, encoding="utf-8", closefd=False) as told:
        order = Order.from_json(told.read())
    _settle(run_dir)
    directory = RunDirectory(run_dir)
    watch, hold = os.pipe()
    # Signals wait until the handler that passes them on exists: none may fall between fork and handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    supervisor_pid = os.fork()
    if supervisor_pid == 0:
        os.close(hold)
        os._exit(_supervise(directory, order, watch))
    os.close(watch)
    os.close(LIFELINE)
    _pass_signals_on(supervisor_pid)
    _, wait_status = os.waitpid(supervisor_pid, 0)
    return _clean_up(directory, wait_status)


def _settle(run_dir: Path) -> None:
    become_subreaper()
    os.closerange(
        LIFELINE + 1, os.sysconf("SC_OPEN_MAX")
    )  # whatever the launcher had open is not ours to hold
    for handle in (ANSWER, LIFELINE):
        os.set_inheritable(handle, False)  # noqa: FBT003 - has no other form
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # the plan with its secrets is in memory now: let the nameless file go
    os.close(null)
    os.chdir(run_dir)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _pass_signals_on(supervisor_pid: int) -> None:
    def pass_on(signum: int, _frame: FrameType | None) -> None:
        # Not reaped yet, so the pid is still the supervisor's.
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor_pid, signum)

    for signum in _SIGNALS:
        signal.signal(signum, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _supervise(directory: RunDirectory, order: Order, watch: int) -> int:
    """Be the supervisor; returns its exit code and never raises into the guardian's code."""
    try:
        os.setsid()
        become_subreaper()
        supervisor = _watcher_of(order)(directory, order, LIFELINE, watch)
        try:
            supervisor.prepare()
        except (HwError, OSError) as error:
            supervisor.take_back()
            kind = "refused" if isinstance(error, LaunchRefused) else "problem"
            _answer({kind: _in_words(error)})
            return _REFUSED
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        _answer({"run_id": order.run_id})
        return supervisor.run()
    except BaseException:  # noqa: BLE001 - the last frame of a forked process; a bug must reach the log
        say(traceback.format_exc())
        return 1


def _watcher_of(order: Order) -> type[Attempts]:
    if not order.plan.targets:
        return Supervisor
    from flagscale_hw.coordinator import Coordinator

    return Coordinator


def _in_words(error: HwError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'the run directory'}: {error.strerror}: choose another directory"
    return str(error)


def _answer(said: dict[str, str]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the launcher is gone; the lifeline will tell us
        os.write(ANSWER, json.dumps(said).encode() + b"\n")
    os.close(ANSWER)


def _clean_up(directory: RunDirectory, wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    if code == _REFUSED:
        return _REFUSED
    status = directory.read_status()
    if status is None:
        deadline = time.monotonic() + SHORT_GRACE_S
        end_children(signal.SIGTERM, lambda: deadline - time.monotonic(), lambda _pid, _status: None)
        return 1
    record = Record(directory, status)
    deadline = time.monotonic() + SHORT_GRACE_S
    left = end_children(signal.SIGTERM, lambda: deadline - time.monotonic(), record.ended)
    if status.is_over:
        return 0
    reason = (
        f"the supervisor was killed by signal {-code}"
        if code < 0
        else "the supervisor broke: see supervisor.log"
    )
    if left:
        reason += f"; {len(left)} processes could not be killed: they wait inside the kernel"
    return 0 if record.finish("failed", reason) else 1
