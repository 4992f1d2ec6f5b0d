"""The state of a run while it is written: kept by the supervisor, finished by the guardian if need be."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from flagscale_hw import index, manifest
from flagscale_hw.identity import identify, started_at
from flagscale_hw.order import Order, here
from flagscale_hw.rundir import RunDirectory
from flagscale_hw.status import ProcessStatus, RunState, RunStatus

__all__ = ["Record", "say"]

_FINAL_TRIES_S = 3.0


class Record:
    """A status that changes, and its copy on disk.

    A disk that is full never ends a run: the last good copy stays, and every later change tries again.
    """

    def __init__(self, directory: RunDirectory, status: RunStatus) -> None:
        self.directory = directory
        self.status = status
        self.is_saved = False
        self.endings: list[ProcessStatus] = []
        """Processes of the present attempt in the order in which they ended: the first is the cause."""

    def begin(self, order: Order) -> None:
        """Put the run and those who watch over it on record.

        Raises:
            OSError: the run directory cannot be written.
        """
        directory = self.directory
        directory.write(directory.manifest, manifest.begin(order, self.status.started_at))
        who = {"supervisor": identify(os.getpid()), "guardian": identify(os.getppid())}
        known = {role: identity.to_dict() for role, identity in who.items() if identity is not None}
        directory.write(directory.supervisor, {"run_id": order.run_id, **here(), **known})
        directory.write(directory.state, self.status.to_dict())
        if order.is_held:
            return  # a part of a run; the run itself is listed where it was launched
        try:
            index.remember(order.run_id, directory.path)
        except OSError as error:
            say(f"this run will not be listed: {error}")

    def change(self, state: RunState, reason: str = "") -> None:
        """Enter a state and save it."""
        self.status = replace(self.status, state=state, reason=reason)
        self.save()

    def restart(self) -> None:
        """Begin another attempt: no process has been started in it yet."""
        blank = [ProcessStatus(name=p.name, host=p.host) for p in self.status.processes]
        self.endings.clear()
        self.status = replace(
            self.status,
            restarts=self.status.restarts + 1,
            processes=tuple(blank),
        )

    def started(self, name: str, pid: int, *, restarts: int = 0) -> None:
        """Note that a process runs; how an earlier one of that name ended is forgotten."""
        self.endings = [ended for ended in self.endings if ended.name != name]
        self._put(
            ProcessStatus(
                name=name,
                restarts=restarts,
                pid=pid,
                start_time=started_at(pid),
                started_at=time.time(),
                started_monotonic_s=time.monotonic(),
            )
        )

    def ended(self, pid: int, wait_status: int) -> None:
        """Note how a child ended; children that are not planned processes are orphans and leave no trace."""
        code = os.waitstatus_to_exitcode(wait_status)
        for process in self.status.processes:
            if process.pid == pid and process.is_running:
                ended = replace(
                    process,
                    ended_at=time.time(),
                    ended_monotonic_s=time.monotonic(),
                    exit_code=code if code >= 0 else None,
                    signal=-code if code < 0 else None,
                )
                self._put(ended)
                self.endings.append(ended)

    def ready(self, name: str) -> None:
        """Note that a process has shown that it works."""
        for process in self.status.processes:
            if process.name == name:
                self._put(replace(process, ready_at=time.time()))
        self.save()

    def explain(self, name: str, cause: str) -> None:
        """Note why a process failed."""
        for process in self.status.processes:
            if process.name == name:
                self._put(replace(process, cause=cause))

    def take_over(self, host: str, processes: Iterable[ProcessStatus]) -> None:
        """Note how the processes of another host stand, as its own supervisor says."""
        known = {process.name: replace(process, host=host) for process in processes}
        self.status = replace(
            self.status, processes=tuple(known.get(p.name, p) for p in self.status.processes)
        )

    def adopt_ports(self, ports: Mapping[str, int]) -> None:
        """Note the ports that all hosts together have leased."""
        self.status = replace(self.status, ports=dict(ports))
        self.save()

    def lose(self, host: str) -> None:
        """Note that nobody will tell how the processes of a host ended."""
        self.status = replace(
            self.status,
            processes=tuple(
                replace(p, is_lost=True) if p.host == host and p.is_running else p
                for p in self.status.processes
            ),
        )

    def _put(self, changed: ProcessStatus) -> None:
        processes = tuple(changed if p.name == changed.name else p for p in self.status.processes)
        self.status = replace(self.status, processes=processes)

    def save(self) -> bool:
        """Write the status; False when the disk does not take it."""
        try:
            self.directory.write(self.directory.state, self.status.to_dict())
        except OSError as error:
            if self.is_saved:
                say(f"state.json: not written: {error}")
            self.is_saved = False
        else:
            self.is_saved = True
        return self.is_saved

    def finish(self, state: RunState, reason: str) -> bool:
        """Record the end, manifest first, so that whoever sees the end also sees a whole manifest.

        Returns:
            False when the disk did not take it for three seconds.
        """
        self.directory.release_reserve()
        self.status = replace(self.status, state=state, reason=reason, ended_at=time.time())
        deadline = time.monotonic() + _FINAL_TRIES_S
        while True:
            self._finish_manifest()
            if self.save():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    def _finish_manifest(self) -> None:
        begun = self.directory.read(self.directory.manifest)
        if begun is None:
            return
        try:
            self.directory.write(self.directory.manifest, manifest.complete(begun, self.status))
        except OSError as error:
            say(f"manifest.json: not written: {error}")


def say(text: str) -> None:
    """Speak to `supervisor.log`, which is the standard error of whoever keeps the record."""
    with contextlib.suppress(OSError):  # the disk is full: the very thing that may have to be said
        os.write(2, f"{text}\n".encode(errors="replace"))
