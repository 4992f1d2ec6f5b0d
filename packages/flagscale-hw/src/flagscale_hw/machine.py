"""A machine as plain data: its processors, its memory and its accelerators.

`None` always means "not known"; 0 is a measured zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flagscale_hw.errors import InputError
from flagscale_hw.target import LOCAL

__all__ = [
    "Device",
    "DeviceProcess",
    "Health",
    "Machine",
    "Presence",
    "Problem",
    "Slice",
    "Vendor",
    "unknowns",
]

Health = Literal["ok", "degraded", "bad", "unresponsive"]
Presence = Literal["none", "bus_only", "usable"]
"""`bus_only`: the hardware is there and its driver is not, so no program can use it."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something about a machine that could not be found out, or that looks wrong."""

    where: str
    """What was asked: a chip, a device such as `nvidia 3`, or one field of it."""
    text: str
    """What it answered, in its own words where it has some."""
    hint: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" + (f": {self.hint}" if self.hint else "")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A part of a device that programs see instead of the whole, such as a MIG instance."""

    uuid: str | None = None
    name: str | None = None
    """The vendor's name of its size, such as `1g.10gb`."""
    instance: str | None = None
    """How the driver numbers it within the device: `<graphics instance>/<compute instance>`."""
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceProcess:
    """A process that uses a device, as the vendor's tool numbers it: on the host, not in a container."""

    pid: int
    name: str | None = None
    memory_used_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator as a program sees it: what the vendor's runtime counts as one device."""

    index: int
    """The number that the driver gives it on this machine."""
    chip: str = "nvidia"
    name: str | None = None
    uuid: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    utilisation_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    pci_bus: str | None = None
    """Domain, bus, device and function, such as `0000:3b:00.0`."""
    driver: str | None = None
    compute_capability: str | None = None
    """Such as `9.0`."""
    physical_index: int | None = None
    """The number in the name of the device node, or the module's; None when it is not told apart."""
    serial: str | None = None
    node: str | None = None
    """Such as `/dev/davinci3`."""
    pci_device_id: str | None = None
    """Such as `0x6210`."""
    numa_node: int | None = None
    cpu_affinity: str | None = None
    """Processors next to it, such as `0-31,64-95`."""
    board: str | None = None
    """The board or card that it sits on, as the tool names it; dies of one board have the same."""
    die: int | None = None
    """Its number on that board."""
    is_virtual: bool | None = None
    """Whether it is a hypervisor's slice of a card."""
    is_sliced: bool | None = None
    """Whether it is cut into parts: programs must then choose one of those."""
    slices: tuple[Slice, ...] = ()
    power_limit_w: float | None = None
    is_ecc_on: bool | None = None
    health: Health | None = None
    health_reasons: tuple[str, ...] = ()
    processes: tuple[DeviceProcess, ...] | None = None
    """Who uses it; None when that cannot be seen, as in a container."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Device:
        """Read what `dataclasses.asdict` gave, from this version or an older one.

        Raises:
            TypeError: a field is not known, or `index` is missing.
        """
        values = dict(data)
        processes = values.get("processes")
        values["slices"] = tuple(Slice(**part) for part in values.get("slices") or ())
        values["processes"] = None if processes is None else tuple(DeviceProcess(**one) for one in processes)
        values["health_reasons"] = tuple(values.get("health_reasons") or ())
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """How one vendor's chips were found on this machine."""

    chip: str
    presence: Presence
    is_forced: bool = False
    """An operator said so in `FLAGSCALE_HW_VENDOR`."""
    origin: str = "built-in"
    """Who looked: `built-in`, or `<distribution> <version>` of a plug-in."""
    source: Literal["library", "tool", "files"] | None = None
    """Where the facts come from; None when nothing was asked."""
    driver: str | None = None
    toolkit: str | None = None
    count: int = 0
    """Devices that were described."""
    on_bus: int = 0
    """PCI functions of such devices."""
    elapsed_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a host offers to a plan."""

    hostname: str
    num_cpus: int
    """Processors that this process may use, by affinity and container limit. At least 1."""
    memory_bytes: int
    """Memory that this process may use: the container's limit where there is one."""
    chip: str = "cpu"
    """The chip that runs: `cpu`, `nvidia`, ..."""
    devices: tuple[Device, ...] = ()
    """Every accelerator of the machine, in the driver's order; empty when the chip is `cpu`."""
    cpu_name: str | None = None
    visible_indices: tuple[int, ...] | None = None
    """Devices that the environment lets this process use, in that order; None when it sets no limit."""
    problems: tuple[Problem, ...] = ()
    others: tuple[Device, ...] = ()
    """Accelerators of other vendors than `chip`; no plan uses them by itself."""
    vendors: tuple[Vendor, ...] = ()
    """Every vendor whose hardware is here, the one of `chip` first."""

    @property
    def visible(self) -> tuple[Device, ...]:
        """The devices that this process may use, in the order in which it numbers them."""
        if self.visible_indices is None:
            return self.devices
        return self.select(self.visible_indices)

    def select(self, indices: Sequence[int]) -> tuple[Device, ...]:
        """Return the devices with these indices, in this order.

        Raises:
            InputError: there is no such device.
        """
        by_index = {device.index: device for device in self.devices}
        for index in indices:
            if index not in by_index:
                have = ", ".join(map(str, by_index)) or "none"
                raise InputError(f"device {index}: not on this machine: it has {have}")
        return tuple(by_index[index] for index in indices)

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Machine:
        """Read what `to_dict` gave, from this version or an older one.

        Raises:
            TypeError: a field is not known, or one that must be there is missing.
        """
        values = dict(data)
        for name, make in _PARTS.items():
            values[name] = tuple(make(part) for part in values.get(name) or ())
        if values.get("visible_indices") is not None:
            values["visible_indices"] = tuple(values["visible_indices"])
        return cls(**values)


_PARTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "devices": Device.from_dict,
    "others": Device.from_dict,
    "problems": lambda part: Problem(**part),
    "vendors": lambda part: Vendor(**part),
}


def unknowns(machines: Mapping[str, Machine]) -> tuple[str, ...]:
    """Say what could not be found out, in one line for all hosts of which the same is not known.

    A plan made without it looks like that of a smaller machine, so whoever plans says this.

    Args:
        machines: by the host's name; this host (`local`) is not named.
    """
    hosts: dict[str, list[str]] = {}
    for host, machine in machines.items():
        for problem in dict.fromkeys(map(str, machine.problems)):
            hosts.setdefault(problem, []).append(host)
    return tuple(text if names == [LOCAL] else f"{', '.join(names)}: {text}" for text, names in hosts.items())
