"""The hosts of a training: from the experiment's hostfile to machines that were looked at.

What does not live here: what runs on them (`plan.py`), reaching them (`flagscale_hw`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flagscale_hw as hw
from flagscale_train.data.indexed import files_of
from flagscale_train.errors import InvalidInput
from flagscale_train.splits import named

if TYPE_CHECKING:
    from flagscale_config import Experiment

__all__ = ["find_nodes", "promised_nodes", "targets_of"]

_PACKAGES = ("torch", "megatron-core", "flagscale-train", "flagscale-config", "flagscale-hw")


def find_nodes(experiment: Experiment) -> tuple[hw.Node, ...]:
    """Look at every host of the experiment.

    Returns:
        The hosts in the order of the hostfile; none where the experiment runs on this host alone.

    Raises:
        InvalidInput: the hostfile is missing or wrong, or names too few hosts.
        HostsNotReady: a host cannot be reached or is not ready to train; every obstacle is named.
    """
    listed = targets_of(experiment)
    if not listed:
        return ()
    port = experiment.runner.master_port
    request = hw.SurveyRequest(
        folder=experiment.exp_dir,
        python=sys.executable,
        packages=_PACKAGES,
        paths=_paths(experiment),
        ports=(port,) if port else (),
    )
    needs_shared = len(listed) > 1 and not experiment.runner.no_shared_fs
    return hw.find_nodes(listed, request, needs_shared=needs_shared)


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


def promised_nodes(experiment: Experiment, *, chip: str) -> tuple[hw.Node, ...]:
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
    return tuple(hw.Node(target=hw.Target(name=name), machine=machine, slots=count) for name in names)
