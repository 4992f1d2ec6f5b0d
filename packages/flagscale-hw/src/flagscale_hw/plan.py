"""The plan: everything a launch needs, decided, as frozen data.

A plan is made by a pure function and started by `flagscale_hw.launch`; nothing is decided between the two. What
only the host can know (a free port, the run directory) stands in it as a placeholder: `{port:NAME}`, `{run_dir}`
and, in port values only, nothing else. The supervisor replaces placeholders in argv, env values, cwd, files and probe
URLs; every other brace is left alone, so JSON may stand in an argument.

What does not live here: starting, watching and stopping (`launch.py`, `supervisor.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flagscale_hw.errors import InvalidPlan

__all__ = ["PLACEHOLDER", "File", "Plan", "Probe", "Process", "StopPolicy"]

PLACEHOLDER = re.compile(r"\{(?:port:([a-z0-9_-]+)|(run_dir))\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


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
    host: str = "local"
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class File:
    """A small text file placed in the run directory before anything starts."""

    path: str
    """Relative to the run directory, without `..`."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How to know that a run is ready: one HTTP request that must answer with a certain JSON value.

    A status of 200 alone proves nothing (servers answer `/health` before they can generate), so `expect` names a
    path in the JSON body, such as `usage.completion_tokens` or `choices.0.text`, that must exist and be neither
    null, 0 nor empty.
    """

    url: str
    method: str = "GET"
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    expect: str | None = None
    interval_s: float = 0.5
    request_timeout_s: float = 60.0
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class StopPolicy:
    """How a run ends: the signal asked for first, then SIGKILL for everything left after `grace_s`."""

    signal: str = "SIGTERM"
    grace_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run. Same experiment and same machines give the same plan, byte for byte.

    Raises:
        InvalidPlan: two processes share a name, a placeholder names a port that is not leased, a file would be
            written outside the run directory, or there is nothing to run.
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
    stop: StopPolicy = StopPolicy()
    max_restarts: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON kept for readers (the resolved experiment with secrets masked, parallel layout, versions, chips);
    the launcher copies it to the manifest and never looks inside."""
    secrets: tuple[str, ...] = ()
    """Names of environment variables whose values are masked wherever the plan is shown or recorded."""

    def __post_init__(self) -> None:
        if not self.processes:
            raise InvalidPlan(f"plan {self.name}: no process to run: at least one is needed")
        seen: set[str] = set()
        for process in self.processes:
            if not _NAME.fullmatch(process.name):
                raise InvalidPlan(
                    f"plan {self.name}: process name {process.name!r}: use a-z, 0-9, `_`, `.`, `-`"
                )
            if process.name in seen:
                raise InvalidPlan(
                    f"plan {self.name}: two processes are called {process.name!r}: names must differ"
                )
            seen.add(process.name)
            self._check_placeholders(process)
        for file in self.files:
            if file.path.startswith("/") or ".." in file.path.split("/"):
                raise InvalidPlan(f"plan {self.name}: file {file.path!r} lies outside the run directory")

    def _check_placeholders(self, process: Process) -> None:
        for text in (*process.argv, *process.env.values(), process.cwd):
            for match in PLACEHOLDER.finditer(text):
                port = match.group(1)
                if port and port not in self.ports:
                    raise InvalidPlan(
                        f"plan {self.name}: {process.name}: port {port!r} is not among {sorted(self.ports)}"
                    )

    def to_json(self, *, masked: bool = True) -> str:
        """Render as deterministic JSON, with the values of `secrets` as `***` unless `masked` is false."""
        data = asdict(self)
        if masked:
            for process in data["processes"]:
                process["env"] = {k: "***" if k in self.secrets else v for k, v in process["env"].items()}
        return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

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
                    "stop": StopPolicy(**data["stop"]),
                    "secrets": tuple(data["secrets"]),
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidPlan(f"not a plan: {error}") from error
