"""Start a plan, and come back to it later from any process: a run is a directory.

    run = launch(plan, run_dir)
    run = open_run(run_dir)
    run.status(), run.wait(), run.stop(), run.logs(follow=True)

What does not live here: the process that watches over the run (`supervisor.py`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from flagscale_hw.__about__ import __version__
from flagscale_hw.errors import HwError, InvalidPlan, LaunchError, RunNotFound
from flagscale_hw.identity import identify, marked
from flagscale_hw.index import remembered
from flagscale_hw.logs import LogLine, follow_logs, read_logs
from flagscale_hw.order import Order, here
from flagscale_hw.plan import Plan
from flagscale_hw.rundir import RunDirectory
from flagscale_hw.status import RunStatus

__all__ = ["Run", "launch", "list_runs", "open_run"]

_ANSWER_LIMIT_S = 60.0
_END_LIMIT_S = 15.0
_POLL_S = 0.05
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from flagscale_hw.supervisor import main; raise SystemExit(main())"

_guardians: set[int] = set()
"""Guardians that this very process started and has to reap."""
_lifelines: list[int] = []
"""Kept open as long as this process lives: the kernel closes them at its death, whatever the death."""


class Run:
    """One run, by its directory. Holds no handle on it: any process may have any number of these."""

    def __init__(self, run_dir: Path) -> None:
        self.dir = run_dir
        """Absolute."""
        self._directory = RunDirectory(run_dir)

    def __repr__(self) -> str:
        return f"Run({str(self.dir)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.dir == other.dir

    def __hash__(self) -> int:
        return hash(self.dir)

    @property
    def name(self) -> str:
        """The name of the experiment, from the manifest; empty when there is none."""
        return str((self._directory.read(self._directory.manifest) or {}).get("name", ""))

    def status(self) -> RunStatus:
        """Say how the run stands.

        A recorded state is believed only while somebody who could change it is alive, or when it is final.
        """
        _reap_guardians()
        status = self._directory.read_status()
        if status is not None and (status.is_over or not self._is_of_here()):
            return status
        if status is not None and self._is_alive("supervisor"):
            return status
        if self._is_alive("guardian"):
            current = status or RunStatus(state="starting")
            return self._final_or(
                replace(current, state="stopping", reason=current.reason or "the supervisor died")
            )
        # The end may have been recorded between the first look and the last.
        lost = "its supervisor and guardian are gone (killed, or the machine was restarted)"
        return self._final_or(replace(status or RunStatus(state="lost"), state="lost", reason=lost))

    def _final_or(self, otherwise: RunStatus) -> RunStatus:
        status = self._directory.read_status()
        return status if status is not None and status.is_over else otherwise

    def _is_of_here(self) -> bool:
        """Tell whether the processes of the run are, or were, of this host and container."""
        recorded = self._directory.read(self._directory.supervisor)
        if recorded is None:
            return True
        now = here()
        # Another boot of the same host is here: whatever ran before it is gone.
        return all(recorded.get(key) == now[key] for key in ("hostname", "pid_namespace"))

    def _is_alive(self, role: str) -> bool:
        who = self._directory.read_identity(role)
        return who is not None and who.is_alive()

    def wait(self, timeout_s: float | None = None) -> RunStatus:
        """Wait until the run is over and its supervisor is gone.

        Args:
            timeout_s: give up after so many seconds; then the returned status is not over. None waits forever.
        """
        status = self._poll(timeout_s, lambda now: now.is_over)
        if status.is_over and self._is_of_here():
            self._wait_for_guardian()
        return status

    def wait_ready(self, timeout_s: float | None = None) -> RunStatus:
        """Wait until the run is ready (running, for a plan without probes) or over.

        Args:
            timeout_s: give up after so many seconds; then the status is still `starting`. None waits forever.
        """
        return self._poll(timeout_s, lambda now: now.state != "starting")

    def _poll(self, timeout_s: float | None, is_enough: Callable[[RunStatus], bool]) -> RunStatus:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            status = self.status()
            if is_enough(status) or time.monotonic() >= deadline:
                return status
            time.sleep(_POLL_S)

    def _wait_for_guardian(self) -> None:
        deadline = time.monotonic() + _END_LIMIT_S
        while self._is_alive("guardian") and time.monotonic() < deadline:
            time.sleep(_POLL_S / 5)
            _reap_guardians()

    def stop(self, grace_s: float | None = None) -> RunStatus:
        """End the run and wait for its end; a run that is over is left as it is.

        Args:
            grace_s: seconds between the plan's polite signal and SIGKILL; the plan's own when None.

        Raises:
            LaunchError: the run is on another host, or belongs to another user.
        """
        if not self._is_of_here():
            if self.status().is_over:
                return self.status()
            where = (self._directory.read(self._directory.supervisor) or {}).get("hostname")
            raise LaunchError(f"{self.dir}: runs on host {where!r} or in another container: stop it there")
        if self.status().is_over:
            return self._sweep()
        self._ask_to_stop(grace_s)
        status = self.wait(self._patience_s(grace_s))
        if not status.is_over:
            # It was told and did not move, so it hangs or is frozen: its guardian does the rest.
            self._send("supervisor", signal.SIGKILL)
            status = self.wait(_END_LIMIT_S)
        return self._sweep() if status.is_over else status

    def _ask_to_stop(self, grace_s: float | None) -> None:
        with contextlib.suppress(
            OSError
        ):  # a full disk must not keep a run alive: then the plan's own grace counts
            self._directory.write(self._directory.stop_request, {"grace_s": grace_s})
        self._send("supervisor", signal.SIGTERM)

    def _patience_s(self, grace_s: float | None) -> float:
        if grace_s is None:
            plan = self._directory.read(self._directory.plan) or {}
            grace_s = float(plan.get("stop", {}).get("grace_s", 30.0))
        return grace_s + _END_LIMIT_S

    def _send(self, role: str, signum: int) -> None:
        who = self._directory.read_identity(role)
        if who is None:
            return
        try:
            who.send(signum)
        except PermissionError as error:
            raise LaunchError(
                f"{self.dir}: the run belongs to another user: only that user can stop it"
            ) from error

    def _sweep(self) -> RunStatus:
        """End what carries the mark of this run although its supervisor and its guardian are both gone."""
        run_id = (self._directory.read(self._directory.supervisor) or {}).get("run_id")
        deadline = time.monotonic() + _END_LIMIT_S
        while run_id and (left := marked(run_id)) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(PermissionError):
                    process.send(signal.SIGKILL)
            time.sleep(_POLL_S)
        return self.status()

    def logs(self, *, follow: bool = False) -> Iterator[LogLine]:
        """Yield the log lines of every process.

        Args:
            follow: go on as lines are written, until the run is over.
        """
        plan = self._directory.read(self._directory.plan) or {}
        files = {entry["name"]: self._directory.log(entry["name"]) for entry in plan.get("processes", ())}
        return follow_logs(files, lambda: self.status().is_over) if follow else read_logs(files)


def launch(plan: Plan, run_dir: str | os.PathLike[str], *, detach: bool = True) -> Run:
    """Start a plan in a directory of its own; return once the supervisor has put itself on record.

    Args:
        plan: what to run, on this host.
        run_dir: made if missing; must not hold a run, not even one that is over.
        detach: let the run outlive the calling process. Otherwise it ends when the caller does, even by SIGKILL.

    Raises:
        InvalidPlan: the plan asks for another host.
        LaunchError: the directory holds a run or cannot be written, or a port is taken. Nothing is left behind.
    """
    elsewhere = sorted({process.host for process in plan.processes} - {"local"})
    if elsewhere:
        raise InvalidPlan(
            f"plan {plan.name}: host {elsewhere[0]!r}: this version starts processes on `local` only"
        )
    directory = RunDirectory(Path(run_dir).absolute())
    is_new = not directory.path.exists()
    _claim(directory, plan)
    starting = _Start(directory)
    try:
        starting.begin(plan)
        run = Run(directory.path)
        if detach:
            starting.let_go()
        else:
            starting.keep()
    except BaseException:  # also Ctrl-C: whatever stops a launch, nothing may stay
        starting.abort()
        _remove(directory, plan, is_new=is_new)
        raise
    return run


def _claim(directory: RunDirectory, plan: Plan) -> None:
    try:
        is_ours = directory.claim(plan.to_json())
    except OSError as error:
        raise LaunchError(
            f"{directory.path}: cannot hold a run: {error.strerror}: choose another directory"
        ) from error
    if not is_ours:
        state = Run(directory.path).status().state
        raise LaunchError(
            f"{directory.path}: holds a run already ({state}): choose a new directory for each run"
        )


class _Start:
    """The few moments in which a run depends on its launcher."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._lifeline = -1
        self._answer = -1
        self._run_id = ""

    def begin(self, plan: Plan) -> None:
        """Start the guardian and wait until the supervisor has put itself on record.

        Raises:
            LaunchError: the supervisor refused or broke.
        """
        launcher = identify(os.getpid())
        if launcher is None:
            raise LaunchError("/proc: not readable: mount it, the launcher identifies processes by it")
        self._run_id = uuid.uuid4().hex
        order = Order(plan=plan, run_id=self._run_id, launcher=launcher, versions=_versions())
        try:
            self._start_guardian(order)
        except OSError as error:
            raise LaunchError(
                f"{self._directory.path}: cannot start the supervisor: {error.strerror}"
            ) from error
        said = self._wait_for_answer()
        if "problem" in said:
            raise _refusal(said)
        if "run_id" not in said:
            text = _read_end(self._directory.supervisor_log)
            raise LaunchError(f"{self._directory.path}: the supervisor ended before it had begun: {text}")

    def _start_guardian(self, order: Order) -> None:
        passed: list[int] = []
        try:
            told = _nameless_file(order.to_json())
            passed.append(told)
            listen, report = os.pipe()
            self._answer = listen
            passed.append(report)
            hang, hold = os.pipe()
            self._lifeline = hold
            passed.append(hang)
            log = os.open(self._directory.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            passed.append(log)
            # Moved out of the way first: a target number may be one of the sources.
            sources = [_move_up(passed, handle) for handle in (told, log, log, report, hang)]
            package_root = str(Path(__file__).resolve().parents[1])
            pid = os.posix_spawn(
                sys.executable,
                # -I -S: neither the user's site nor a json.py in the working directory has a say in the supervisor.
                [sys.executable, "-I", "-S", "-c", _START, package_root, str(self._directory.path)],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(sources)],
                setsid=True,
                setsigmask=(),
            )
            _guardians.add(pid)
        finally:
            for handle in passed:
                os.close(handle)

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
        os.write(self._lifeline, b"D")
        self._close()

    def keep(self) -> None:
        """Bind the run to the life of this process."""
        _lifelines.append(self._lifeline)
        self._lifeline = -1
        self._close()

    def abort(self) -> None:
        """End what has been started, and wait until it is gone."""
        if self._lifeline < 0 and self._run_id:
            with contextlib.suppress(HwError):
                Run(self._directory.path).stop(grace_s=0.0)
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)
        # The guardian holds the other end of this pipe until it ends, so its end is the end of everything.
        deadline = time.monotonic() + _END_LIMIT_S
        while self._answer >= 0 and _is_readable(self._answer, deadline) and os.read(self._answer, 4096):
            pass
        self._close()
        _reap_guardians()

    def _close(self) -> None:
        for handle in (self._lifeline, self._answer):
            if handle >= 0:
                os.close(handle)
        self._lifeline = self._answer = -1


def _refusal(said: dict[str, str]) -> HwError:
    kind = InvalidPlan if said.get("kind") == "InvalidPlan" else LaunchError
    return kind(said["problem"])


def _nameless_file(text: str) -> int:
    handle = os.memfd_create("flagscale-order", os.MFD_CLOEXEC)
    with open(handle, "wb", closefd=False) as file:
        file.write(text.encode())
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def _move_up(opened: list[int], handle: int) -> int:
    import fcntl

    moved = fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 10)
    opened.append(moved)
    return moved


def _is_readable(handle: int, deadline: float) -> bool:
    import select

    ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
    return bool(ready)


def _read_end(log: Path) -> str:
    from flagscale_hw.cause import first_cause

    return first_cause(log) or "it said nothing"


def _versions() -> dict[str, str]:
    """Return the installed FlagScale packages; read from file names, because importlib.metadata costs 100 ms."""
    found = {"flagscale-hw": __version__}
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for entry in os.listdir(folder or "."):
                if entry.startswith("flagscale_") and entry.endswith(".dist-info"):
                    name, _, version = entry.removesuffix(".dist-info").partition("-")
                    found.setdefault(name.replace("_", "-"), version)
    return found


def _remove(directory: RunDirectory, plan: Plan, *, is_new: bool) -> None:
    """Take away what a launch that failed has put there, and nothing else."""
    import shutil

    if is_new:
        shutil.rmtree(directory.path, ignore_errors=True)
        return
    shutil.rmtree(directory.logs, ignore_errors=True)
    for path in (*directory.files(), *(directory.path / file.path for file in plan.files)):
        with contextlib.suppress(OSError):
            path.unlink()


def _reap_guardians() -> None:
    for pid in tuple(_guardians):
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        except ChildProcessError:
            pass  # the calling program reaps all children itself
        _guardians.discard(pid)


def open_run(run_dir: str | os.PathLike[str]) -> Run:
    """Open the run that lives in a directory.

    Raises:
        RunNotFound: there is none.
    """
    directory = RunDirectory(Path(run_dir).absolute())
    if not directory.plan.is_file():
        raise RunNotFound(
            f"{directory.path}: holds no run: give the directory of a run, or list the known ones"
        )
    return Run(directory.path)


def list_runs() -> tuple[Run, ...]:
    """Return every known run of this user on this machine, the newest last."""
    return tuple(
        Run(path) for path in sorted(remembered(), key=lambda path: (path / "plan.json").stat().st_mtime)
    )
