"""What the launcher tells the supervisor, through a nameless file: secrets never lie on disk."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from flagscale_hw.identity import Identity, boot_id, pid_namespace
from flagscale_hw.plan import Plan

__all__ = ["KEEP", "LET_GO", "Order", "here"]

KEEP = b"K"
"""Said on the lifeline: the launch is complete, and the run ends with its launcher."""
LET_GO = b"D"
"""Said on the lifeline: the launch is complete, and the run outlives its launcher."""


def here() -> dict[str, str]:
    """Name the set of processes that this process can see: host, boot and container."""
    return {"hostname": socket.gethostname(), "boot_id": boot_id(), "pid_namespace": pid_namespace()}


@dataclass(frozen=True, kw_only=True)
class Order:
    """One plan to run now."""

    plan: Plan
    run_id: str
    """Random; every process of the run carries it in its environment."""
    launcher: Identity
    versions: Mapping[str, str]
    """Distribution -> version of what made and launched the plan."""
    is_held: bool = False
    """Whether everything is prepared and nothing started until the launch is complete: then the numbers of
    ports on other hosts are known too."""

    def to_json(self) -> str:
        """Render everything, secrets included."""
        return json.dumps(
            {
                "plan": self.plan.to_json(masked=False),
                "run_id": self.run_id,
                "launcher": self.launcher.to_dict(),
                "versions": dict(self.versions),
                "is_held": self.is_held,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        return cls(
            plan=Plan.from_json(data["plan"]),
            run_id=data["run_id"],
            launcher=Identity(**data["launcher"]),
            versions=data["versions"],
            is_held=data["is_held"],
        )
