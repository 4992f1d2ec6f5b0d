"""Intel GPUs: xpu-smi, which shares its name with Kunlunxin's tool and nothing else."""

from __future__ import annotations

import re

from flagscale_hw.asking import Asker
from flagscale_hw.backend import Found
from flagscale_hw.backends.blocks import pairs
from flagscale_hw.backends.boxes import device_of
from flagscale_hw.backends.columns import Row
from flagscale_hw.backends.values import clean, text_of
from flagscale_hw.host import Host
from flagscale_hw.machine import Device

__all__ = ["CHIP", "look", "parse_discovery"]

CHIP = "intel"
_LINE = re.compile(r"\|\s*(?P<index>[0-9]{1,4}|)\s*\|\s*(?P<pair>\S.*?)\s*\|")
_FIELDS = {
    "name": "Device Name",
    "uuid": "SOC UUID",
    "serial": "Serial Number",
    "driver": "Driver Version",
    "bus": "PCI BDF Address",
    "memory_total": "Memory Physical Size",
}
_ECC = {"enabled": True, "disabled": False}


def look(host: Host, timeout_s: float) -> Found:
    """Describe every Intel GPU; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("xpu-smi")
    if tool is None:
        return asker.missing("xpu-smi")
    listed = asker.ask([tool, "discovery"], parse_discovery)
    devices: list[Device] = []
    problems = list(listed.problems)
    for device in listed.devices:
        # Only the report on one device tells how much memory it has.
        found = asker.ask([tool, "discovery", "-d", str(device.index)], parse_discovery)
        devices += found.devices[:1] or (device,)
        problems += () if found.devices else found.problems
    return Found(tuple(devices), tuple(problems), source="tool")


def parse_discovery(text: str) -> Found:
    """Read `xpu-smi discovery`, with or without `-d`: a box of two columns, index and `key: value`."""
    parts: list[tuple[str, list[str]]] = []
    for line in clean(text).splitlines():
        found = _LINE.fullmatch(line.strip()) if len(line) < 500 else None
        if found is not None and found["index"]:
            parts.append((found["index"], []))
        if found is not None and parts:
            parts[-1][1].append(found["pair"])
    devices = [_device(index, pairs("\n".join(lines))) for index, lines in parts]
    return Found(tuple(device for device in devices if device is not None))


def _device(index: str, values: dict[str, str]) -> Device | None:
    if "Device Name" not in values and "Device Type" not in values:
        return None
    row: Row = {"index": index}
    row |= {field: values[key] for field, key in _FIELDS.items() if key in values}
    device_id = values.get("PCI Device ID", "").lower()
    return device_of(
        CHIP,
        row,
        pci_device_id=device_id if re.fullmatch(r"0x[0-9a-f]{4}", device_id) else None,
        is_ecc_on=_ECC.get((text_of(values.get("ECC State")) or "").lower()),
        health="ok" if values.get("Device State") == "normal" else None,
    )
