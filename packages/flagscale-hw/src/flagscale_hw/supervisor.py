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
from dataclasses import replace
from pathlib import Path

from flagscale_hw.attempts import TURN_S, Attempts
from flagscale_hw.cause import first_cause, last_lines
from flagscale_hw.demands import Outcome
from flagscale_hw.ending import end_children, reap
from flagscale_hw.errors import LaunchError
from flagscale_hw.identity import MARKER, session_members
from flagscale_hw.logs import set_aside
from flagscale_hw.order import Order
from flagscale_hw.placeholders import placeholders, substitute
from flagscale_hw.plan import Probe, Process
from flagscale_hw.ports import PortLease, lease_ports
from flagscale_hw.probing import ProbeRun, wait_any
from flagscale_hw.record import say
from flagscale_hw.restarting import Restarts
from flagscale_hw.rundir import RunDirectory
from flagscale_hw.spawn import Command, spawn
from flagscale_hw.status import ProcessStatus
from flagscale_hw.target import LOCAL

__all__ = ["Supervisor", "main"]

_LOG_LOOK_S = 5.0


class Supervisor(Attempts):
    """One run on this host, from leased ports to the recorded end."""

    def __init__(self, directory: RunDirectory, order: Order, lifeline: int, guardian: int) -> None:
        super().__init__(directory, order, lifeline, guardian)
        self._leases: dict[str, PortLease] = {}
        self._numbers: dict[str, int] = {}
        self._placed: list[Path] = []
        self._probes: list[ProbeRun] = []
        self._watches: list[ProbeRun] = []
        self._services = {process.name for process in self._plan.processes if process.is_service}
        self._restarts = Restarts(())
        self._was_ready = False
        self._log_starts: dict[str, int] = {}
        self._next_log_look = 0.0

    # -- before the launcher is answered --------------------------------------------------------------------

    def prepare(self) -> None:
        """Do all that can be refused: lease the ports, place the files, record who we are.

        Raises:
            LaunchError: a port is taken.
            OSError: the run directory cannot be written.
        """
        self._demands.listen()
        own = {
            name: number for name, number in self._plan.ports.items() if self._plan.owner_of(name) == LOCAL
        }
        self._leases = lease_ports(own)
        self._numbers = {name: lease.number for name, lease in self._leases.items()}
        self._record.status = replace(self._record.status, ports=dict(self._numbers))
        directory = self._directory
        directory.logs.mkdir(exist_ok=True)
        directory.reserve()
        self._place_files()
        self._record.begin(self._order)

    def _place_files(self) -> None:
        for file in self._plan.files:
            place = self._directory.path / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("x", encoding="utf-8") as out:  # never over a file that was there before
                self._placed.append(place)
                # A port of another host is not known yet; such a file is written again when it is.
                out.write(self._fill(file.text))

    def take_back(self) -> None:
        """Take away the files of the plan, after a launch that was refused or broken off."""
        for place in self._placed:
            with contextlib.suppress(OSError):
                place.unlink()
                for folder in place.parents[: len(place.relative_to(self._directory.path).parts) - 1]:
                    folder.rmdir()  # refused by the system while anything else is in it

    # -- the run --------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run the plan to its end; see `Attempts.run`."""
        self._wait_for_launch()
        return super().run()

    def _may_try_again(self, outcome: Outcome, left: str) -> bool:
        return not left and super()._may_try_again(outcome, left)  # what is left holds its device

    def _wait_for_launch(self) -> None:
        """Where other hosts have a part in the run, wait until all of them are prepared."""
        if not self._order.is_held:
            return
        while not self._demands.is_launched and self._demands.outcome is None:
            self._turn(TURN_S)
        others = self._directory.read(self._directory.ports) or {}
        self._numbers = {**others, **self._numbers}
        for file in self._plan.files:
            (self._directory.path / file.path).write_text(self._fill(file.text), encoding="utf-8")

    def _attempt(self) -> Outcome:
        """Start everything once and watch it until something ends it."""
        if (demanded := self._demands.outcome) is not None:
            return demanded
        try:
            for lease in self._leases.values():
                lease.hold()
            self._start_all()
        except (LaunchError, OSError) as error:
            return Outcome("failed", str(error))
        self._restarts, self._was_ready = Restarts(self._plan.processes), False
        self._probes = [ProbeRun(probe) for probe in self._filled(self._plan.probes)]
        if not self._probes:
            self._record.change("running")
        while True:
            outcome = self._demands.outcome or self._start_again() or self._judge()
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
        def value_of(kind: str, name: str) -> str | None:
            if kind == "port":
                number = self._numbers.get(name)
                return None if number is None else str(number)
            return {"run_dir": str(self._directory.path), "own_address": "127.0.0.1"}.get(kind, "0")

        return substitute(text, value_of)

    def _filled(self, probes: Sequence[Probe]) -> list[Probe]:
        return [replace(probe, url=self._fill(probe.url)) for probe in probes]

    def _turn(self, timeout_s: float) -> None:
        """Wait for something to happen, at most `timeout_s`, and take it in."""
        asked = [*self._probes, *self._watches]
        ready = wait_any([*self._demands.handles, *(probe.handle for probe in asked)], timeout_s)
        self._demands.take(ready)
        if self._demands.is_abandoned:
            self.take_back()
        for probe in [probe for probe in self._probes if probe.handle in ready]:
            self._read_probe(probe)
        for watch in [watch for watch in self._watches if watch.handle in ready]:
            watch.read()
        reap(self._record.ended)
        self._set_long_logs_aside()
        if not self._record.is_saved:
            self._record.save()

    def _read_probe(self, probe: ProbeRun) -> None:
        before, had_passed = probe.last_answer, probe.has_passed
        probe.read()
        if probe.has_passed:
            name = probe.probe.process
            is_last = all(one.has_passed for one in self._probes if one.probe.process == name)
            if name is not None and not had_passed and is_last:
                self._record.ready(name)
        elif probe.last_answer != before and not self._was_ready:
            self._record.change("starting", f"waiting for {probe.probe.url}: {probe.last_answer}")

    def _set_long_logs_aside(self) -> None:
        """Keep a chatty process from filling the disk: at most twice the limit is kept of each log."""
        if time.monotonic() < self._next_log_look:
            return
        self._next_log_look = time.monotonic() + _LOG_LOOK_S
        for process in self._plan.processes:
            if set_aside(self._directory.log(process.name), self._plan.log_limit_bytes):
                self._log_starts[process.name] = 0

    # -- judging --------------------------------------------------------------------------------------------

    def _judge(self) -> Outcome | None:
        """Say whether this attempt is over, from what is known now."""
        waiting = [probe for probe in self._probes if not probe.has_passed]
        over = self._judge_endings(waiting) or self._judge_late(waiting)
        if over is None:
            if self._is_up():
                self._enter_ready()
            self._end_the_silent()
        return over

    def _judge_endings(self, waiting: Sequence[ProbeRun]) -> Outcome | None:
        for ended in self._record.endings:
            if self._restarts.is_waiting(ended.name):
                continue
            governed = self._was_ready and self._restarts.governs(ended.name)
            if governed and self._rest(ended):
                continue
            if governed or self._has_failed(ended):
                self._explain_endings()
                return Outcome("failed", self._reason_of(ended), may_restart=True)
        if len(self._record.endings) < len(self._plan.processes) or self._restarts.next_due is not None:
            return None
        if waiting:
            last = self._record.endings[-1]
            return Outcome("failed", f"{self._reason_of(last)} (before it was ready)", may_restart=True)
        return Outcome("succeeded", "")

    def _has_failed(self, ended: ProcessStatus) -> bool:
        return ended.exit_code != 0 or ended.name in self._services

    def _judge_late(self, waiting: Sequence[ProbeRun]) -> Outcome | None:
        for late in [probe for probe in waiting if time.monotonic() > probe.deadline]:
            name = late.probe.process
            if not (self._was_ready and name is not None and self._restarts.governs(name)):
                return Outcome("failed", self._reason_of_late(late), may_restart=True)
            self._kill(name)
            self._forget_probes(name)
        return None

    def _enter_ready(self) -> None:
        for probe in self._probes:
            probe.close()
        self._probes.clear()
        self._record.change("ready")
        if not self._was_ready:
            self._was_ready = True
            self._watches = [ProbeRun(watch, for_ever=True) for watch in self._filled(self._plan.watches)]

    def _is_up(self) -> bool:
        """Tell whether everything has just become ready, for the first time or again."""
        if self._record.status.state != "starting" or not self._plan.probes:
            return False
        if any(not probe.has_passed for probe in self._probes):
            return False
        asked = {probe.process for probe in self._plan.probes}
        told = {one.name for one in self._record.status.processes if one.ready_at is not None}
        return self._restarts.next_due is None and asked - told <= {None}

    # -- one process alone ----------------------------------------------------------------------------------

    def _rest(self, ended: ProcessStatus) -> bool:
        """Let a process that has ended start again after a pause; False when it did so too often."""
        pause = self._restarts.schedule(ended.name, time.monotonic())
        if pause is None:
            return False
        reason = self._reason_of(ended)
        self._kill_session(ended.pid)  # its children would keep its port and its device
        self._forget_probes(ended.name)
        self._record.change(
            "starting", f"{ended.name}: {self._restarts.describe(ended.name)}, after: {reason}"
        )
        say(f"{reason}; it starts again in {pause:g} s")
        return True

    def _start_again(self) -> Outcome | None:
        """Start the processes whose pause is over."""
        for name in self._restarts.take_due(time.monotonic()):
            (process,) = (one for one in self._plan.processes if one.name == name)
            (before,) = (one for one in self._record.status.processes if one.name == name)
            command = self._command(process)
            self._log_starts[name] = command.log.stat().st_size if command.log.exists() else 0
            try:
                self._record.started(name, spawn(command), restarts=before.restarts + 1)
            except (LaunchError, OSError) as error:
                return Outcome("failed", str(error))
            self._record.save()
            probes = [probe for probe in self._plan.probes if probe.process == name]
            self._probes += [ProbeRun(probe) for probe in self._filled(probes)]
        return None

    def _end_the_silent(self) -> None:
        """Kill the processes whose watch has not passed for too long."""
        ready = {one.name for one in self._record.status.processes if one.is_running and one.ready_at}
        for watch in self._watches:
            if watch.probe.process not in ready:
                watch.deadline = time.monotonic() + watch.probe.timeout_s
            elif time.monotonic() > watch.deadline:
                asked = watch.probe
                say(f"{asked.process}: no good answer for {asked.timeout_s:g} s from {asked.url}")
                self._kill(str(asked.process))

    def _forget_probes(self, name: str) -> None:
        for probe in [probe for probe in self._probes if probe.probe.process == name]:
            probe.close()
            self._probes.remove(probe)

    def _kill(self, name: str) -> None:
        for process in self._record.status.processes:
            if process.name == name and process.is_running:
                self._kill_session(process.pid)

    @staticmethod
    def _kill_session(pid: int | None) -> None:
        for process in session_members(pid) if pid is not None else ():
            with contextlib.suppress(PermissionError):
                process.send(signal.SIGKILL)

    def _explain_endings(self) -> None:
        for ended in self._record.endings:
            if self._has_failed(ended):
                self._record.explain(ended.name, self._cause_of(ended.name))

    def _cause_of(self, name: str) -> str:
        return first_cause(self._directory.log(name), offset=self._log_starts.get(name, 0))

    def _patience_s(self) -> float:
        deadlines = [probe.deadline - time.monotonic() for probe in (*self._probes, *self._watches)]
        if (due := self._restarts.next_due) is not None:
            deadlines.append(due - time.monotonic())
        return max(0.0, min([TURN_S, *deadlines]))

    def _reason_of(self, ended: ProcessStatus) -> str:
        cause = self._cause_of(ended.name)
        if ended.signal is None:
            text = f"{ended.name}: exited with code {ended.exit_code}"
            if ended.exit_code == 0 and ended.name in self._services:
                text += ", although nobody had stopped it"
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

    def _end(self, outcome: Outcome) -> str:
        """End every process below us; say what could not be ended, if anything."""
        for probe in (*self._probes, *self._watches):
            probe.close()
        self._probes.clear()
        self._watches.clear()
        if reap(self._record.ended):
            self._record.change("stopping", outcome.reason)
            left = end_children(
                signal.Signals[self._plan.stop.signal], self._grace_left_s, self._record.ended
            )
            if left:
                pids = ", ".join(str(process.pid) for process in left)
                return f"{len(left)} processes could not be killed (pid {pids}): they wait inside the kernel"
        return ""

    def _grace_left_s(self) -> float:
        self._turn(0.0)
        return self._demands.deadline - time.monotonic()


def _mentions(process: Process, port: str) -> bool:
    texts = (*process.argv, *process.env.values())
    return any(("port", port) in placeholders(text) for text in texts)


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return "unnamed"


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
