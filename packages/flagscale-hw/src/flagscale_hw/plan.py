"""The plan: everything a launch needs, decided, as frozen data.

A plan is made by a pure function and started by `flagscale_hw.launch`; nothing is decided between the two.
What only the host can know (a free port, the run directory) stands in it as a placeholder; see
`placeholders.py`.

What does not live here: starting, watching and stopping (`runs.py`, `supervisor.py`).
"""

from __future__ import annotations

import json
import math
import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flagscale_hw.errors import InvalidPlan
from flagscale_hw.placeholders import placeholders
from flagscale_hw.target import LOCAL, Target, problems_of_target

__all__ = ["File", "Plan", "Probe", "Process", "StopPolicy", "render_json"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_NAME_LIMIT = 100
_PORT_NAME = re.compile(r"[a-z0-9_-]+")
_OWN_FILES = frozenset(
    {"plan.json", "manifest.json", "state.json", "supervisor.json", "supervisor.log", "stop.json", "logs"}
    | {"hosts", "ports.json"}
)
_LOG_LIMIT_BYTES = 512 << 20
_LATER: Mapping[str, Any] = {
    "targets": (),
    "port_hosts": {},
    "collect": (),
    "log_limit_bytes": _LOG_LIMIT_BYTES,
    "watches": (),
}
"""Fields that the text of a plan leaves out while they say nothing."""
_MASKED_INSIDE = 6
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process to start on one host."""

    name: str
    """Unique in the plan; names its log file. Lower case letters, digits, `_ . -`."""
    argv: tuple[str, ...]
    """Executed as it is, never through a shell."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the launcher; a value wins over an inherited one."""
    cwd: str = "{run_dir}"
    host: str = LOCAL
    """Name of one of the plan's targets; `local` in a plan that has none."""
    rank: int | None = None
    max_restarts: int = 0
    """How often within ten minutes this process alone is started again when it has ended, while the others go
    on. Only in a run that has been ready: what ends before was never right."""
    is_service: bool = False
    """It goes on until the run is stopped: if it ends by itself it has failed, with exit code 0 too."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A small text file placed in the run directory before anything starts."""

    path: str
    """Relative to the run directory, without `..`."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How to know that a run is ready: one HTTP request that must answer with a certain JSON value.

    A status of 200 alone proves nothing (servers answer `/health` before they can generate), so `expect`
    names a path in the JSON body, such as `usage.completion_tokens` or `choices.0.text`, that must exist
    and be neither null, 0 nor empty.
    """

    url: str
    method: str = "GET"
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    expect: str | None = None
    interval_s: float = 0.5
    request_timeout_s: float = 60.0
    timeout_s: float = 600.0
    process: str | None = None
    """The process that it is about.

    It is ready when all of its probes have passed, and they are asked again when it was started again. In
    `watches` it is the one to end.
    """


@dataclass(frozen=True, kw_only=True)
class StopPolicy:
    """How a run ends: the signal asked for first, then SIGKILL for everything left after `grace_s`."""

    signal: str = "SIGTERM"
    grace_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run. Same experiment and same machines give the same plan, byte for byte.

    Raises:
        InvalidPlan: two processes share a name, a placeholder names a port that is not leased, a file would
            be written outside the run directory, or anything else in it could not be done as written.
    """

    kind: str
    """What made it: `train`, `serve`, ..."""
    name: str
    """The experiment's name, for people."""
    processes: tuple[Process, ...]
    files: tuple[File, ...] = ()
    ports: Mapping[str, int | None] = field(default_factory=dict)
    """Ports to lease on the host: name -> wanted number, or None for any free one."""
    probes: tuple[Probe, ...] = ()
    """All must pass for the run to be `ready`; a plan without probes is `running` until it ends."""
    watches: tuple[Probe, ...] = ()
    """Asked every `interval_s` once the run is ready; where nothing passes for `timeout_s`, the process is
    killed, so that its `max_restarts` decides what follows."""
    stop: StopPolicy = StopPolicy()
    max_restarts: int = 0
    """How often the whole run is started again after a process failed or did not become ready."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON kept for readers (the resolved experiment with secrets masked, parallel layout, versions,
    chips); the launcher copies it to the manifest and never looks inside."""
    secrets: tuple[str, ...] = ()
    """Names of environment variables whose values are masked wherever the plan is shown or recorded."""
    targets: tuple[Target, ...] = ()
    """The hosts, the first of which is node 0; none: everything runs on this host."""
    port_hosts: Mapping[str, str] = field(default_factory=dict)
    """Port -> target on which it is leased; the first target for a port that is not named here."""
    collect: tuple[str, ...] = ()
    """Files of the run directory that grow line by line, brought home from hosts with other disks."""
    log_limit_bytes: int = _LOG_LIMIT_BYTES
    """A log that grows beyond this is set aside as `<process>.log.1`, in place of an older one."""

    def __post_init__(self) -> None:
        if not self.processes:
            raise InvalidPlan(f"plan {self.name}: no process to run: at least one is needed")
        seen: set[str] = set()
        for process in self.processes:
            if process.name in seen:
                raise InvalidPlan(
                    f"plan {self.name}: two processes are called {process.name!r}: names must differ"
                )
            seen.add(process.name)
        for problem in self._problems():
            raise InvalidPlan(f"plan {self.name}: {problem}")

    def _problems(self) -> Iterator[str]:
        for process in self.processes:
            yield from _problems_of_process(process)
        for file in self.files:
            yield from _problems_of_file(file)
        if len({file.path for file in self.files}) < len(self.files):
            yield "two files have the same path: paths must differ"
        yield from self._problems_of_probes()
        yield from self._problems_of_ports()
        yield from self._problems_of_placeholders()
        yield from self._problems_of_hosts()
        if self.stop.signal not in signal.Signals.__members__:
            yield f"stop signal {self.stop.signal!r}: give a name such as SIGTERM"
        if not 0 <= self.stop.grace_s < math.inf:
            yield f"stop grace_s {self.stop.grace_s}: give seconds, 0 or more"
        if self.max_restarts < 0:
            yield f"max_restarts {self.max_restarts}: give 0 or more"

    def _problems_of_probes(self) -> Iterator[str]:
        names = {process.name for process in self.processes}
        for probe in (*self.probes, *self.watches):
            yield from _problems_of_probe(probe)
            if probe.process is not None and probe.process not in names:
                yield f"probe {probe.url!r}: process {probe.process!r}: not a process of this plan"
        for watch in self.watches:
            if watch.process is None:
                yield f"watch {watch.url!r}: no process: name the one that it is about"

    def _problems_of_ports(self) -> Iterator[str]:
        for name, number in self.ports.items():
            if not _PORT_NAME.fullmatch(name):
                yield f"port name {name!r}: use a-z, 0-9, `_`, `-`"
            if number is not None and not 0 < number < 65536:
                yield f"port {name!r} ({number}): give 1 to 65535, or None for any free one"
        wanted = [(self.owner_of(port), number) for port, number in self.ports.items() if number is not None]
        for owner, number in sorted({one for one in wanted if wanted.count(one) > 1}):
            same = sorted(
                p for p, value in self.ports.items() if (self.owner_of(p), value) == (owner, number)
            )
            yield f"port {number} is wanted twice ({', '.join(same)}): ports must differ"

    def _problems_of_placeholders(self) -> Iterator[str]:
        seen: set[str] = set()
        names = {target.name for target in self.targets}
        for place, text in self._texts():
            if "{" not in text or text in seen:
                continue
            seen.add(text)
            for kind, name in placeholders(text):
                if kind == "port" and name not in self.ports:
                    yield f"{place}: port {name!r} is not among {sorted(self.ports)}"
                if kind == "address" and name not in names:
                    yield f"{place}: address of {name!r}: not a target of this plan"

    def _problems_of_hosts(self) -> Iterator[str]:
        names = [target.name for target in self.targets]
        for name in sorted(name for name, count in Counter(names).items() if count > 1):
            yield f"two targets are called {name!r}: names must differ"
        yield from (problem for target in self.targets for problem in problems_of_target(target))
        for name in sorted(set(names) - {process.host for process in self.processes}):
            yield f"target {name!r}: no process runs there: leave it out"
        known = set(names) or {LOCAL}
        for process in self.processes:
            if process.host not in known:
                yield f"{process.name}: host {process.host!r} is not a target of this plan"
        outside = (path for path in self.collect if path.startswith("/") or ".." in path.split("/"))
        yield from (f"collect {path!r}: lies outside the run directory" for path in outside)
        if self.log_limit_bytes < 1 << 16:
            yield f"log_limit_bytes {self.log_limit_bytes}: give 65536 or more"

    def owner_of(self, port: str) -> str:
        """Return the target on which a port is leased."""
        return self.port_hosts.get(port) or (self.targets[0].name if self.targets else LOCAL)

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Yield every text in which placeholders are replaced, with its place."""
        for process in self.processes:
            for text in (*process.argv, *process.env.values(), process.cwd):
                yield process.name, text
        for file in self.files:
            yield f"file {file.path!r}", file.text
        for probe in (*self.probes, *self.watches):
            yield "probe", probe.url

    def to_json(self, *, masked: bool = True) -> str:
        """Render as deterministic JSON.

        Args:
            masked: show the values of `secrets` as `***`, also where such a value stands in an argument, a
                file or a header. Without it the text is what `from_json` reads.
        """
        data = {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}
        for name, silent in _LATER.items():
            if getattr(self, name) == silent:
                del data[name]
        if masked:
            values = [
                process.env[name]
                for process in self.processes
                for name in self.secrets
                if name in process.env
            ]
            if values:
                data = _mask(data, sorted(set(values), key=len, reverse=True))
            for process in data["processes"]:
                process["env"] = {k: "***" if k in self.secrets else v for k, v in process["env"].items()}
        return render_json(data)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json(masked=False)` wrote.

        Raises:
            InvalidPlan: the text is not a plan.
        """
        try:
            data = json.loads(text)
            return cls(
                **{
                    **data,
                    "processes": tuple(Process(**{**p, "argv": tuple(p["argv"])}) for p in data["processes"]),
                    "files": tuple(File(**f) for f in data["files"]),
                    "probes": tuple(Probe(**p) for p in data["probes"]),
                    "watches": tuple(Probe(**p) for p in data.get("watches", ())),
                    "stop": StopPolicy(**data["stop"]),
                    "secrets": tuple(data["secrets"]),
                    "targets": tuple(Target(**t) for t in data.get("targets", ())),
                    "collect": tuple(data.get("collect", ())),
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidPlan(f"not a plan: {error}") from error


def render_json(data: Any) -> str:
    """Render plain data as the same text every time, readable, and always valid UTF-8.

    Bytes that are not UTF-8, which arguments and environments may hold, are escaped.
    """
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    if _SURROGATE.search(text):
        text = json.dumps(data, indent=2, sort_keys=True)
    return text + "\n"


def _problems_of_process(process: Process) -> Iterator[str]:
    if not _NAME.fullmatch(process.name) or len(process.name) > _NAME_LIMIT:
        yield f"process name {process.name!r}: use a-z, 0-9, `_`, `.`, `-`, at most {_NAME_LIMIT} characters"
    if not process.argv or not process.argv[0]:
        yield f"{process.name}: argv is empty: its first word names the program"
    if "\0" in "".join((*process.argv, *process.env, *process.env.values(), process.cwd)):
        yield f"{process.name}: a NUL character stands in argv, env or cwd: programs cannot be given one"
    if process.max_restarts < 0:
        yield f"{process.name}: max_restarts {process.max_restarts}: give 0 or more"
    for variable in process.env:
        if not variable or "=" in variable:
            yield f"{process.name}: environment variable {variable!r}: a name is not empty and has no `=`"


def _problems_of_file(file: File) -> Iterator[str]:
    parts = file.path.split("/")
    if file.path.startswith("/") or ".." in parts:
        yield f"file {file.path!r} lies outside the run directory"
    elif "\0" in file.path or any(part in {"", "."} for part in parts):
        yield f"file {file.path!r}: give a relative path of plain names"
    elif parts[0].startswith(".") or parts[0] in _OWN_FILES:
        yield f"file {file.path!r}: the launcher keeps its own file there: choose another name"


def _problems_of_probe(probe: Probe) -> Iterator[str]:
    if not probe.url.startswith(("http://", "https://")):
        yield f"probe {probe.url!r}: give a URL that starts with http:// or https://"
    for name, value, least in (
        ("interval_s", probe.interval_s, 0.01),
        ("request_timeout_s", probe.request_timeout_s, 0.01),
        ("timeout_s", probe.timeout_s, 0.0),
    ):
        if not least <= value < math.inf:
            yield f"probe {probe.url!r}: {name} {value}: give seconds, {least:g} or more"


def _plain(value: Any) -> Any:
    """Turn our dataclasses into maps; what is in them is plain already, and copying it would take time."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if not isinstance(value, _PARTS):
        return value
    silent = _SILENT.get(type(value), {})
    return {name: found for name, found in vars(value).items() if name not in silent or found != silent[name]}


_PARTS = (Process, File, Probe, StopPolicy, Target)
_SILENT: Mapping[type, Mapping[str, Any]] = {
    Process: {"max_restarts": 0, "is_service": False},
    Probe: {"process": None},
}
"""Fields that the text of a part leaves out while they say nothing."""


def _mask(data: Any, values: list[str]) -> Any:
    """Replace secret values in every text; short ones only where they are the whole text."""
    if isinstance(data, str):
        for value in values:
            if data == value:
                return "***"
            if len(value) >= _MASKED_INSIDE:
                data = data.replace(value, "***")
        return data
    if isinstance(data, Mapping):
        return {key: _mask(value, values) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_mask(value, values) for value in data]
    return data
