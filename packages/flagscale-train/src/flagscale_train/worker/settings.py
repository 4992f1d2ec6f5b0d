"""What the plan tells a worker beside Megatron's arguments, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The worker's own settings; see the package's docstring for the variables."""

    platform: str
    events: Path | None
    peak_flops: float | None
    """FLOP/s of one device, or None if unknown."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables; absent ones mean cuda, no events, unknown peak."""
        events = environment.get("FLAGSCALE_EVENTS")
        peak = environment.get("FLAGSCALE_PEAK_FLOPS")
        return cls(
            platform=environment.get("FLAGSCALE_PLATFORM", "cuda"),
            events=Path(events) if events else None,
            peak_flops=float(peak) if peak else None,
        )
