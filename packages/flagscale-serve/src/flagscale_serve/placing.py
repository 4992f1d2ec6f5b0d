"""Which devices of which host each instance gets: first come, first served, in the order of the file.

Hosts without accelerators are shared by all instances. Each takes one process of an instance, or as many as
its slots in the hostfile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flagscale_hw import Device, Machine
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Instance

if TYPE_CHECKING:
    from flagscale_hw import Node

__all__ = ["Berth", "Need", "place"]


@dataclass(frozen=True, kw_only=True)
class Need:
    """What an instance asks for."""

    count: int
    """Devices in all."""
    copy: int = 1
    """Devices of one copy of the model: a host gets whole copies, or a copy gets whole hosts."""
    per_host: int | None = None
    """Devices on each host, where the file says it."""


@dataclass(frozen=True, kw_only=True)
class Berth:
    """The share of one host in an instance."""

    machine: Machine
    node: Node | None = None
    """None: this host, and no other takes part."""
    count: int = 1
    """Processes of the instance on this host, one for each device where there are devices."""
    devices: tuple[Device, ...] = ()
    is_shared: bool = False
    """Whether the devices must be told, because others use the rest of them."""

    @property
    def host(self) -> str:
        """The host's name in the plan."""
        return self.node.target.name if self.node is not None else "local"


def place(
    instances: Sequence[Instance], wanted: Mapping[str, Need], machine: Machine, nodes: Sequence[Node]
) -> dict[str, tuple[Berth, ...]]:
    """Give each instance its devices.

    Args:
        instances: in the order in which they choose.
        wanted: instance -> its devices.
        machine: this host, where there are no nodes.
        nodes: the hosts; none: this host alone.

    Returns:
        Instance -> its berths, more than one where it spans hosts, which then share it evenly.

    Raises:
        InvalidService: there are too few devices, they cannot be shared evenly, or the file names a host that
            is not there.
    """
    if not nodes:
        return _on_this_host(instances, wanted, machine)
    free = {node.target.name: _Free(node) for node in nodes}
    found = {}
    for instance in instances:
        if instance.wanted_host is not None and instance.wanted_host not in free:
            raise InvalidService(
                f"{instance.name}: host {instance.wanted_host}: not among the hosts {', '.join(free)}: write "
                "it as the hostfile does"
            )
        hosts = [one for name, one in free.items() if instance.wanted_host in (None, name)]
        found[instance.name] = _aboard(instance, wanted[instance.name], hosts)
    return found


class _Free:
    """What is left of one host."""

    def __init__(self, node: Node) -> None:
        self.node = node
        devices = node.machine.visible
        self.devices = devices[: node.slots] if node.slots is not None else devices
        self.is_cpu = node.machine.chip == "cpu"
        self.load = 0

    @property
    def count(self) -> int:
        """What an instance may have: devices that nobody has yet, or processes on a CPU."""
        return (self.node.slots or 1) if self.is_cpu else len(self.devices)

    def take(self, count: int) -> Berth:
        self.load += 1
        if self.is_cpu:
            return Berth(machine=self.node.machine, node=self.node, count=count)
        is_whole = count == len(self.node.machine.visible)
        mine, self.devices = self.devices[:count], self.devices[count:]
        return Berth(
            machine=self.node.machine, node=self.node, count=count, devices=mine, is_shared=not is_whole
        )


def _aboard(instance: Instance, need: Need, hosts: Sequence[_Free]) -> tuple[Berth, ...]:
    if all(host.is_cpu for host in hosts):
        hosts = sorted(hosts, key=lambda host: host.load)
    else:
        hosts = [host for host in hosts if not host.is_cpu]
    for number in range(1, len(hosts) + 1):
        share, rest = divmod(need.count, number)
        if rest or need.per_host not in (None, share) or (share % need.copy and need.copy % share):
            continue
        able = [host for host in hosts if host.count >= share]
        if len(able) >= number:
            return tuple(host.take(share) for host in able[:number])
    left = ", ".join(f"{host.node.target.name} {host.count}" for host in hosts)
    asked = f"{need.count} devices asked for"
    if need.per_host is not None:
        asked += f", {need.per_host} on each host"
    elif need.copy < need.count:
        asked += f" for copies of {need.copy}"
    raise InvalidService(
        f"{instance.name}: {asked}: the hosts have {left} left, and each must give the "
        "same number: lower the parallel sizes, add hosts, or serve fewer instances"
    )


def _on_this_host(
    instances: Sequence[Instance], wanted: Mapping[str, Need], machine: Machine
) -> dict[str, tuple[Berth, ...]]:
    """A single instance keeps what the user's environment shows it."""
    for name, need in wanted.items():
        if need.per_host not in (None, need.count):
            raise InvalidService(
                f"{name}: data_parallel_size_local: {need.per_host} of {need.count} devices on each host: "
                "this is one host: name the hosts in experiment.runner.hostfile, or leave it out"
            )
    counts = {name: need.count for name, need in wanted.items()}
    if machine.chip == "cpu":
        return {name: (Berth(machine=machine, count=count),) for name, count in counts.items()}
    total, free = sum(counts.values()), machine.visible
    if total > len(free):
        asked = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InvalidService(
            f"devices: {total} asked for ({asked}): this process may use {len(free)} ({machine.chip}): lower "
            "tensor_parallel_size, or serve fewer instances"
        )
    found: dict[str, tuple[Berth, ...]] = {}
    for name, count in counts.items():
        found[name] = (
            Berth(machine=machine, count=count, devices=free[:count], is_shared=len(instances) > 1),
        )
        free = free[count:]
    return found
