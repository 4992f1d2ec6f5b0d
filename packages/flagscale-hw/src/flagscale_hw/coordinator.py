"""The coordinator: leads one plan on many hosts, as the supervisor does on one.

    launcher -> guardian -> coordinator == ssh ==> agent of each host (`agent.py`)

All hosts are prepared before any starts: connections stand, directories are taken, ports are leased. Then all
are told every port and start. The first host that fails ends the run on the others, and which failure came
first is decided with what the others say, because a rank that lost its peer often fails sooner than the peer
is reported dead. A host that falls silent counts as failed; its agent notices the same and ends its part.

What does not live here: starting processes (`supervisor.py` on each host), the connections (`link.py`).
"""

from __future__ import annotations

import base64
import contextlib
import os
import resource
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flagscale_hw.attempts import TURN_S, Attempts
from flagscale_hw.cause import is_consequence
from flagscale_hw.channel import Message
from flagscale_hw.demands import Outcome
from flagscale_hw.ending import end_children, reap
from flagscale_hw.errors import LaunchError, LaunchRefused
from flagscale_hw.identity import MARKER
from flagscale_hw.link import SILENCE_S, Link
from flagscale_hw.order import Order
from flagscale_hw.plan import Plan
from flagscale_hw.probing import wait_any
from flagscale_hw.rundir import TOKEN, RunDirectory
from flagscale_hw.spawn import Command, spawn
from flagscale_hw.split import split
from flagscale_hw.status import RunStatus

__all__ = ["Coordinator"]

_PREPARE_LIMIT_S = 240.0
_SETTLE_S = 6.0
"""How long a failure that looks like the echo of another waits for that other one to be reported."""
_LATE_S = 15.0
_CONNECTING = 64
"""Connections that are being opened at the same time: jump hosts limit them, and so do process tables."""
_SHOWN = 8


class _Host:
    """One target and how far its part has got."""

    def __init__(self, rank: int, part: Plan, link: Link, directory: RunDirectory) -> None:
        self.rank = rank
        self.part = part
        self.link = link
        self.directory = directory
        self.token = secrets.token_hex(16)
        self.is_prepared = False
        self.ports: dict[str, int] = {}
        self.is_shared = True
        self.status: RunStatus | None = None
        self.is_over = False
        self.problem: Outcome | None = None

    @property
    def name(self) -> str:
        return self.link.target.name

    @property
    def is_done(self) -> bool:
        return self.is_over or self.problem is not None

    def may_bring(self, path: str) -> bool:
        """Tell whether a host may write to this file of ours: its logs and what the plan collects."""
        return path in {*(f"logs/{process.name}.log" for process in self.part.processes), *self.part.collect}


@dataclass(frozen=True)
class _Failure:
    host: str
    reason: str
    may_restart: bool = True


class Coordinator(Attempts):
    """One run on many hosts, from the first connection to the recorded end."""

    def __init__(self, directory: RunDirectory, order: Order, lifeline: int, guardian: int) -> None:
        super().__init__(directory, order, lifeline, guardian)
        self._hosts: list[_Host] = []
        self._failures: list[_Failure] = []
        self._failed_at = float("inf")

    # -- before the launcher is answered --------------------------------------------------------------------

    def prepare(self) -> None:
        """Reach every host and let it do all that can be refused.

        Raises:
            LaunchRefused: a port is taken, or a directory cannot be had; every such host is named.
            LaunchError: a host cannot be reached, or anything else.
            OSError: the run directory cannot be written.
        """
        self._demands.listen()
        _allow_many_handles(len(self._plan.targets))
        self._directory.logs.mkdir(exist_ok=True)
        self._directory.reserve()
        self._record.begin(self._order)
        problem = self._prepare_hosts()
        if problem is not None:
            raise LaunchRefused(problem.reason) if problem.state == "stopped" else LaunchError(problem.reason)

    def take_back(self) -> None:
        """Hang up, which lets every agent undo its part, and wait for the connections to end."""
        self._hang_up()
        with contextlib.suppress(OSError):
            for host in self._hosts:
                for path in (host.directory.path / TOKEN, host.link.log):
                    path.unlink(missing_ok=True)

    def _prepare_hosts(self, *, again: bool = False) -> Outcome | None:
        """Bring all hosts to where they only wait for the start; return why that cannot be."""
        self._hosts = list(self._make_hosts())
        self._failures.clear()
        self._failed_at = float("inf")
        waiting = list(self._hosts)
        deadline = time.monotonic() + _PREPARE_LIMIT_S
        while self._demands.outcome is None and time.monotonic() < deadline:
            connecting = [h for h in self._hosts if h.link.pid and not h.is_prepared and not h.problem]
            if not waiting and not connecting:
                break
            while waiting and len(connecting) < _CONNECTING:
                host = waiting.pop(0)
                self._connect(host, again=again)
                connecting.append(host)
            self._turn(TURN_S)
        return self._demands.outcome or self._unprepared()

    def _make_hosts(self) -> Iterator[_Host]:
        for rank, (target, part) in enumerate(zip(self._plan.targets, split(self._plan), strict=True)):
            directory = self._directory.of_host(target.name)
            yield _Host(rank, part, Link(target, directory.path.parent / f"{target.name}.ssh.log"), directory)

    def _connect(self, host: _Host, *, again: bool) -> None:
        host.directory.path.mkdir(parents=True, exist_ok=True)
        (host.directory.path / TOKEN).write_text(host.token, encoding="utf-8")
        try:
            host.link.open(self._start)
        except (OSError, LaunchError) as error:
            host.problem = Outcome("failed", str(error))
            return
        host.link.tell(
            {
                "do": "prepare",
                "plan": host.part.to_json(masked=False),
                "run_id": f"{self._order.run_id}.{host.rank}",
                "run_dir": str(host.directory.path),
                "token": host.token,
                "again": again,
            }
        )

    def _start(self, argv: Sequence[str], stdio: int, log: Path) -> int:
        environment = {**os.environ, MARKER: self._order.run_id}
        return spawn(
            Command(
                name=argv[0],
                argv=tuple(argv),
                env=environment,
                cwd=self._directory.path,
                log=log,
                stdio=stdio,
            )
        )

    def _unprepared(self) -> Outcome | None:
        bad = {host.name: host.problem for host in self._hosts if host.problem is not None}
        for host in self._hosts:
            if not host.is_prepared and host.problem is None:
                said = host.link.reason() if host.link.pid else "was not reached"
                bad[host.name] = Outcome("failed", f"not ready after {_PREPARE_LIMIT_S:g} s: {said}")
        if not bad:
            return None
        lines = [f"{name}: {problem.reason}" for name, problem in bad.items()]
        if len(lines) > _SHOWN:
            lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more hosts"]
        is_refusal = all(problem.state == "stopped" for problem in bad.values())
        return Outcome("stopped" if is_refusal else "failed", "\n".join(lines), may_restart=not is_refusal)

    # -- the run --------------------------------------------------------------------------------------------

    def _attempt(self) -> Outcome:
        """Tell all hosts to start and watch them until something ends the attempt."""
        if self._record.status.restarts:  # the first time they are prepared before the launcher is answered
            problem = self._demands.outcome or self._prepare_hosts(again=True)
            if problem is not None:
                return self._demands.outcome or Outcome("failed", problem.reason)
        ports = {name: number for host in self._hosts for name, number in host.ports.items()}
        self._record.adopt_ports(ports)
        for host in self._hosts:
            mentioned = {name: ports[name] for name in host.part.ports}
            host.link.tell({"do": "start", "ports": mentioned})
        while True:
            outcome = self._demands.outcome or self._judge()
            if outcome is not None:
                return outcome
            self._turn(TURN_S)

    def _turn(self, timeout_s: float) -> None:
        """Wait for something to happen, at most `timeout_s`, and take it in."""
        hosts = [host for host in self._hosts if host.link.is_open]
        ready = set(wait_any([*self._demands.handles, *(host.link.handle for host in hosts)], timeout_s))
        self._demands.take(ready)
        reap(lambda _pid, _wait_status: None)
        for host in hosts:
            host.link.keep_alive()
            if host.link.handle in ready:
                for message in host.link.hear():
                    self._take(host, message)
        for host in self._hosts:  # also those whose line broke while something was sent
            self._notice_loss(host)
        if not self._record.is_saved:
            self._record.save()

    def _notice_loss(self, host: _Host) -> None:
        if host.is_done or host.link.pid is None:
            return
        if not host.link.is_open:
            self._fail(
                host, f"connection lost: {host.link.reason()}" if host.is_prepared else host.link.reason()
            )
        elif host.is_prepared and host.link.is_silent:  # before, the agent's host may be busy: see the limit
            text = f"no sign of life for {SILENCE_S:g} s: the host is down, or the network between is cut"
            self._fail(host, text)
            host.link.close()

    def _fail(self, host: _Host, reason: str) -> None:
        host.problem = Outcome("failed", reason)
        self._record.lose(host.name)
        self._note_failure(_Failure(host.name, reason))

    def _note_failure(self, failure: _Failure) -> None:
        self._failures.append(failure)
        self._failed_at = min(self._failed_at, time.monotonic())

    def _take(self, host: _Host, message: Message) -> None:
        """Take in what an agent says; a message that makes no sense is passed over."""
        match message.get("said"):
            case "prepared":
                host.is_prepared = True
                host.ports, host.is_shared = dict(message["ports"]), bool(message["shared"])
            case "refused":
                host.problem = Outcome("stopped", str(message["text"]))
            case "problem":
                host.problem = Outcome("failed", str(message["text"]))
            case "status":
                self._take_status(host, RunStatus.from_dict(message["status"]))
            case "over":
                host.is_over = True
                self._take_status(host, RunStatus.from_dict(message["status"]))
            case "file":
                self._take_file(host, str(message["path"]), base64.b64decode(message["data"]))

    def _take_status(self, host: _Host, status: RunStatus) -> None:
        if status != host.status:
            host.status = status
            self._record.take_over(host.name, status.processes)
            self._record.is_saved = False
        if host.is_over and status.state in {"failed", "lost"}:
            self._note_failure(_Failure(host.name, status.reason))

    def _take_file(self, host: _Host, path: str, data: bytes) -> None:
        if host.is_shared or not host.may_bring(path):
            return
        place = host.directory.path / path
        with contextlib.suppress(OSError):  # a full disk here must not end the run there
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("ab") as file:
                file.write(data)

    # -- judging --------------------------------------------------------------------------------------------

    def _judge(self) -> Outcome | None:
        if self._failures:
            return self._judge_failures()
        states = [host.status.state if host.status else "starting" for host in self._hosts]
        if all(host.is_over for host in self._hosts):
            if all(state == "succeeded" for state in states):
                return Outcome("succeeded", "")
            ended = next(host for host in self._hosts if host.status and host.status.state != "succeeded")
            reason = ended.status.reason if ended.status else ""
            return Outcome("failed", f"{ended.name}: {reason}", may_restart=True)
        if self._record.status.state == "starting" and "starting" not in states:
            self._record.change("ready" if "ready" in states else "running")
        return None

    def _judge_failures(self) -> Outcome | None:
        """Choose the first cause: the earliest failure that is not the echo of a lost peer.

        Only echoes so far: the cause is still on its way, so wait a little for it.
        """
        causes = [failure for failure in self._failures if not is_consequence(failure.reason)]
        if not causes and time.monotonic() < self._failed_at + _SETTLE_S:
            return None
        chosen = (causes or self._failures)[0]
        return Outcome("failed", f"{chosen.host}: {chosen.reason}", may_restart=True)

    # -- ending ---------------------------------------------------------------------------------------------

    def _end(self, outcome: Outcome) -> str:
        """End the parts of all hosts; say which of them could not be seen to end, if any."""
        told_until = float("inf")
        if not all(host.is_over for host in self._hosts):
            self._record.change("stopping", outcome.reason)
        while any(not host.is_done for host in self._hosts):
            if self._demands.deadline < told_until:
                told_until = self._demands.deadline
                self._tell_to_stop(told_until - time.monotonic())
            if time.monotonic() > told_until + 2 * _LATE_S:
                break
            self._turn(TURN_S)
        unseen = [host for host in self._hosts if not host.is_over and host.is_prepared]
        for host in unseen:
            self._record.lose(host.name)
        self._hang_up()
        if not unseen:
            return ""
        names = ", ".join(host.name for host in unseen[:_SHOWN])
        return f"{names}: not seen to end; without a connection a host ends its part within {SILENCE_S:g} s"

    def _tell_to_stop(self, grace_s: float) -> None:
        for host in self._hosts:
            host.link.tell({"do": "stop", "grace_s": max(0.0, grace_s)})

    def _hang_up(self) -> None:
        for host in self._hosts:
            host.link.close()
        deadline = time.monotonic() + _LATE_S
        while reap(lambda _pid, _wait_status: None) and time.monotonic() < deadline:
            if all(host.is_done for host in self._hosts):
                break
            time.sleep(0.02)
        end_children(15, lambda: 0.0, lambda _pid, _wait_status: None)


def _allow_many_handles(num_hosts: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_hosts + 256
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))
