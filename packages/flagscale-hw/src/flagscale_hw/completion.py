"""Add what files tell of devices: those that no tool described, and where each of them sits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flagscale_hw.asking import is_hung
from flagscale_hw.backend import Backend, Found
from flagscale_hw.bus import PciFunction, Survey
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Problem

__all__ = ["complete"]

# Names of PCI devices, for hosts whose tools do not answer. Sources: pci.ids and the presence table of the
# chip reference.
_NAMES = {
    ("0x1d94", "0x6210"): "K100_AI",
    ("0x1e3e", "0x0003"): "BI-V150",
    ("0x1ded", "0x6001"): "PPU-ZW810E",
    ("0x1e36", "0xc035"): "S60",
    ("0x1d22", "0x3684"): "Kunlun",
    ("0x1d22", "0x3685"): "Kunlun2 VF",
    ("0x1d22", "0x3688"): "P800",
    ("0x1da3", "0x1000"): "Gaudi",
    ("0x1da3", "0x1020"): "Gaudi2",
}


def complete(backend: Backend, everything: Survey, found: Found) -> Found:
    """Return what was found with every device of the bus in it, and every device with its place."""
    functions = backend.on_bus(everything)
    devices, problems = found.devices, list(found.problems)
    source = found.source
    missing = _missing(functions, devices)
    if not devices or is_hung(found):
        devices = (
            *devices,
            *_from_bus(backend.chip, missing, devices, is_stuck=is_hung(found) and bool(devices)),
        )
        source = source if found.devices or not devices else "files"
    elif missing:
        problems.append(_not_listed(backend.chip, missing))
    if not devices and not problems:
        problems.append(Problem(where=backend.chip, text="the driver is loaded but lists no device"))
    by_address = {function.address: function for function in functions}
    devices = tuple(_placed(device, by_address, everything.host) for device in devices)
    return Found(devices, tuple(problems), source)


def _missing(functions: Sequence[PciFunction], devices: Sequence[Device]) -> list[PciFunction]:
    """Return the functions that nobody described; none when some device does not say where it is."""
    if any(device.pci_bus is None for device in devices):
        return []
    known = {device.pci_bus for device in devices}
    return [function for function in functions if function.address not in known]


def _from_bus(
    chip: str, functions: Sequence[PciFunction], known: Sequence[Device], *, is_stuck: bool
) -> list[Device]:
    free = (
        index for index in range(len(functions) + len(known)) if index not in {one.index for one in known}
    )
    return [
        Device(
            chip=chip,
            index=index,
            name=_NAMES.get((function.vendor_id, function.device_id)),
            pci_bus=function.address,
            pci_device_id=function.device_id or None,
            # The tool stopped at this card or before it; of the others nothing is known.
            health="unresponsive" if is_stuck and number == 0 else None,
        )
        for number, (index, function) in enumerate(zip(free, functions, strict=False))
    ]


def _not_listed(chip: str, functions: Sequence[PciFunction]) -> Problem:
    addresses = ", ".join(function.address for function in functions)
    return Problem(
        where=chip,
        text=f"the bus shows {addresses} but the driver does not list it",
        hint="look for errors of the driver in the kernel log; a card may need a reset",
    )


def _placed(device: Device, by_address: dict[str, PciFunction], host: Host) -> Device:
    if device.pci_bus is None:
        return device
    folder = f"/sys/bus/pci/devices/{device.pci_bus}"
    numa = host.read(f"{folder}/numa_node") or ""
    function = by_address.get(device.pci_bus)
    return replace(
        device,
        # -1 is the kernel's word for not known.
        numa_node=int(numa) if numa.isdecimal() else device.numa_node,
        cpu_affinity=host.read(f"{folder}/local_cpulist") or device.cpu_affinity,
        pci_device_id=device.pci_device_id or (function.device_id or None if function else None),
    )
