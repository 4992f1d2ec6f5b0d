"""Look at many hosts at once, before anything starts on them, and say what stands in the way.

    nodes = find_nodes(listed, SurveyRequest(folder="/exp", packages=("torch",)))

or, to go on with what is there,

    reports = survey(targets, SurveyRequest(folder="/exp", packages=("torch",)))
    for obstacle in judge(reports): ...

Every host is asked over one connection of its own, all at the same time.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagscale_hw.errors import HostsNotReady
from flagscale_hw.hostfile import HostEntry
from flagscale_hw.link import Link
from flagscale_hw.machine import Machine
from flagscale_hw.probing import wait_any
from flagscale_hw.target import Target

__all__ = ["HostReport", "Node", "Obstacle", "SurveyRequest", "find_nodes", "judge", "survey"]

_LIMIT_S = 120.0
_CONNECTING = 64
_SKEW_LIMIT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class SurveyRequest:
    """What to ask every host."""

    folder: str | None = None
    """Absolute; where the run will write, made here if missing. Asked: may a host write, does it share it?"""
    python: str | None = None
    """Interpreter whose packages are asked for."""
    packages: tuple[str, ...] = ()
    """Distributions that must be there, in one version everywhere."""
    paths: tuple[str, ...] = ()
    """Absolute; files and folders that must exist."""
    ports: tuple[int, ...] = ()
    """Numbers that must be free on the first host."""


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """What one host said; `problem` alone when it could not be asked."""

    target: Target
    problem: str = ""
    machine: Machine | None = None
    address: str | None = None
    """From which it reaches the first host."""
    interface: str | None = None
    """To which that address belongs."""
    clock_skew_s: float | None = None
    """How far its clock is ahead of ours; the time of the answer's way is in it."""
    is_shared: bool | None = None
    """Whether it sees our folder; None when there was none to ask about."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Of `python` and the packages; None: not there."""
    hurdles: tuple[str, ...] = ()
    """Each as one sentence: unknown names, missing paths, busy ports, a folder that cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """Something in the way, and what to do."""

    target: str
    text: str
    is_fatal: bool = True

    def __str__(self) -> str:
        return f"{self.target}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host of a run, as it was found or promised."""

    target: Target
    machine: Machine
    slots: int | None = None
    """Processes that the hostfile allows; None: no limit but the machine's."""
    type: str | None = None
    """Label of its kind of device in the hostfile."""
    interface: str | None = None
    """Network interface by which it reaches the first host."""


def find_nodes(
    listed: Sequence[tuple[Target, HostEntry]],
    request: SurveyRequest = SurveyRequest(),
    *,
    needs_shared: bool = False,
) -> tuple[Node, ...]:
    """Look at the hosts of a run; what is no obstacle is said on standard error, for people wait here.

    Args:
        listed: how each host is reached, and its line of the hostfile.
        request: what each host must have.
        needs_shared: the run works only where all hosts share the folder.

    Returns:
        The hosts in the given order.

    Raises:
        HostsNotReady: a host cannot be reached or used; every obstacle is named.
    """
    reports = survey([target for target, _ in listed], request)
    obstacles = judge(reports, needs_shared=needs_shared)
    for obstacle in obstacles:
        if not obstacle.is_fatal:
            print(f"warning: {obstacle}", file=sys.stderr)  # noqa: T201
    fatal = [str(obstacle) for obstacle in obstacles if obstacle.is_fatal]
    if fatal:
        raise HostsNotReady("not every host is ready:\n" + "\n".join(fatal))
    return tuple(
        Node(
            target=report.target,
            machine=report.machine,
            slots=entry.slots,
            type=entry.type,
            interface=report.interface,
        )
        for report, (_, entry) in zip(reports, listed, strict=True)
        if report.machine is not None
    )


def survey(targets: Sequence[Target], request: SurveyRequest = SurveyRequest()) -> tuple[HostReport, ...]:
    """Ask all hosts; one that cannot be asked gives a report with its problem, never an exception."""
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flagscale-")))
        token = _place_token(request.folder, stack)
        asking = _Asking(targets, request, token, logs)
        stack.callback(asking.close)
        return asking.reports()


def _place_token(folder: str | None, stack: contextlib.ExitStack) -> dict[str, str] | None:
    if folder is None:
        return None
    token = {"name": f".flagscale-{secrets.token_hex(6)}", "text": secrets.token_hex(16)}
    place = Path(folder) / token["name"]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(token["text"], encoding="utf-8")
    stack.callback(place.unlink, missing_ok=True)
    return token


class _Asking:
    def __init__(
        self, targets: Sequence[Target], request: SurveyRequest, token: dict[str, str] | None, logs: Path
    ) -> None:
        self._request = request
        self._token = token
        self._head = targets[0].reached_as if targets else ""
        self._links = [Link(target, logs / f"{number}.log") for number, target in enumerate(targets)]
        self._children: list[subprocess.Popen[bytes]] = []
        self._answers: dict[int, HostReport] = {}

    def reports(self) -> tuple[HostReport, ...]:
        deadline = time.monotonic() + _LIMIT_S
        waiting = list(range(len(self._links)))
        open_now: set[int] = set()
        while (waiting or open_now) and time.monotonic() < deadline:
            while waiting and len(open_now) < _CONNECTING:
                number = waiting.pop(0)
                self._open(number)
                open_now.add(number)
            self._turn(open_now)
            open_now -= self._answers.keys()
        return tuple(
            self._answers.get(number) or HostReport(target=link.target, problem=f"no answer: {link.reason()}")
            for number, link in enumerate(self._links)
        )

    def _open(self, number: int) -> None:
        link = self._links[number]
        try:
            link.open(self._start)
        except OSError as error:
            self._answers[number] = HostReport(
                target=link.target, problem=f"cannot start ssh: {error.strerror}"
            )
            return
        asked = self._request
        link.tell(
            {
                "do": "survey",
                "head": self._head,
                "ports": asked.ports if number == 0 else (),
                "python": asked.python,
                "packages": asked.packages,
                "paths": asked.paths,
                "folder": asked.folder,
                "token": self._token,
            }
        )

    def _start(self, argv: Sequence[str], stdio: int, log: Path) -> int:
        with log.open("ab") as errors:
            child = subprocess.Popen(
                argv, stdin=stdio, stdout=stdio, stderr=errors, start_new_session=True, cwd="/"
            )
        self._children.append(child)
        return child.pid

    def _turn(self, open_now: set[int]) -> None:
        links = {self._links[number].handle: number for number in open_now if self._links[number].is_open}
        for handle in wait_any(list(links), 1.0):
            number = links[handle]
            for message in self._links[number].hear():
                self._take(number, message)
        for number in open_now - self._answers.keys():
            link = self._links[number]
            link.keep_alive()
            if not link.is_open:
                self._answers[number] = HostReport(target=link.target, problem=link.reason())

    def _take(self, number: int, message: Mapping[str, Any]) -> None:
        target = self._links[number].target
        if message.get("said") == "survey":
            self._answers[number] = _report(target, message["found"], time.time())
        elif message.get("said") in {"refused", "problem"}:
            self._answers[number] = HostReport(target=target, problem=str(message["text"]))

    def close(self) -> None:
        for link in self._links:
            link.close()
        deadline = time.monotonic() + 5.0
        for child in self._children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _report(target: Target, found: Mapping[str, Any], now: float) -> HostReport:
    hurdles = [found["unreachable"]] if found["unreachable"] else []
    hurdles += [f"{path}: not there" for path in found["missing_paths"]]
    hurdles += [f"port {number}: in use by {who}" for number, who in found["busy_ports"].items()]
    hurdles += [found["unwritable"]] if found["unwritable"] else []
    return HostReport(
        target=target,
        machine=Machine.from_dict(found["machine"]),
        address=found["address"],
        interface=found["interface"],
        clock_skew_s=found["time"] - now,
        is_shared=found["is_shared"],
        versions=found["versions"],
        hurdles=tuple(hurdles),
    )


def judge(reports: Sequence[HostReport], *, needs_shared: bool = False) -> tuple[Obstacle, ...]:
    """Say what stands in the way, for all hosts at once, each with what to do.

    Args:
        reports: of all hosts of one run.
        needs_shared: the run works only where all hosts share the folder.
    """
    obstacles = [Obstacle(target=one.target.name, text=one.problem) for one in reports if one.problem]
    seen = [one for one in reports if not one.problem]
    for report in seen:
        obstacles += _obstacles_of(report, needs_shared=needs_shared, is_alone=len(reports) == 1)
    return (*obstacles, *_differences(seen))


def _obstacles_of(report: HostReport, *, needs_shared: bool, is_alone: bool) -> Iterator[Obstacle]:
    name = report.target.name
    for hurdle in report.hurdles:
        yield Obstacle(target=name, text=hurdle)
    is_itself = report.address is not None and report.address.startswith("127.")
    if is_itself and report.target.transport == "ssh" and not is_alone:
        yield Obstacle(
            target=name,
            text=f"reaches the first host by {report.address}, which other hosts cannot: the name of the "
            "first host means this host itself in /etc/hosts: write an address into the hostfile",
        )
    if needs_shared and report.is_shared is False:
        yield Obstacle(
            target=name,
            text="does not see the experiment's directory of this host: mount it there, or set "
            "experiment.runner.no_shared_fs=true",
        )
    skew = report.clock_skew_s
    if skew is not None and abs(skew) > _SKEW_LIMIT_S:
        text = (
            f"its clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}: start a time service there"
        )
        yield Obstacle(target=name, text=text, is_fatal=False)


def _differences(reports: Sequence[HostReport]) -> Iterator[Obstacle]:
    """Say which hosts lack a package or have another version than most."""
    for name in sorted({name for report in reports for name in report.versions}):
        versions = {report.target.name: report.versions.get(name) for report in reports}
        found = Counter(version for version in versions.values() if version is not None)
        usual = found.most_common(1)[0][0] if found else None
        for host, version in versions.items():
            if version is None and (name == "python" or usual is not None or not found):
                yield Obstacle(target=host, text=_absent(name, usual))
            elif version != usual:
                text = f"{name} {version}: most hosts have {usual}: install the same version everywhere"
                yield Obstacle(target=host, text=text)


def _absent(name: str, usual: str | None) -> str:
    if name == "python":
        return "the interpreter of the run is not there or does not work: install it at the same path"
    return f"{name}: not installed" + (f": install {usual} as on the other hosts" if usual else "")
