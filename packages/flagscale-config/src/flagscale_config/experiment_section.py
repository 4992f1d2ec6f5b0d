"""The `experiment:` section as it stands in a file: paths not yet absolute, variables not yet text."""

from __future__ import annotations

from typing import Any

from flagscale_config.base import FrozenMap, Int, Model, Positive, Text
from flagscale_config.runner import Cmds, Deploy, Runner, Task
from flagscale_config.tuning import AutoTuner

__all__ = ["SHORTCUTS", "ExperimentSection"]

SHORTCUTS = ("save_steps", "load", "ckpt_format", "ckpt_convert_save", "model", "tokenizer", "vq_model")


class NodeArgs(Model):
    """What holds on one host only."""

    engine_args: FrozenMap[str, Any] | None = None
    """Engine options of this host, in vLLM's vocabulary."""


class ExperimentSection(Model):
    """Keys allowed below `experiment:`."""

    exp_name: Text
    """Free name of the experiment."""
    exp_dir: Text = "outputs/${experiment.exp_name}"
    """Root of all artefacts, relative to the working directory."""
    task: Task
    """What is to be done."""
    runner: Runner = Runner()
    """Where and how processes are started."""
    envs: FrozenMap[str, Any] | None = None
    """Environment variables; `device_type_specific`, `node_specific` and `nodes_envs` hold more by device
    type and host."""
    cmds: Cmds | None = None
    """Shell text around the task."""
    deploy: Deploy | None = None
    """Old place of `runner.deploy`."""
    node_args: FrozenMap[str, NodeArgs] | None = None
    """Engine options by host."""
    auto_tuner: AutoTuner | None = None
    """Search space of the tuner."""
    seed: Int | None = None
    """Convenience value for other keys to refer to."""
    save_steps: Positive | None = None
    """Convenience value for other keys to refer to."""
    load: Text | None = None
    """Convenience value for other keys to refer to."""
    ckpt_format: Text | None = None
    """Convenience value for other keys to refer to."""
    ckpt_convert_save: Text | None = None
    """Convenience value for other keys to refer to."""
    model: Text | None = None
    """Convenience value for other keys to refer to."""
    tokenizer: Text | None = None
    """Convenience value for other keys to refer to."""
    vq_model: Text | None = None
    """Convenience value for other keys to refer to."""
    shell_cmds: Any = None
    """Of older FlagScale versions; nothing reads it."""
