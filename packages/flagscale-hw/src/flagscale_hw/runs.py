"""Start a plan, and come back to it later from any process: a run is a directory.

    run = launch(plan, run_dir)
    run = open_run(run_dir)
    run.status(), run.wait(), run.stop(), run.logs(follow=True)

What does not live here: the process that watches over the run (`supervisor.py`).
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from flagscale_hw.errors import LaunchError, LaunchRefused, RunNotFound
from flagscale_hw.identity import marked
from flagscale_hw.index import remembered
from flagscale_hw.logs import LogLine, follow_logs, read_logs
from flagscale_hw.order import here
from flagscale_hw.plan import Plan
from flagscale_hw.rundir import Claim, RunDirectory
from flagscale_hw.starting import Start, reap_guardians
from flagscale_hw.status import RunStatus
from flagscale_hw.target import LOCAL

__all__ = ["Launch", "Run", "launch", "list_runs", "open_run", "take"]

_END_LIMIT_S = 15.0
_POLL_S = 0.05


class Run:
    """One run, by its directory. Holds no handle on it: any process may have any number of these."""

    _poll_s = _POLL_S

    def __init__(self, run_dir: Path) -> None:
        self.dir = run_dir
        """Absolute."""
        self.directory = RunDirectory(run_dir)
        """Its files, by their names."""

    def __repr__(self) -> str:
        return f"Run({str(self.dir)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.dir == other.dir

    def __hash__(self) -> int:
        return hash(self.dir)

    @property
    def name(self) -> str:
        """The name of the experiment, from the manifest; empty when there is none."""
        return str((self.directory.read(self.directory.manifest) or {}).get("name", ""))

    def status(self) -> RunStatus:
        """Say how the run stands.

        A recorded state is believed only while somebody who could change it is alive, or when it is final.
        """
        reap_guardians()
        status = self.directory.read_status()
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
        lost = f"its supervisor and guardian are gone: {self._how_lost()}"
        current = status or RunStatus(state="lost")
        processes = tuple(replace(p, is_lost=p.is_running) for p in current.processes)
        return self._final_or(replace(current, state="lost", reason=lost, processes=processes))

    def _how_lost(self) -> str:
        who = self.directory.read_identity("supervisor")
        if who is not None and who.boot_id != here()["boot_id"]:
            return "the machine was restarted"
        return "killed"

    def _final_or(self, otherwise: RunStatus) -> RunStatus:
        status = self.directory.read_status()
        return status if status is not None and status.is_over else otherwise

    def _is_of_here(self) -> bool:
        """Tell whether the processes of the run are, or were, of this host and container."""
        recorded = self.directory.read(self.directory.supervisor)
        if recorded is None:
            return True
        now = here()
        # Another boot of the same host is here: whatever ran before it is gone.
        return all(recorded.get(key) == now[key] for key in ("hostname", "pid_namespace"))

    def _is_alive(self, role: str) -> bool:
        who = self.directory.read_identity(role)
        return who is not None and who.is_alive()

    def wait(self, timeout_s: float | None = None) -> RunStatus:
        """Wait until the run is over and its supervisor is gone.

        Args:
            timeout_s: give up after so many seconds; then the returned status is not over. None waits
                forever.
        """
        status = self._poll(timeout_s, lambda now: now.is_over)
        if status.is_over and self._is_of_here():
            self._wait_for_guardian()
        return status

    def wait_ready(self, timeout_s: float | None = None) -> RunStatus:
        """Wait until the run is ready (running, for a plan without probes) or over.

        Args:
            timeout_s: give up after so many seconds; the status then says `starting`. None waits forever.
        """
        return self._poll(timeout_s, lambda now: now.state not in {"starting", "stopping"})

    def _poll(self, timeout_s: float | None, is_enough: Callable[[RunStatus], bool]) -> RunStatus:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            status = self.status()
            if is_enough(status) or time.monotonic() >= deadline:
                return status
            time.sleep(self._poll_s)

    def _wait_for_guardian(self) -> None:
        deadline = time.monotonic() + _END_LIMIT_S
        while self._is_alive("guardian") and time.monotonic() < deadline:
            time.sleep(_POLL_S / 5)
            reap_guardians()

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
            where = (self.directory.read(self.directory.supervisor) or {}).get("hostname")
            raise LaunchError(f"{self.dir}: runs on host {where!r} or in another container: stop it there")
        if self.status().is_over:
            return self._sweep()
        self.ask_to_stop(grace_s)
        status = self.wait(self._patience_s(grace_s))
        if not status.is_over:
            # It was told and did not move, so it hangs or is frozen: its guardian does the rest.
            self._send("supervisor", signal.SIGKILL)
            status = self.wait(_END_LIMIT_S)
        return self._sweep() if status.is_over else status

    def ask_to_stop(self, grace_s: float | None = None) -> None:
        """Ask the run to end, and return at once; as for `stop`."""
        with contextlib.suppress(
            OSError
        ):  # a full disk must not keep a run alive: then the plan's own grace counts
            self.directory.write(self.directory.stop_request, {"grace_s": grace_s})
        self._send("supervisor", signal.SIGTERM)

    def _patience_s(self, grace_s: float | None) -> float:
        if grace_s is None:
            plan = self.directory.read(self.directory.plan) or {}
            grace_s = float(plan.get("stop", {}).get("grace_s", 30.0))
        return grace_s + _END_LIMIT_S

    def _send(self, role: str, signum: int) -> None:
        who = self.directory.read_identity(role)
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
        run_id = (self.directory.read(self.directory.supervisor) or {}).get("run_id")
        deadline = time.monotonic() + _END_LIMIT_S
        while run_id and (left := marked(run_id)) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(PermissionError):
                    process.send(signal.SIGKILL)
            time.sleep(_POLL_S)
        return self.status()

    def logs(self, *, follow: bool = False, last: int | None = None) -> Iterator[LogLine]:
        """Yield the log lines of every process.

        Args:
            follow: go on as lines are written, until the run is over.
            last: begin with so many lines of each process, 0 or more; None: with the first line.
        """
        plan = self.directory.read(self.directory.plan) or {}
        files = {entry["name"]: self._log_of(entry) for entry in plan.get("processes", ())}
        return follow_logs(files, lambda: self.status().is_over, last) if follow else read_logs(files, last)

    def _log_of(self, process: dict[str, str]) -> Path:
        host = process.get("host", LOCAL)
        directory = self.directory if host == LOCAL else self.directory.of_host(host)
        return directory.log(process["name"])

    def folders(self) -> tuple[Path, ...]:
        """Return where the files of the run are: its directory, or that of each host."""
        plan = self.directory.read(self.directory.plan) or {}
        targets = [entry["name"] for entry in plan.get("targets", ())]
        return tuple(self.directory.of_host(name).path for name in targets) or (self.dir,)


def launch(plan: Plan, run_dir: str | os.PathLike[str], *, detach: bool = True) -> Run:
    """Start a plan in a directory of its own; return once the supervisor has put itself on record.

    Args:
        plan: what to run, on this host or on the plan's targets.
        run_dir: made if missing; must not hold a run, not even one that is over.
        detach: let the run outlive the calling process. Otherwise it ends when the caller does, even by
            SIGKILL.

    Raises:
        LaunchRefused: the directory holds a run or cannot be written, or a port is taken.
        LaunchError: anything else that keeps it from starting, such as a host that cannot be reached; all
            hosts are named at once. Nothing is left behind in either case.
    """
    starting = Launch(plan, Path(run_dir).absolute())
    try:
        starting.begin()
        starting.complete(detach=detach)
    except BaseException:  # also Ctrl-C: whatever stops a launch, nothing may stay
        starting.undo()
        raise
    return starting.run


class Launch:
    """The steps of a launch, for those who have something to do between them."""

    def __init__(self, plan: Plan, run_dir: Path) -> None:
        self.run = Run(run_dir)
        self._plan = plan
        self._directory = RunDirectory(run_dir)
        self._claim = Claim(self._directory)
        self._start = Start(self._directory)

    def begin(self, run_id: str | None = None) -> None:
        """Take the directory and start the supervisor; `run_id` as for `Start.begin`.

        Raises:
            LaunchRefused: as for `launch`.
            LaunchError: as for `launch`.
        """
        take(self._claim, self.run, self._plan)
        self._start.begin(self._plan, run_id)

    def complete(self, *, detach: bool) -> None:
        """Say that the launch is complete, and let the run outlive this process or not."""
        if detach:
            self._start.let_go()
        else:
            self._start.keep()
        self._claim.settle()

    def undo(self) -> None:
        """End and take away whatever the steps so far have made."""
        if self._start.is_let_go:
            self.run.stop(grace_s=0.0)
        self._start.abort()
        self._claim.give_up(self.run.dir / "logs" / f"{p.name}.log" for p in self._plan.processes)


def take(claim: Claim, run: Run, plan: Plan) -> None:
    """Take a directory for a run.

    Raises:
        LaunchRefused: it holds a run, or cannot be written.
        LaunchError: the disk is full.
    """
    try:
        is_taken = not claim.take(plan.to_json())
    except OSError as error:
        # A full disk is nobody's wrong input; every other reason is the directory that was chosen.
        kind = LaunchError if error.errno in (errno.ENOSPC, errno.EDQUOT) else LaunchRefused
        raise kind(f"{run.dir}: cannot hold a run: {error.strerror}: choose another directory") from error
    if is_taken:
        state = run.status().state
        raise LaunchRefused(f"{run.dir}: holds a run already ({state}): choose a new directory for each run")


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
    return _at(directory.path)


def _at(path: Path) -> Run:
    if not (path / "slurm.json").exists():
        return Run(path)
    from flagscale_hw.slurm import SlurmRun

    return SlurmRun(path)


def list_runs() -> tuple[Run, ...]:
    """Return every known run of this user on this machine, the newest last."""
    return tuple(_at(path) for path in sorted(remembered(), key=_launched_at))


def _launched_at(path: Path) -> float:
    try:
        return (path / "plan.json").stat().st_mtime
    except OSError:
        return 0.0
