"""The reports of rocm-smi and its relatives, which AMD and Hygon share: JSON, the concise table, rocminfo.

The keys of the JSON differ from release to release, and an empty one occurs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flagscale_hw.backend import Found
from flagscale_hw.backends.blocks import Block, blocks
from flagscale_hw.backends.boxes import INDEX, device_of
from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.values import NUMBER, clean, text_of, whole
from flagscale_hw.machine import Device

__all__ = ["OPTIONS", "parse_concise", "parse_json", "parse_rocminfo"]

OPTIONS = (
    "--showproductname",
    "--showuniqueid",
    "--showserial",
    "--showbus",
    "--showuse",
    "--showtemp",
    "--showpower",
    "--showmeminfo",
    "vram",
    "--showdriverversion",
    "--json",
)
_HEX = re.compile(r"0x[0-9a-fA-F]{1,8}")
_CARD = re.compile(r"card([0-9]{1,4})")
# Field -> keys without their unit, the best first. Case differs from release to release.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "name": ("card series", "device name", "card model"),
    "uuid": ("unique id",),
    "serial": ("serial number",),
    "bus": ("pci bus",),
    "memory_total": ("vram total memory",),
    "memory_used": ("vram total used memory",),
    "utilisation": ("gpu use", "dcu use", "hcu use"),
    "temperature": ("temperature (sensor edge)", "temperature (sensor junction)"),
    "power": ("average graphics package power", "current socket graphics package power"),
    "power_limit": ("max graphics package power",),
    "device": ("device id",),
}
_UNIT = re.compile(r"(.*) \((B|KB|MB|MiB|GB|GiB|%|C|W|mW)\)")
_CONCISE = Table(
    anchor=r"^\s*(?:Device|GPU|DCU|HCU)\s.*(?:GPU|DCU|HCU)%",
    height=1,
    columns=(
        Column(r"(?:GPU|DCU|HCU)%", rf"(?P<utilisation>{NUMBER}\s*%)"),
        Column(r"VRAM%|Mem%|Fan", rf"{NUMBER}\s*%"),
        Column(r"Device|GPU|DCU|HCU", INDEX),
        Column(r"Node", r"[0-9]+"),
        Column(r"IDs", r"(?P<device>0x[0-9A-Fa-f]{1,8}),\s*[0-9]+"),
        Column(r"Temp(?: \([A-Za-z]+\))?", rf"(?P<temperature>{NUMBER}\s*(?:°?[Cc]|℃))"),
        Column(r"AvgPwr|Power(?: \([A-Za-z]+\))?", rf"(?P<power>{NUMBER}\s*m?W)"),
        Column(r"Partitions", r"\w+,\s*\w+,\s*[0-9]+"),
        Column(r"SCLK|MCLK", rf"{NUMBER}\s*[A-Za-z]+"),
        Column(r"PwrCap", rf"(?P<power_limit>{NUMBER}\s*m?W)"),
        Column(r"Perf", r"[a-z_]+"),
    ),
)


def parse_json(chip: str, text: str) -> Found:
    """Read `rocm-smi ... --json`, also behind warnings; `card<n>` is device n."""
    document = _first_object(clean(text))
    driver = _said(document.get("system")).get("driver version")
    devices = []
    for name, values in document.items():
        number = _CARD.fullmatch(name)
        if number is not None and isinstance(values, dict):
            row = _row(values)
            if driver is not None:
                row["driver"] = driver
            device = _device(chip, int(number[1]), row)
            devices += [device] if device is not None else []
    return Found(tuple(sorted(devices, key=lambda device: device.index)))


def _first_object(text: str) -> dict[str, Any]:
    start = text.find("{")
    try:
        document = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else {}
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _said(values: object) -> Row:
    """Return what an object says, by key without its unit, with the unit at the value."""
    said: Row = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, str) and text_of(value) is not None:
            title = _UNIT.fullmatch(" ".join(key.split()))
            name = title[1] if title else " ".join(key.split())
            said.setdefault(name.lower(), f"{value} {title[2]}" if title else value)
    return said


def _row(values: object) -> Row:
    said = _said(values)
    known = {field: [said[key] for key in keys if key in said] for field, keys in _KEYS.items()}
    return {field: values[0] for field, values in known.items() if values}


def _device(chip: str, index: int, row: Row) -> Device | None:
    device_id = row.get("device", "").lower()
    if _HEX.fullmatch(row.get("name", "")):
        row = {**row, "name": "N/A"}  # older tools repeat the id of the device where its name belongs
    return device_of(chip, row, index=index, pci_device_id=device_id if _HEX.fullmatch(device_id) else None)


def parse_concise(chip: str, text: str) -> Found:
    """Read the table that the tool draws by itself: it tells neither model nor size of memory."""
    devices = [_device(chip, int(row["index"]), row) for row in _CONCISE.read(text) if "index" in row]
    return Found(tuple(device for device in devices if device is not None))


def parse_rocminfo(chip: str, text: str) -> Found:
    """Read `rocminfo`: its agents that are no processors, in the order in which the runtime numbers them."""
    devices: list[Device] = []
    for block in blocks(text, r"Agent ([0-9]{1,4})"):
        if block.get("Device Type") in ("GPU", "DCU", "HCU"):
            device = _device(chip, len(devices), _agent(block))
            devices += [device] if device is not None else []
    return Found(tuple(devices))


def _agent(block: Block) -> Row:
    row: Row = {}
    for field, key in (("name", "Marketing Name"), ("uuid", "Uuid")):
        value = text_of(block.get(key))
        if value is not None and not value.endswith("-XX"):
            row[field] = value
    place = whole(block.get("BDFID"))
    if place is not None and place > 0xFF:  # some give a small number that is no place on a bus
        row["bus"] = f"0000:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"
    chip_id = re.fullmatch(r"[0-9]+\((0x[0-9a-f]+)\)", block.get("Chip ID") or "")
    if chip_id is not None:
        row["device"] = chip_id[1]
    return row
