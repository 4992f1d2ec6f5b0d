"""The seam between detection and the vendors: what a backend is, and which ones there are.

A backend decides by files alone whether its chip is here, and starts a library or a tool only then. The
vendor of a device is what the bus and the device nodes say, never which tool happens to answer: several
chips bring a tool or a library that is called like NVIDIA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol

from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Problem

__all__ = ["Backend", "Found", "PciFunction", "Presence", "backends", "pci_functions"]

Presence = Literal["none", "bus_only", "usable"]
"""`bus_only`: the hardware is there and its driver is not, so no program can use it."""

_MODULES = ("flagscale_hw.nvidia",)


@dataclass(frozen=True)
class Found:
    """What a backend could find out."""

    devices: tuple[Device, ...] = ()
    problems: tuple[Problem, ...] = ()


class Backend(Protocol):
    """One vendor's chips; a module with these names is one."""

    CHIP: str

    def presence(self, host: Host) -> Presence:
        """Say whether the chip is here, from files only, within a few milliseconds."""

    def look(self, host: Host, timeout_s: float) -> Found:
        """Describe the devices of a chip that is present. Never raises for a bad card or tool."""

    def visible(
        self, host: Host, devices: tuple[Device, ...]
    ) -> tuple[tuple[int, ...] | None, tuple[Problem, ...]]:
        """Return the indices that the environment selects, None when it does not restrict anything."""


def backends() -> Iterator[Backend]:
    """Yield every backend, in the order in which they are preferred on a host with several."""
    for module in _MODULES:
        backend: Backend = import_module(module)
        yield backend


@dataclass(frozen=True)
class PciFunction:
    """One PCI function, as the bus reports it."""

    address: str
    device_id: str


def pci_functions(host: Host, vendor: str, classes: frozenset[str]) -> list[PciFunction]:
    """Return function 0 of every device of a vendor in one of the given classes.

    Args:
        host: where to look.
        vendor: such as `0x10de`.
        classes: base class and sub-class, such as `0302`. The vendor alone proves nothing: it also makes
            audio functions, network cards and bridges.
    """
    base = "/sys/bus/pci/devices"
    found = []
    for address in host.names(base):
        # Only the first file is read for the hundreds of functions that belong to somebody else.
        if address.endswith(".0") and host.read(f"{base}/{address}/vendor") == vendor:
            kind = host.read(f"{base}/{address}/class") or ""
            if kind[2:6] in classes:
                found.append(PciFunction(address, host.read(f"{base}/{address}/device") or ""))
    return found
