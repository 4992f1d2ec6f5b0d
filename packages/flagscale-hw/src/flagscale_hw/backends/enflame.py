"""Enflame GCU: efsmi's report and table. What a card offers depends on its ECC."""

from __future__ import annotations

import re
from dataclasses import replace

from flagscale_hw.asking import Asker, first_answer
from flagscale_hw.backend import Found
from flagscale_hw.backends.blocks import Block, blocks
from flagscale_hw.backends.boxes import TITLES, device_of
from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.values import NUMBER, text_of
from flagscale_hw.host import Host
from flagscale_hw.machine import Device

__all__ = ["CHIP", "look", "parse_report", "parse_table"]

CHIP = "enflame"
_TABLE = Table(
    anchor=r"DEV\s+NAME\s.*BUS-?ID",
    columns=(
        Column(r"FW VER", r"[\w.]+"),
        Column(r"ECC", r"(?P<ecc>Enable|Disable)"),
        Column(r"Dpm", r"[A-Za-z]+"),
        Column(r"GCU Virt", r"[A-Za-z]+"),
        Column(r"Mem", rf"(?P<memory_total>{NUMBER}\s*[KMGT]i?B)"),
        Column(r"DUsed", rf"(?P<utilisation>{NUMBER}\s*%)"),
        Column(r"SN", r"(?P<serial>\w+)"),
        *TITLES,
    ),
)
_HEX = re.compile(r"[0-9a-fA-F]{1,4}")
_REPORT = {
    "name": ("Device Info/Dev Name", "Dev Name"),
    "uuid": ("Device Info/Dev UUID", "Dev UUID"),
    "serial": ("Device Info/Dev SN", "Dev SN"),
    "driver": ("Driver Info/Ver",),
    "memory_total": ("Device Mem Info/Total Size", "Device Mem Info/Mem Size"),
    "memory_used": ("Device Mem Info/Used Size", "Device Mem Info/Mem Usage"),
    "power": ("Power Info/Cur Power",),
    "power_limit": ("Power Info/Power Capa",),
    "temperature": ("Temperature Info/GCU Temp",),
    "utilisation": ("Device Usage Info/GCU Usage",),
}
_ECC = {"enable": True, "disable": False}


def look(host: Host, timeout_s: float) -> Found:
    """Describe every GCU; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("efsmi", folders=("/usr/local/efsmi/bin",))
    if tool is None:
        return asker.missing("efsmi")
    return first_answer(lambda: asker.ask([tool, "-q"], parse_report), lambda: asker.ask([tool], parse_table))


def parse_table(text: str) -> Found:
    """Read what `efsmi` draws."""
    version = re.search(r"Driver Ver:\s*([\w.-]+)", text)
    devices = [
        device_of(CHIP, row, is_ecc_on=_ECC.get(row.get("ecc", "").lower())) for row in _TABLE.read(text)
    ]
    known = [replace(one, driver=version[1] if version else None) for one in devices if one is not None]
    return Found(tuple(known))


def parse_report(text: str) -> Found:
    """Read `efsmi -q`."""
    devices = [_device(block) for block in blocks(text, r"DEV ID (?P<index>[0-9]{1,4})")]
    return Found(tuple(device for device in devices if device is not None))


def _device(block: Block) -> Device | None:
    row: Row = {"index": block.title["index"]}
    for field, keys in _REPORT.items():
        value = block.get(*keys)
        if value is not None:
            row[field] = value
    # Hexadecimal without a mark; `Dev` is the number on the bus and `Device ID` the model.
    place = [block.get(f"PCIe Info/{key}") or "" for key in ("Domain", "Bus", "Dev", "Func")]
    if all(_HEX.fullmatch(part) for part in place):
        row["bus"] = f"{place[0]:0>4}:{place[1]:0>2}:{place[2]:0>2}.{place[3]}"
    healthy = block.get("Device Info/Health", "Health")
    model = block.get("PCIe Info/Device ID") or ""
    return device_of(
        CHIP,
        row,
        is_ecc_on=_ECC.get((text_of(block.get("ECC Mode/Current")) or "").lower()),
        health={"True": "ok", "False": "bad"}.get(healthy or ""),
        pci_device_id=f"0x{model.lower()}" if _HEX.fullmatch(model) else None,
    )
