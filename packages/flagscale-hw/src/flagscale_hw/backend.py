"""The seam between detection and the vendors: what a backend is, and which ones there are.

A backend decides by files alone whether its chip is here, and starts a library or a tool only then. The
vendor of a device is what the bus and the device nodes say, never which tool happens to answer: several
chips bring a tool or a library that is called like NVIDIA's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from flagscale_hw.bus import PciFunction, Survey
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Presence, Problem

__all__ = ["ACCELERATORS", "Backend", "Found", "PciRule", "Presence", "Source", "backends"]

Source = Literal["library", "tool", "files"]

ACCELERATORS = frozenset({"0300", "0302", "0380", "0b40", "1200"})
"""PCI classes of accelerators: VGA, 3D, other display, co-processor, processing accelerator."""


@dataclass(frozen=True)
class Found:
    """What a backend could find out."""

    devices: tuple[Device, ...] = ()
    problems: tuple[Problem, ...] = ()
    source: Source | None = None


@dataclass(frozen=True)
class PciRule:
    """Which PCI functions are a vendor's chips. The vendor alone proves nothing: it also makes bridges."""

    vendor: str
    """Such as `0x10de`."""
    classes: frozenset[str] = ACCELERATORS
    """Base class and sub-class, such as `0302`."""
    not_devices: frozenset[str] = frozenset()
    not_addresses: frozenset[str] = frozenset()
    drivers: frozenset[str] = frozenset()
    """Kernel drivers, one of which must have the function; empty when the nodes tell."""

    def matches(self, function: PciFunction) -> bool:
        """Tell whether this function is such a chip."""
        return (
            function.vendor_id == self.vendor
            and function.kind in self.classes
            and function.device_id not in self.not_devices
            and function.address not in self.not_addresses
            and (not self.drivers or function.driver in self.drivers)
        )


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One vendor's chips: a gate made of data, and the module that describes them when they are here."""

    chip: str
    module: str
    """Has `look(host, timeout_s) -> Found`; imported only on a host that has such chips."""
    pci: tuple[PciRule, ...] = ()
    nodes: str = "(?!)"
    """Names below /dev, as a regular expression, that only this vendor's driver makes: they prove both."""
    shared_nodes: str = "(?!)"
    """Names below /dev that prove the driver once the bus has proved the hardware."""
    also: Callable[[Host], bool] | None = None
    """Another proof, from files, for hosts that show neither bus nor nodes."""
    origin: str = "built-in"
    numbered_by: Literal["index", "physical_index"] = "index"
    """What the numbers in the variable that restricts devices mean."""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """What a plug-in says of the software for its chip; the rows of built-in chips are in `chips.py`."""

    def on_bus(self, survey: Survey) -> list[PciFunction]:
        """Return the PCI functions that are such chips, by address."""
        return [function for function in survey.functions if any(rule.matches(function) for rule in self.pci)]

    def presence(self, survey: Survey) -> Presence:
        """Say whether the chip is here, from files only."""
        if any(re.fullmatch(self.nodes, node) for node in survey.nodes):
            return "usable"
        if self.also is not None and self.also(survey.host):
            return "usable"
        if not self.on_bus(survey):
            return "none"
        has_driver = any(re.fullmatch(self.shared_nodes, node) for node in survey.nodes)
        return "usable" if has_driver else "bus_only"

    def look(self, host: Host, timeout_s: float) -> Found:
        """Describe the devices of a chip that is present. Never raises for a bad card or tool."""
        try:
            found: Found = import_module(self.module).look(host, timeout_s)
        except Exception as error:  # noqa: BLE001 - one vendor's surprise must not hide the others
            text = f"its backend broke: {type(error).__name__}: {error}"
            return Found(problems=(Problem(where=self.chip, text=text, hint="please report this"),))
        return found


def backends() -> tuple[Backend, ...]:
    """Return every backend, in the order in which they are preferred on a host with several.

    Plug-ins come after the built-in ones; a plug-in for a built-in chip takes that one's place.
    """
    from flagscale_hw.backends.gates import GATES
    from flagscale_hw.plugins import plugins

    extra = {plugin.chip: plugin for plugin in plugins()}
    return (*(extra.pop(gate.chip, gate) for gate in GATES), *extra.values())
