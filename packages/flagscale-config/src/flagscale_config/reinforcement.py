"""FlagScale's `rl:` section as a model; `verl.py` reads it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from flagscale_config.base import FrozenDict, FrozenMap, Model

__all__ = ["ReinforcementLearning"]


class ReinforcementLearning(Model):
    """A reinforcement learning task."""

    config_path: str | None = None
    """Folder of verl's configurations; verl's own by default."""
    config_name: str = "ppo_trainer"
    """Which of verl's configurations the options change."""
    options: FrozenMap[str, Any] = Field(default_factory=FrozenDict)
    """Options by verl's dotted key."""
    added: FrozenMap[str, Any] = Field(default_factory=FrozenDict)
    """Keys that verl's configuration lacks, from `append_kargs`, by dotted key."""
