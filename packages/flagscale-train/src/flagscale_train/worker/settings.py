"""What the plan tells a worker beside Megatron's arguments, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROLL_BACKS", "Settings"]

ROLL_BACKS = "FLAGSCALE_ROLL_BACKS"
"""Variable in which a worker that starts again counts how often it has."""


@dataclass(frozen=True)
class Settings:
    """The worker's own settings; see the package's docstring for the variables."""

    platform: str
    """Device type of the chip in torch."""
    events: Path | None
    peak_flops: float | None
    """FLOP/s of one device, or None if unknown."""
    on_bad_step: str = "stop"
    """`stop`, `skip` or `roll_back`; `off` where nothing is to be judged."""
    spike_threshold: float | None = None
    """Rise of the loss over its recent mean that is a spike, 0.2 being 20 %; None without such a rule."""
    bad_step_patience: int = 10
    """Steps left out in a row, or roll-backs, at most."""
    num_roll_backs: int = 0
    """How often this run was rolled back already."""
    keep_last: int | None = None
    """Number of whole checkpoints to keep; None for all."""
    plugin: str | None = None
    """Module that makes torch know the chip; None where torch itself does."""
    cuda_hook: str | None = None
    """Module that lets `torch.cuda` mean the chip, where neither plug-in nor Megatron-LM-FL brings one."""
    megatron_platform: str | None = None
    """The chip's name in Megatron-LM-FL; None where its choice does not matter."""
    collectives: str | None = None
    """Backend of torch.distributed, where Megatron's own option does not know it."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables; absent ones mean cuda, no events, unknown peak."""
        events = environment.get("FLAGSCALE_EVENTS")
        peak = environment.get("FLAGSCALE_PEAK_FLOPS")
        spike = environment.get("FLAGSCALE_SPIKE_THRESHOLD")
        keep = environment.get("FLAGSCALE_KEEP_LAST")
        return cls(
            platform=environment.get("FLAGSCALE_PLATFORM", "cuda"),
            events=Path(events) if events else None,
            peak_flops=float(peak) if peak else None,
            on_bad_step=environment.get("FLAGSCALE_ON_BAD_STEP", "stop"),
            spike_threshold=float(spike) if spike else None,
            bad_step_patience=int(environment.get("FLAGSCALE_BAD_STEP_PATIENCE", "10")),
            num_roll_backs=int(environment.get(ROLL_BACKS, "0")),
            keep_last=int(keep) if keep else None,
            plugin=environment.get("FLAGSCALE_PLUGIN"),
            cuda_hook=environment.get("FLAGSCALE_CUDA_HOOK"),
            megatron_platform=environment.get("MG_FL_PREFER"),
            collectives=environment.get("FLAGSCALE_COLLECTIVES"),
        )
