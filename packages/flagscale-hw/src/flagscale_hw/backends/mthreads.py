"""Moore Threads: mthreads-gmi's table, and its list for the UUIDs.

A slice that a hypervisor cut from a card calls itself `Virtual`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flagscale_hw.asking import Asker, merge
from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import TITLES, device_of, with_processes
from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.values import NUMBER, UNKNOWN, clean, text_of
from flagscale_hw.host import Host
from flagscale_hw.machine import Device

__all__ = ["CHIP", "look", "parse_list", "parse_table"]

CHIP = "mthreads"
_AMOUNT = rf"{NUMBER}\s*[KMGT]i?B"
_TABLE = Table(
    anchor=r"ID\s+Name\s*\|\s*PCIe",
    columns=(
        Column(r"Pcie Lane Width", r"[0-9]+x\([0-9]+x\)"),
        Column(r"Device Type", r"(?P<kind>[A-Za-z]+(?: [A-Z][a-z]+)?)"),
        Column(r"%GPU", rf"(?P<utilisation>{NUMBER}\s*%)"),
        Column(r"MPC Capable", r"[A-Za-z]+"),
        Column(r"ECC Mode", r"\S.*"),
        Column(
            r"Mem",
            rf"(?:(?P<memory_used>{_AMOUNT})|{UNKNOWN})\s*\(\s*(?:(?P<memory_total>{_AMOUNT})|{UNKNOWN})\s*\)",
        ),
        Column(r"ID", r"(?P<index>[0-9]{1,4})"),
        *TITLES,
    ),
)
_LISTED = re.compile(r"\s*GPU (?P<index>[0-9]{1,4}):\s*(?P<name>.*?)\s*\(UUID\s*:\s*(?P<uuid>[\w-]+)\)\s*")


def look(host: Host, timeout_s: float) -> Found:
    """Describe every Moore Threads device; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("mthreads-gmi")
    if tool is None:
        return asker.missing("mthreads-gmi")
    found = asker.ask([tool], parse_table)
    if not found.devices:
        return found
    listed = asker.ask([tool, "--list-gpus"], parse_list)
    return replace(found, devices=merge(found.devices, listed.devices))


def parse_table(text: str) -> Found:
    """Read what `mthreads-gmi` draws, with or without the blanks between its columns."""
    version = re.search(r"Driver Version:\s*([\w.-]+)", text)
    driver = version[1] if version else None
    devices = [_device(row, driver) for row in _TABLE.read(text)]
    return Found(with_processes([device for device in devices if device is not None], text))


def _device(row: Row, driver: str | None) -> Device | None:
    kind = text_of(row.get("kind"))
    device = device_of(CHIP, row, is_virtual=None if kind is None else kind == "Virtual")
    return None if device is None else replace(device, driver=driver)


def parse_list(text: str) -> Found:
    """Read `mthreads-gmi --list-gpus`."""
    lines = [_LISTED.fullmatch(line) for line in clean(text).splitlines() if len(line) < 500]
    devices = [device_of(CHIP, line.groupdict()) for line in lines if line is not None]
    return Found(tuple(device for device in devices if device is not None))
