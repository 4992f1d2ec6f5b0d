"""What is known about a run: frozen data, for people and for programs.

What does not live here: finding it out (`runs.py`), recording it (`supervisor.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

__all__ = ["OVER", "ProcessStatus", "RunState", "RunStatus"]

RunState = Literal["starting", "running", "ready", "stopping", "succeeded", "failed", "stopped", "lost"]
"""`lost`: the run's supervisor and guardian are both gone and neither could record an end."""

OVER: frozenset[RunState] = frozenset({"succeeded", "failed", "stopped", "lost"})


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """One planned process."""

    name: str
    pid: int | None = None
    """None until it was started."""
    start_time: int | None = None
    """Clock ticks after boot; with `pid` it proves which process is meant."""
    started_at: float | None = None
    """Unix seconds."""
    ended_at: float | None = None
    exit_code: int | None = None
    """None while it runs, and when a signal ended it."""
    signal: int | None = None
    """The signal that ended it, if one did."""
    host: str = "local"
    """The target on which it runs; pid and start time are of that host."""
    cause: str = ""
    """The line of its log that tells why it failed; empty while it has not failed."""
    started_monotonic_s: float | None = None
    """Seconds of the host's own steady clock, which no time server moves."""
    ended_monotonic_s: float | None = None
    ready_at: float | None = None
    """Unix seconds at which a probe of it had passed; None before, and for a process without any."""
    restarts: int = 0
    """How often it was started again alone."""
    is_lost: bool = False
    """Whether it is gone, or its host is, without anybody having seen how it ended."""

    @property
    def is_running(self) -> bool:
        """Tell whether it was started and has not been seen to end."""
        return self.started_at is not None and self.ended_at is None and not self.is_lost

    @property
    def duration_s(self) -> float | None:
        """How long it ran, by the steady clock; None while that is not known."""
        if self.started_monotonic_s is None or self.ended_monotonic_s is None:
            return None
        return self.ended_monotonic_s - self.started_monotonic_s

    @property
    def fate(self) -> str:
        """How it stands, in a few words."""
        if self.started_at is None:
            return "not started"
        if self.is_lost:
            return "lost: nobody saw how it ended"
        if self.is_running:
            return "running"
        if self.signal is not None:
            return f"ended by signal {self.signal}"
        return "ended" if self.exit_code is None else f"exit code {self.exit_code}"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How a run stands."""

    state: RunState
    reason: str = ""
    """The first cause, for people; while the run starts, what it waits for; empty while all is well."""
    processes: tuple[ProcessStatus, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    """The ports that were leased, by the names the plan gave them."""
    restarts: int = 0
    started_at: float | None = None
    """Unix seconds."""
    ended_at: float | None = None

    @property
    def is_over(self) -> bool:
        """Tell whether nothing will happen any more."""
        return self.state in OVER

    @property
    def exit_code(self) -> int:
        """What a command line exits with: 4 when the run failed or was lost, else 0."""
        return 4 if self.state in {"failed", "lost"} else 0

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON, with `is_over` and `exit_code`."""
        return {
            **asdict(self),
            "ports": dict(self.ports),
            "is_over": self.is_over,
            "exit_code": self.exit_code,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunStatus:
        """Read what `to_dict` wrote; keys of a later version are ignored.

        Raises:
            ValueError: not a status.
        """
        try:
            state = data["state"]
            processes = tuple(
                ProcessStatus(
                    **{key: entry[key] for key in ProcessStatus.__dataclass_fields__ if key in entry}
                )
                for entry in data["processes"]
            )
            known = {
                k: data[k] for k in ("reason", "ports", "restarts", "started_at", "ended_at") if k in data
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a status: {error}") from error
        if state not in get_args(RunState):
            raise ValueError(f"not a status: unknown state {state!r}")
        return cls(state=state, processes=processes, **known)
