"""NVIDIA: NVML, nvidia-smi or the driver's files. Cards that are cut by MIG show their parts as slices."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from flagscale_hw.asking import Asker, first_answer, is_hung, merge
from flagscale_hw.backend import Found
from flagscale_hw.backends import csvs
from flagscale_hw.backends.boxes import TITLES, device_of, with_processes
from flagscale_hw.backends.columns import Table
from flagscale_hw.backends.nvidia_xml import parse_xml
from flagscale_hw.backends.values import address
from flagscale_hw.host import Host
from flagscale_hw.machine import Device

__all__ = ["CHIP", "look", "parse_csv", "parse_table"]

CHIP = "nvidia"

_LIBRARIES = (
    "libnvidia-ml.so.1",
    "/usr/lib/wsl/lib/libnvidia-ml.so.1",
    "/usr/local/nvidia/lib64/libnvidia-ml.so.1",
)
_GPUS = "/proc/driver/nvidia/gpus"
_QUERY = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.used",
    "utilization.gpu",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "pci.bus_id",
    "driver_version",
    "serial",
    "compute_cap",
    "mig.mode.current",
)
_TABLE = Table(anchor=r"GPU\s+Name\s.*Bus-?Id", columns=TITLES)


def look(host: Host, timeout_s: float) -> Found:
    """Describe every NVIDIA device; a library or tool that hangs costs at most `timeout_s`."""
    asker = Asker(host, CHIP, timeout_s)
    found = first_answer(
        lambda: asker.library("flagscale_hw.backends.nvml", CHIP, "nvml", *_LIBRARIES),
        lambda: _ask_tool(asker),
    )
    if not found.devices or is_hung(found):
        found = replace(found, devices=_complete_from_files(host, found.devices))
    return found


def _ask_tool(asker: Asker) -> Found:
    tool = asker.tool("nvidia-smi")
    if tool is None:
        return asker.missing("nvidia-smi")
    found = csvs.query(asker, tool, "--query-gpu", _QUERY, csvs.FIELDS)
    if any(device.is_sliced for device in found.devices):
        return _with_slices(asker, tool, found)
    return found


def _with_slices(asker: Asker, tool: Path, found: Found) -> Found:
    """Ask for the parts of cut cards: only the long report tells them."""
    report = asker.ask([tool, "-q", "-x"], lambda text: parse_xml(CHIP, text))
    return replace(
        found,
        devices=merge(found.devices, report.devices),
        problems=(*found.problems, *report.problems),
    )


def parse_csv(text: str) -> Found:
    """Read the table of `nvidia-smi --query-gpu=... --format=csv`; see `csvs.parse_csv`."""
    return csvs.parse_csv(CHIP, "nvidia-smi", text)


def parse_table(text: str) -> Found:
    """Read what `nvidia-smi` draws."""
    version = re.search(r"Driver Version:\s*([\w.-]+)", text)
    devices = [device_of(CHIP, row) for row in _TABLE.read(text)]
    known = [replace(one, driver=version[1] if version else None) for one in devices if one is not None]
    return Found(with_processes(known, text))


def _complete_from_files(host: Host, known: tuple[Device, ...]) -> tuple[Device, ...]:
    """Add the devices of which only the driver's files tell."""
    listed = [bus for name in host.names(_GPUS) if (bus := address(name)) is not None]
    version = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", host.read("/proc/driver/nvidia/version") or "")
    driver = version[1] if version else None
    by_bus = {device.pci_bus: device for device in known}
    devices = [
        by_bus.get(bus) or replace(_from_driver_file(host, bus), index=index, driver=driver)
        for index, bus in enumerate(listed)
    ]
    if len(devices) >= len(known):
        return tuple(devices)
    return known


def _from_driver_file(host: Host, bus: str) -> Device:
    text = host.read(f"{_GPUS}/{bus}/information") or ""
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    uuid = facts.get("GPU UUID", "")
    return Device(
        chip=CHIP,
        index=0,
        name=facts.get("Model") or None,
        # The driver prints question marks until a first program ran.
        uuid=uuid if uuid and "?" not in uuid else None,
        pci_bus=bus,
    )
