"""One plan for many hosts, split into one plan for each: small, and free of what another host must know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from flagscale_hw.placeholders import placeholders, substitute
from flagscale_hw.plan import Plan, Probe, Process
from flagscale_hw.target import LOCAL

__all__ = ["split"]

_Fill = Callable[[str], str]


def split(plan: Plan) -> Iterator[Plan]:
    """Yield the part of each target, in their order.

    Node rank and addresses are filled in. Ports stay open: a part keeps the ports that it leases, and the
    names of those that it mentions and another host leases.
    """
    addresses = {target.name: target.reached_as for target in plan.targets}
    by_host: dict[str, list[Process]] = {target.name: [] for target in plan.targets}
    for process in plan.processes:
        by_host[process.host].append(process)
    for rank, target in enumerate(plan.targets):
        yield _part(plan, target.name, by_host[target.name], _filler(rank, target.reached_as, addresses))


def _filler(rank: int, own_address: str, addresses: dict[str, str]) -> _Fill:
    def value_of(kind: str, name: str) -> str | None:
        if kind == "address":
            return addresses.get(name)
        return {"node_rank": str(rank), "own_address": own_address}.get(kind)

    return lambda text: substitute(text, value_of, is_last=False)


def _part(plan: Plan, host: str, processes: list[Process], fill: _Fill) -> Plan:
    owners = {port: plan.owner_of(port) for port in plan.ports}
    filled = tuple(_filled(process, fill) for process in processes)
    files = tuple(replace(file, text=fill(file.text)) for file in plan.files)
    probes = tuple(
        replace(probe, url=fill(probe.url)) for probe in plan.probes if _home_of(probe, plan) == host
    )
    texts = [*(text for process in filled for text in _texts(process))]
    texts += [*(file.text for file in files), *(probe.url for probe in probes)]
    mentioned = {name for text in texts for kind, name in placeholders(text) if kind == "port"}
    ports = {port: number for port, number in plan.ports.items() if port in mentioned or owners[port] == host}
    return replace(
        plan,
        processes=filled,
        files=files,
        probes=probes,
        ports=ports,
        port_hosts={port: LOCAL if owners[port] == host else owners[port] for port in ports},
        targets=(),
        max_restarts=0,  # a restart concerns all hosts and is decided where all are seen
        facts={},
    )


def _home_of(probe: Probe, plan: Plan) -> str:
    for kind, name in placeholders(probe.url):
        if kind == "port":
            return plan.owner_of(name)
    return plan.targets[0].name


def _texts(process: Process) -> tuple[str, ...]:
    return (*process.argv, *process.env.values(), process.cwd)


def _filled(process: Process, fill: _Fill) -> Process:
    return replace(
        process,
        argv=tuple(fill(word) for word in process.argv),
        env={name: fill(value) for name, value in process.env.items()},
        cwd=fill(process.cwd),
        host=LOCAL,
    )
