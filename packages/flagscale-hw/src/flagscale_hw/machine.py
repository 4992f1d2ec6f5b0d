"""A machine as plain data: its processors, its memory and its accelerators.

`None` always means "not known"; 0 is a measured zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flagscale_hw.errors import InputError

__all__ = ["Device", "Machine", "Problem"]


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
class Device:
    """One accelerator as a program sees it."""

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
