"""The supervisor: starts the processes of one plan, watches them, and leaves nothing behind.

    launcher - - - lifeline pipe - - - +
                                       v
    guardian (sub-reaper) --forks--> supervisor (sub-reaper, own session) --forks--> planned processes

The guardian (`guardian.py`) only waits for the supervisor and cleans up if it is killed. The supervisor ends
everything when a process fails, when it is asked to, when its launcher dies before having let go, and when
the guardian dies. It has one thread: it forks, and the parent-death signal of its children is bound to the
thread.

What does not live here: the directory (`rundir.py`), ending (`ending.py`), readiness (`probing.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from flagscale_hw import index, manifest
from flagscale_hw.cause import first_cause, last_lines
from flagscale_hw.ending import end_children, reap
from flagscale_hw.errors import LaunchError
from flagscale_hw.identity import MARKER, Identity, identify
from flagscale_hw.order import KEEP, LET_GO, Order, here
from flagscale_hw.plan import PLACEHOLDER, Probe, Process
from flagscale_hw.ports import PortLease, lease_ports
from flagscale_hw.probing import ProbeRun, wait_any
from flagscale_hw.record import Record, say
from flagscale_hw.rundir import RunDirectory
from flagscale_hw.spawn import Command, spawn
from flagscale_hw.status import ProcessStatus, RunState, RunStatus

__all__ = ["Supervisor", "main"]

SHORT_GRACE_S = 3.0
"""Patience where nobody asked for the end: with it nothing survives ten seconds."""

_BACKOFF_LIMIT_S = 30.0
_TURN_S = 1.0


@dataclass(frozen=True)
class _Outcome:
    """Why the run, or one attempt, is over."""

    state: RunState
    reason: str
    grace_s: float = SHORT_GRACE_S
    may_restart: bool = False


class Supervisor:
    """One run, from leased ports to the recorded end."""

    def __init__(self, directory: RunDirectory, order: Order, lifeline: int, guardian: int) -> None:
        self._directory = directory
        self._order = order
        self._plan = order.plan
        self._lifeline: int | None = lifeline
        self._guardian: int | None = guardian
        self._launcher = _watch(order.launcher)
        self._wake, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._leases: dict[str, PortLease] = {}
        self._placed: list[Path] = []
        self._probes: list[ProbeRun] = []
        self._log_starts: dict[str, int] = {}
        self._demand: _Outcome | None = None
        self._deadline = float("inf")
        self._is_asked_to_stop = False
        self._is_launched = False
        self._record = Record(directory, self._first_status())

    def _first_status(self) -> RunStatus:
        processes = tuple(ProcessStatus(name=process.name) for process in self._plan.processes)
        return RunStatus(state="starting", processes=processes, started_at=time.time())

    # -- before the launcher is answered --------------------------------------------------------------------

    def prepare(self) -> None:
        """Do all that can be refused: lease the ports, place the files, record who we are.

        Raises:
            LaunchError: a port is taken.
            OSError: the run directory cannot be written.
        """
        self._listen_to_signals()
        self._leases = lease_ports(self._plan.ports)
        ports = {name: lease.number for name, lease in self._leases.items()}
        self._record.status = replace(self._record.status, ports=ports)
        directory = self._directory
        directory.logs.mkdir(exist_ok=True)
        directory.reserve()
        self._place_files()
        directory.write(directory.manifest, manifest.begin(self._order, self._record.status.started_at))
        self._record_identities()
        directory.write(directory.state, self._record.status.to_dict())
        self._remember()

    def _place_files(self) -> None:
        for file in self._plan.files:
            place = self._directory.path / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("x", encoding="utf-8") as out:  # never over a file that was there before
                self._placed.append(place)
                out.write(self._fill(file.text))

    def take_back(self) -> None:
        """Take away the files of the plan, after a launch that was refused or broken off."""
        for place in self._placed:
            with contextlib.suppress(OSError):
                place.unlink()
                for folder in place.parents[: len(place.relative_to(self._directory.path).parts) - 1]:
                    folder.rmdir()  # refused by the system while anything else is in it

    def _record_identities(self) -> None:
        who = {"supervisor": identify(os.getpid()), "guardian": identify(os.getppid())}
        known = {role: identity.to_dict() for role, identity in who.items() if identity is not None}
        self._directory.write(self._directory.supervisor, {"run_id": self._order.run_id, **here(), **known})

    def _remember(self) -> None:
        try:
            index.remember(self._order.run_id, self._directory.path)
        except OSError as error:
            say(f"this run will not be listed: {error}")

    def _listen_to_signals(self) -> None:
        def note_stop(_signum: int, _frame: FrameType | None) -> None:
            self._is_asked_to_stop = True

        def note(_signum: int, _frame: FrameType | None) -> None:
            """Do nothing: the write to the wake pipe is what counts."""

        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, note_stop)
        signal.signal(signal.SIGINT, note_stop)
        signal.signal(signal.SIGCHLD, note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    # -- the run --------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run the plan to its end.

        Returns:
            0 when the end is on disk, 1 when the disk did not take it.
        """
        while True:
            outcome = self._attempt()
            left = self._end(outcome)
            if outcome.may_restart and not left and self._record.status.restarts < self._plan.max_restarts:
                self._pause_before_restart(outcome)
                if self._demand is None:
                    continue
                outcome = self._demand
            reason = "; ".join(part for part in (outcome.reason, left) if part)
            return 0 if self._record.finish(outcome.state, reason) else 1

    def _attempt(self) -> _Outcome:
        """Start everything once and watch it until something ends it."""
        try:
            for lease in self._leases.values():
                lease.hold()
            self._start_all()
        except (LaunchError, OSError) as error:
            return _Outcome("failed", str(error))
        self._probes = [ProbeRun(probe) for probe in self._filled_probes()]
        if not self._probes:
            self._record.change("running")
        while True:
            if self._demand is not None:
                return self._demand
            outcome = self._judge()
            if outcome is not None:
                return outcome
            self._turn(self._patience_s())

    def _start_all(self) -> None:
        commands = [self._command(process) for process in self._plan.processes]
        for name, lease in self._leases.items():
            if not any(_mentions(process, name) for process in self._plan.processes):
                lease.hand_over()
        for process, command in zip(self._plan.processes, commands, strict=True):
            for name, lease in self._leases.items():
                if _mentions(process, name):
                    lease.hand_over()
            self._log_starts[command.name] = command.log.stat().st_size if command.log.exists() else 0
            self._record.started(command.name, spawn(command))
        self._record.save()

    def _command(self, process: Process) -> Command:
        filled = {name: self._fill(value) for name, value in process.env.items()}
        return Command(
            name=process.name,
            argv=tuple(self._fill(word) for word in process.argv),
            env={**os.environ, **filled, MARKER: self._order.run_id},
            cwd=self._directory.path / self._fill(process.cwd),
            log=self._directory.log(process.name),
        )

    def _fill(self, text: str) -> str:
        return PLACEHOLDER.sub(
            lambda found: str(self._leases[found[1]].number) if found[1] else str(self._directory.path), text
        )

    def _filled_probes(self) -> list[Probe]:
        return [replace(probe, url=self._fill(probe.url)) for probe in self._plan.probes]

    def _turn(self, timeout_s: float) -> None:
        """Wait for something to happen, at most `timeout_s`, and take it in."""
        watched = [self._wake, *(probe.handle for probe in self._probes)]
        watched += [
            handle for handle in (self._lifeline, self._guardian, self._launcher) if handle is not None
        ]
        ready = wait_any(watched, timeout_s)
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._guardian in ready:
            self._guardian = None
            self._ask_to_end(_Outcome("failed", "the guardian of the run was killed"))
        if self._lifeline in ready:
            self._read_lifeline()
        if self._launcher in ready:
            self._lose_launcher()
        for probe in [probe for probe in self._probes if probe.handle in ready]:
            self._read_probe(probe)
        if self._is_asked_to_stop:
            self._is_asked_to_stop = False
            self._ask_to_end(_Outcome("stopped", "stopped on request", self._requested_grace_s()))
        reap(self._record.ended)
        if not self._record.is_saved:
            self._record.save()

    def _read_probe(self, probe: ProbeRun) -> None:
        before = probe.last_answer
        probe.read()
        if not probe.has_passed and probe.last_answer != before:
            self._record.change("starting", f"waiting for {probe.probe.url}: {probe.last_answer}")

    def _read_lifeline(self) -> None:
        if self._lifeline is None:
            return
        said = os.read(self._lifeline, 1)
        self._is_launched = self._is_launched or said in {LET_GO, KEEP}
        if said == KEEP:
            return
        os.close(self._lifeline)
        self._lifeline = None
        if said == LET_GO:
            self._launcher = None
        else:
            self._lose_launcher()

    def _lose_launcher(self) -> None:
        self._launcher = None
        if not self._is_launched:
            self.take_back()
        pid = self._order.launcher.pid
        self._ask_to_end(_Outcome("failed", f"its launcher (pid {pid}) ended before the run did"))

    def _requested_grace_s(self) -> float:
        request = self._directory.read(self._directory.stop_request) or {}
        grace_s = request.get("grace_s")
        return float(grace_s) if isinstance(grace_s, int | float) else self._plan.stop.grace_s

    def _ask_to_end(self, outcome: _Outcome) -> None:
        """Keep the first demand as the reason; a later one can only shorten the patience."""
        self._demand = self._demand or outcome
        self._deadline = min(self._deadline, time.monotonic() + outcome.grace_s)

    # -- judging --------------------------------------------------------------------------------------------

    def _judge(self) -> _Outcome | None:
        """Say whether this attempt is over, from what is known now."""
        for ended in self._record.endings:
            if ended.exit_code != 0:
                return _Outcome("failed", self._reason_of(ended), may_restart=True)
        waiting = [probe for probe in self._probes if not probe.has_passed]
        if len(self._record.endings) == len(self._plan.processes):
            if waiting:
                last = self._record.endings[-1]
                return _Outcome("failed", f"{self._reason_of(last)} (before it was ready)", may_restart=True)
            return _Outcome("succeeded", "")
        late = [probe for probe in waiting if time.monotonic() > probe.deadline]
        if late:
            return _Outcome("failed", self._reason_of_late(late[0]), may_restart=True)
        if self._probes and not waiting:
            for probe in self._probes:
                probe.close()
            self._probes.clear()
            self._record.change("ready")
        return None

    def _patience_s(self) -> float:
        deadlines = [probe.deadline - time.monotonic() for probe in self._probes]
        return max(0.0, min([_TURN_S, *deadlines]))

    def _reason_of(self, ended: ProcessStatus) -> str:
        cause = first_cause(self._directory.log(ended.name), offset=self._log_starts.get(ended.name, 0))
        if ended.signal is None:
            text = f"{ended.name}: exited with code {ended.exit_code}"
        else:
            text = f"{ended.name}: killed by signal {ended.signal} ({_signal_name(ended.signal)})"
            if ended.signal == signal.SIGKILL:
                text += ", which this run did not send; the kernel does when memory is short"
        return f"{text}: {cause}" if cause else text

    def _reason_of_late(self, probe: ProbeRun) -> str:
        asked = probe.probe
        text = f"not ready after {asked.timeout_s:g} s: {asked.url} answered last: {probe.last_answer}"
        for process in self._plan.processes:
            lines = last_lines(
                self._directory.log(process.name), 3, offset=self._log_starts.get(process.name, 0)
            )
            if lines:
                text += f"; last log lines of {process.name}: " + " | ".join(line.strip() for line in lines)
        return text

    # -- ending ---------------------------------------------------------------------------------------------

    def _end(self, outcome: _Outcome) -> str:
        """End every process below us; say what could not be ended, if anything."""
        self._deadline = min(self._deadline, time.monotonic() + outcome.grace_s)
        for probe in self._probes:
            probe.close()
        self._probes.clear()
        if reap(self._record.ended):
            self._record.change("stopping", outcome.reason)
            left = end_children(
                signal.Signals[self._plan.stop.signal], self._grace_left_s, self._record.ended
            )
            if left:
                pids = ", ".join(str(process.pid) for process in left)
                return f"{len(left)} processes could not be killed (pid {pids}): they wait inside the kernel"
        if self._demand is None:
            self._deadline = float("inf")
        return ""

    def _grace_left_s(self) -> float:
        self._turn(0.0)
        return self._deadline - time.monotonic()

    def _pause_before_restart(self, outcome: _Outcome) -> None:
        self._record.restart()
        count = self._record.status.restarts
        self._record.change(
            "starting", f"restart {count} of {self._plan.max_restarts} after: {outcome.reason}"
        )
        until = time.monotonic() + min(2.0 ** (count - 1), _BACKOFF_LIMIT_S)
        while self._demand is None and time.monotonic() < until:
            self._turn(until - time.monotonic())


def _mentions(process: Process, port: str) -> bool:
    needle = f"{{port:{port}}}"
    return any(needle in text for text in (*process.argv, *process.env.values()))


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return "unnamed"


def _watch(process: Identity) -> int | None:
    """Return a handle that becomes readable when the process ends; None where the kernel has none."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return None  # the lifeline alone will tell
    if not process.is_alive():
        os.close(handle)
        return None
    return handle


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m flagscale_hw.supervisor RUN_DIR`, which only `flagscale_hw.launch` does."""
    from flagscale_hw.guardian import guard

    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1:
        say("flagscale_hw.supervisor: give one run directory; flagscale_hw.launch starts it, not a person")
        return 2
    return guard(Path(arguments[0]))


if __name__ == "__main__":
    raise SystemExit(main())
