"""The hosts of a training: from the experiment's hostfile to machines that were looked at.

What does not live here: what runs on them (`plan.py`), reaching them (`flagscale_hw`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flagscale_hw as hw
from flagscale_train.data.indexed import files_of
from flagscale_train.errors import InvalidInput, NotFound
from flagscale_train.splits import named

if TYPE_CHECKING:
    from flagscale_config import Experiment

__all__ = ["Node", "find_nodes", "promised_nodes", "targets_of"]

_PACKAGES = ("torch", "megatron-core", "flagscale-train", "flagscale-config", "flagscale-hw")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host of a training."""

    target: hw.Target
    machine: hw.Machine
    interface: str | None = None
    """Network interface by which it reaches the first host."""
    slots: int | None = None
    """Processes that the hostfile allows."""
    type: str | None = None
    """Label of its kind of device in the hostfile."""


def find_nodes(experiment: Experiment) -> tuple[Node, ...]:
    """Look at every host of the experiment.

    Returns:
        The hosts in the order of the hostfile; none where the experiment runs on this host alone.

    Raises:
        InvalidInput: the hostfile is missing or wrong, or names too few hosts.
        NotFound: a host cannot be reached or is not ready to train; every obstacle is named.
    """
    listed = targets_of(experiment)
    if not listed:
        return ()
    targets = [target for target, _ in listed]
    port = experiment.runner.master_port
    reports = hw.survey(
        targets,
        hw.SurveyRequest(
            folder=experiment.exp_dir,
            python=sys.executable,
            packages=_PACKAGES,
            paths=_paths(experiment),
            ports=(port,) if port else (),
        ),
    )
    obstacles = hw.judge(reports, needs_shared=len(targets) > 1 and not experiment.runner.no_shared_fs)
    for obstacle in obstacles:
        if not obstacle.is_fatal:
            print(f"warning: {obstacle}", file=sys.stderr)  # noqa: T201 - said while people wait
    fatal = [str(obstacle) for obstacle in obstacles if obstacle.is_fatal]
    if fatal:
        raise NotFound("not every host is ready:\n" + "\n".join(fatal))
    return tuple(
        Node(
            target=report.target,
            machine=report.machine,
            interface=report.interface,
            slots=entry.slots,
            type=entry.type,
        )
        for report, (_, entry) in zip(reports, listed, strict=True)
        if report.machine is not None
    )


def targets_of(experiment: Experiment) -> list[tuple[hw.Target, hw.HostEntry]]:
    """Read the hostfile and say how each host is reached; none without a hostfile.

    Raises:
        InvalidInput: the hostfile is missing or wrong, or names too few hosts.
    """
    runner = experiment.runner
    least, most = runner.node_bounds
    if runner.hostfile is None:
        if least > 1:
            raise InvalidInput(
                f"experiment.runner.nnodes: {runner.nnodes}: no hostfile says which hosts: set "
                "experiment.runner.hostfile"
            )
        return []
    path = Path(experiment.cwd) / runner.hostfile
    try:
        entries = hw.read_hostfile(path)
    except hw.InputError as error:
        raise InvalidInput(f"experiment.runner.hostfile: {error}") from error
    if len(entries) < least:
        raise InvalidInput(
            f"experiment.runner.nnodes: {runner.nnodes}: {path} has {len(entries)} hosts: add hosts, or ask "
            "for fewer"
        )
    return [(_target(entry, experiment), entry) for entry in entries[:most]]


def _target(entry: hw.HostEntry, experiment: Experiment) -> hw.Target:
    runner = experiment.runner
    return hw.Target(
        name=entry.name,
        transport=hw.transport_to(entry.name),
        port=runner.ssh_port,
        docker=runner.docker,
    )


def _paths(experiment: Experiment) -> tuple[str, ...]:
    """Return the data files that every host reads."""
    options: Mapping[str, Any] = experiment.train.options if experiment.train else {}
    base = Path(experiment.cwd)
    return tuple(str(file) for _, prefix in named(options) for file in files_of(base / prefix))


def promised_nodes(experiment: Experiment, *, chip: str) -> tuple[Node, ...]:
    """Return hosts that a scheduler will choose: their kind is promised by the user and not looked at.

    Args:
        experiment: its `runner.nproc_per_node` is the number of devices of each host.
        chip: of every host, by its name in `flagscale_hw`.

    Raises:
        InvalidInput: the number of processes per host is not given.
    """
    count = experiment.runner.nproc_per_node
    if count is None:
        raise InvalidInput(
            "experiment.runner.nproc_per_node: not given: a scheduler's hosts cannot be looked at "
            "beforehand: set the number of devices of each"
        )
    devices = () if chip == "cpu" else tuple(hw.Device(index=number, chip=chip) for number in range(count))
    names = [f"node-{rank}" for rank in range(experiment.runner.node_bounds[0])]
    machine = hw.Machine(hostname="promised", num_cpus=count, memory_bytes=0, chip=chip, devices=devices)
    return tuple(Node(target=hw.Target(name=name), machine=machine, slots=count) for name in names)
