"""T-Head PPU: its library, which has NVML's functions under another prefix; ppu-smi's table and query.

Programs see a PPU through CUDA's names, and its tool prints a PCI device id with NVIDIA's vendor number in
it: what the bus says decides.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flagscale_hw.asking import Asker, first_answer, merge
from flagscale_hw.backend import Found
from flagscale_hw.backends.blocks import blocks, pairs
from flagscale_hw.backends.boxes import MEMORY, TITLES, device_of, field_values, with_processes
from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.csvs import FIELDS, parse_csv, query
from flagscale_hw.backends.values import text_of, whole
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Slice

__all__ = ["CHIP", "look", "parse_query", "parse_report", "parse_slices", "parse_table"]

CHIP = "thead"
_FOLDERS = ("/usr/local/PPU_SDK/ppu-smi/bin",)
_LIBRARIES = ("libhgml.so",)
_TABLE = Table(anchor=r"PPU\s+Name\s.*Bus-?Id", columns=TITLES)
_SLICES = Table(
    anchor=r"PPU\s+GI\s+CI\s+MIG.*Memory-Usage",
    columns=(
        Column(r"Memory-Usage", MEMORY),
        Column(r"PPU", r"(?P<index>[0-9]{1,4})"),
        Column(r"GI", r"(?P<gi>[0-9]{1,4})"),
        Column(r"CI", r"(?P<ci>[0-9]{1,4})"),
        Column(r"MIG", r"[0-9]{1,4}"),
        Column(r"Vol", r"[0-9]+\s+[0-9]+"),
        Column(r"Shared", r"[0-9 ]+"),
    ),
    height=1,
)


def look(host: Host, timeout_s: float) -> Found:
    """Describe every PPU; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    return first_answer(
        lambda: asker.library("flagscale_hw.backends.nvml", CHIP, "hgml", *_LIBRARIES),
        lambda: _ask_tool(asker),
    )


def _ask_tool(asker: Asker) -> Found:
    sdk = asker.host.environ.get("PPU_SDK")
    tool = asker.tool("ppu-smi", folders=(*([f"{sdk}/ppu-smi/bin"] if sdk else []), *_FOLDERS))
    if tool is None:
        return asker.missing("ppu-smi")
    found = asker.ask([tool], parse_table)
    named = query(asker, tool, "--query-ppu", ("index", "uuid", "name"), FIELDS)
    if not found.devices:
        return first_answer(lambda: named, lambda: found)
    return replace(found, devices=merge(found.devices, named.devices))


def parse_query(text: str) -> Found:
    """Read `ppu-smi --query-ppu=index,uuid,name --format=csv`."""
    return parse_csv(CHIP, "ppu-smi", text)


def parse_table(text: str) -> Found:
    """Read what `ppu-smi` draws, with the part about MIG devices."""
    version = re.search(r"Driver Version:\s*([\w.-]+)", text)
    slices = parse_slices(text)
    devices = [
        replace(device, driver=version[1] if version else None, slices=tuple(slices.get(device.index, ())))
        for device in (device_of(CHIP, row) for row in _TABLE.read(text))
        if device is not None
    ]
    return Found(with_processes(devices, text))


def parse_slices(text: str) -> dict[int, list[Slice]]:
    """Read the part about MIG devices: index of the PPU -> its slices."""
    found: dict[int, list[Slice]] = {}
    for row in _SLICES.read(text):
        index = whole(row.get("index"))
        if index is not None:
            found.setdefault(index, []).append(_slice(row))
    return found


def _slice(row: Row) -> Slice:
    memory = field_values(row)
    has_both = "gi" in row and "ci" in row
    return Slice(
        instance=f"{row['gi']}/{row['ci']}" if has_both else None,
        memory_total_bytes=memory["memory_total_bytes"],
        memory_used_bytes=memory["memory_used_bytes"],
    )


def parse_report(text: str) -> Found:
    """Read `ppu-smi -q`; the devices stand in the order of their indices."""
    driver = text_of(pairs(text).get("Driver Version"))
    devices: list[Device] = []
    for index, block in enumerate(blocks(text, r"PPU (?P<bus>[0-9A-Fa-f]{4,8}:[0-9A-Fa-f:.]{7})")):
        row: Row = {"bus": block.title["bus"]}
        for field, keys in _REPORT.items():
            value = block.get(*keys)
            if value is not None:
                row[field] = value
        device = device_of(CHIP, row, index=index)
        devices += [replace(device, driver=driver)] if device else []
    return Found(tuple(devices))


_REPORT = {
    "name": ("Product Name",),
    "uuid": ("PPU UUID",),
    "serial": ("Serial Number",),
    "utilisation": ("Utilization/Ppu",),
}
