"""The hosts of a service: from the experiment's hostfile to machines that were looked at.

What does not live here: which instance runs where (`placing.py`), reaching hosts (`flagscale_hw`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import flagscale_hw as hw
from flagscale_serve.errors import EngineMissing, InvalidService, NotServing
from flagscale_serve.router import router_in
from flagscale_serve.service import absolute

if TYPE_CHECKING:
    from flagscale_config import Experiment

__all__ = ["check_routers", "find_nodes", "promised_nodes", "targets_of"]

_LEADER, _SIZE = "LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE"


def find_nodes(
    experiment: Experiment, *, python: str | None = None, packages: Sequence[str] = ()
) -> tuple[hw.Node, ...]:
    """Look at every host of the experiment; none where it runs on this host alone.

    Args:
        experiment: a loaded serve file.
        python: interpreter that has the engines on every host.
        packages: distributions that it must have, in one version everywhere.

    Raises:
        InvalidService: the hostfile is missing or wrong, or names too few hosts.
        HostsNotReady: a host cannot be reached or is not ready; every obstacle is named.
    """
    listed = targets_of(experiment)
    if not listed:
        return ()
    models = {item.engine_args.get("model") for item in experiment.serve}
    request = hw.SurveyRequest(
        folder=experiment.exp_dir,
        python=python,
        packages=tuple(packages),
        paths=tuple(sorted(str(absolute(model, experiment.cwd)) for model in models if model)),
    )
    needs_shared = len(listed) > 1 and not experiment.runner.no_shared_fs
    return hw.find_nodes(listed, request, needs_shared=needs_shared)


def check_routers(made: hw.Plan, python: str) -> None:
    """Ask each host that runs a router, and no other, whether it has one.

    Args:
        made: a plan over several hosts.
        python: interpreter that runs the routers there.

    Raises:
        EngineMissing: it has not.
        NotServing: a host cannot be reached.
    """
    found = [(one, router) for one in made.processes if (router := router_in(one.argv)) is not None]
    for router in dict.fromkeys(router for _, router in found):
        where = {process.host: process.name for process, its in found if its == router}
        targets = [target for target in made.targets if target.name in where]
        asked = hw.SurveyRequest(python=python, packages=(router.distribution,))
        for report in hw.survey(targets, asked) if targets else ():
            host = report.target.name
            if report.problem:
                raise NotServing(f"{host}: {report.problem}")
            if report.versions.get(router.distribution) is None:
                raise EngineMissing(
                    f"{where[host]}: several instances behind one address need a router, "
                    f"{router.distribution}, which {python} on {host} does not have: install it there with "
                    f"`{router.install}`"
                )


def targets_of(experiment: Experiment) -> list[tuple[hw.Target, hw.HostEntry]]:
    """Read the hostfile and say how each host is reached; none without a hostfile and container.

    Raises:
        InvalidService: the hostfile is missing or wrong, or names too few hosts.
    """
    runner = experiment.runner
    least, most = runner.node_bounds
    if runner.hostfile is None:
        if least > 1:
            raise InvalidService(
                f"experiment.runner.nnodes: {runner.nnodes}: no hostfile says which hosts: set "
                "experiment.runner.hostfile"
            )
        if runner.docker is None:
            return []
        entries: tuple[hw.HostEntry, ...] = (hw.HostEntry(name="localhost", slots=1 << 16),)
    else:
        path = Path(experiment.cwd) / runner.hostfile
        try:
            entries = hw.read_hostfile(path)
        except hw.InputError as error:
            raise InvalidService(f"experiment.runner.hostfile: {error}") from error
        if len(entries) < least:
            raise InvalidService(
                f"experiment.runner.nnodes: {runner.nnodes}: {path} has {len(entries)} hosts: add hosts, or "
                "ask for fewer"
            )
    return [
        (
            hw.Target(
                name=entry.name,
                transport=hw.transport_to(entry.name),
                address="127.0.0.1" if entry.name == "localhost" else "",
                port=runner.ssh_port,
                docker=runner.docker,
            ),
            entry,
        )
        for entry in entries[:most]
    ]


def promised_nodes(
    experiment: Experiment, machine: hw.Machine, environ: Mapping[str, str] = os.environ
) -> tuple[hw.Node, ...]:
    """Return the pods of a LeaderWorkerSet, which the cluster chooses and nobody can look at beforehand.

    Args:
        experiment: its `runner.nnodes` is the size of the group where the pod's own variables do not say it.
        machine: every pod is as this one.
        environ: the variables of the pod: `LWS_GROUP_SIZE`.

    Raises:
        InvalidService: nobody says how many pods there are.
    """
    least = str(experiment.runner.nnodes or "").partition(":")[0]
    given = environ.get(_SIZE) or least
    if not given.isdigit() or int(given) < 1:
        raise InvalidService(
            f"experiment.runner.type: 'cloud': how many pods? neither {_SIZE} nor experiment.runner.nnodes "
            "says it: set one of them"
        )
    count = experiment.runner.nproc_per_node
    leader = environ.get(_LEADER) or experiment.runner.master_addr or ""
    return tuple(
        hw.Node(
            target=hw.Target(name=f"pod-{rank}", address=leader if rank == 0 else ""),
            machine=machine,
            slots=count,
        )
        for rank in range(int(given))
    )
