"""Checks across fields: each one the twin of an assertion Megatron makes after the cluster has been started."""

from __future__ import annotations

from flagscale_config.experiment import Train
from flagscale_config.findings import Findings
from flagscale_config.runner import Runner

__all__ = ["check_train"]


def check_train(train: Train, runner: Runner, findings: Findings) -> None:
    """Report every contradiction between the options of a training task."""
    del train, runner, findings
