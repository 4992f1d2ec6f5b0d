"""The table that most vendors' tools draw after nvidia-smi's: its titles, and devices from its rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.values import (
    NUMBER,
    UNKNOWN,
    address,
    bytes_of,
    celsius,
    clean,
    percent,
    text_of,
    watts,
    whole,
)
from flagscale_hw.machine import Device, DeviceProcess

__all__ = [
    "INDEX",
    "MEMORY",
    "NAME",
    "POWER",
    "TITLES",
    "TOGGLE",
    "device_of",
    "field_values",
    "read_processes",
    "with_processes",
]

_UNIT = r"(?:\s*[KMGT]i?B)?"
_BUS = r"(?P<bus>[0-9A-Fa-f]{2,8}:[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2})?\.[0-7])"
INDEX = r"(?P<index>[0-9]{1,4})"
NAME = r"(?P<name>\S(?:.*?\S)?)"
POWER = (
    rf"(?:(?P<power>{NUMBER}(?:\s*[A-Za-z]+)?)|{UNKNOWN})(?:\s*/\s*|\s+)"
    rf"(?:(?P<power_limit>{NUMBER}(?:\s*[A-Za-z]+)?)|{UNKNOWN})"
)
MEMORY = (
    rf"(?:(?P<memory_used>{NUMBER}{_UNIT})|{UNKNOWN})\s*/\s*"
    rf"(?:(?P<memory_total>{NUMBER}{_UNIT})|{UNKNOWN})"
)
TOGGLE = r"[A-Za-z][\w/]*"

# In this order: a longer title comes before the one that it contains.
TITLES = (
    Column(r"Bus-?Id|PCIe|PCI Addr", _BUS),
    Column(r"Disp\.A", TOGGLE),
    Column(r"Volatile Uncorr\. ECC|Ecc-Error", r"[0-9]+"),
    Column(r"Persist\S*(?: M\.)?", TOGGLE),
    Column(r"Memory-Usage(?:\([A-Za-z]+\))?", MEMORY),
    Column(r"Pwr:Usage/Cap|Pwr\(Usage/Cap\)", POWER),
    Column(r"(?:GPU|AIP|PPU)-Util", rf"(?P<utilisation>{NUMBER}\s*%)"),
    Column(r"Compute M\.|Compute-Mode", TOGGLE),
    Column(r"MIG M\.", r"(?P<mig>Enabled\*?|Disabled\*?)"),
    Column(r"Clock-(?:SM|Mem)", rf"{NUMBER}\s*[A-Za-z]+"),
    Column(r"Fan", rf"{NUMBER}\s*%"),
    Column(r"Temp(?:\(C\))?", rf"(?P<temperature>{NUMBER}(?:\s*[A-Za-z°℃]+)?)"),
    Column(r"Perf", r"P[0-9]+"),
    Column(r"Name", NAME),
    Column(r"GPU|AIP|PPU|Card|DEV", INDEX),
)

_PROCESSES = Table(
    anchor=r"\bPID\b|Process id",
    height=1,
    columns=(
        Column(r"Process memory(?:\([A-Za-z]+\))?", rf"(?P<memory_used>{NUMBER}{_UNIT})"),
        Column(r"(?:GPU|AIP|PPU|MLU) Memory(?: Usage)?", rf"(?P<memory_used>{NUMBER}{_UNIT})"),
        Column(r"Process id in container", r"[0-9]+"),
        Column(r"Process name|Command Line", NAME),
        Column(r"PID|Process id", r"(?P<pid>[0-9]{1,10})"),
        Column(r"GPU|AIP|PPU|Card|NPU", INDEX),
        Column(r"GI|CI|MI", r"[0-9]+"),
        Column(r"Chip", r"(?P<die>[0-9]{1,4})"),
        Column(r"Type", r"[A-Z+]+"),
    ),
)
_NO_PROCESS = re.compile(r"no (?:running )?process(?:es)? found", re.IGNORECASE)


def field_values(row: Row) -> dict[str, Any]:
    """Turn what a tool printed into the fields of a device, None for whatever is not such a value."""
    total = row.get("memory_total")
    used = row.get("memory_used")
    if used and total and used.strip().replace(".", "").isdecimal():
        used += re.sub(rf"^{NUMBER}", "", total)  # `826/65536 MiB`
    return {
        "name": text_of(row.get("name")),
        "uuid": text_of(row.get("uuid")),
        "serial": text_of(row.get("serial")),
        "driver": text_of(row.get("driver")),
        "pci_bus": address(row.get("bus")),
        "memory_total_bytes": bytes_of(total),
        "memory_used_bytes": bytes_of(used),
        "utilisation_percent": percent(row.get("utilisation")),
        "temperature_c": celsius(row.get("temperature")),
        "power_w": watts(row.get("power")),
        "power_limit_w": watts(row.get("power_limit")) or None,  # a limit of 0 W is none that is known
    }


def device_of(chip: str, row: Row, **more: Any) -> Device | None:
    """Make a device of a row; None when the row does not say which device it is."""
    index = more.pop("index") if "index" in more else whole(row.get("index"))
    if index is None:
        return None
    values = field_values(row)
    if not values["memory_total_bytes"]:
        values["memory_total_bytes"] = None  # a card without memory is a card that does not answer
        values["memory_used_bytes"] = values["memory_used_bytes"] or None
    values["is_sliced"] = {"enabled": True, "disabled": False}.get(row.get("mig", "").lower().rstrip("*"))
    return Device(chip=chip, index=index, **{**values, **more})


def read_processes(text: str) -> list[tuple[Row, DeviceProcess]] | None:
    """Read the table of processes; None when there is none or when it cannot know.

    An empty table is not the same as one that says that nothing runs: in a container the tool sees none.
    """
    rows = [(row, _process(row)) for row in _PROCESSES.read(text)]
    found = [(row, process) for row, process in rows if process is not None]
    return found if found or _NO_PROCESS.search(clean(text)) else None


def _process(row: Row) -> DeviceProcess | None:
    pid = row.get("pid", "")
    if not pid.isdecimal():
        return None
    memory = bytes_of(row.get("memory_used"))
    return DeviceProcess(pid=int(pid), name=text_of(row.get("name")), memory_used_bytes=memory)


def with_processes(devices: Sequence[Device], text: str) -> tuple[Device, ...]:
    """Give every device its processes, as the same output of the tool tells them."""
    said = read_processes(text)
    if said is None:
        return tuple(devices)
    return tuple(
        replace(
            device,
            processes=tuple(process for row, process in said if whole(row.get("index")) == device.index),
        )
        for device in devices
    )
