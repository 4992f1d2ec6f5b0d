"""Kunlunxin XPU: xpu_smi and xpu-smi, in the four forms that they have had.

Intel's tool is called xpu-smi too: only the bus tells whose chips these are.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flagscale_hw.asking import Asker, first_answer
from flagscale_hw.backend import Found
from flagscale_hw.backends.blocks import blocks, pairs
from flagscale_hw.backends.boxes import INDEX, MEMORY, NAME, TITLES, device_of, with_processes
from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.values import NUMBER, address, clean, text_of, whole
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Problem

__all__ = ["CHIP", "look", "parse_legacy", "parse_machine", "parse_report", "parse_table"]

CHIP = "kunlunxin"
_FOLDERS = ("/usr/local/xpu/bin", "/usr/local/bin", "/opt/xre/bin")
_TABLE = Table(
    anchor=r"XPU\s+Name\s.*Bus-?Id",
    columns=(
        Column(r"XPU-Util", rf"(?P<utilisation>{NUMBER}\s*%)"),
        Column(r"XPU", INDEX),
        *TITLES,
    ),
)
_LEGACY = Table(
    anchor=r"DevID\s*\|\s*PCI Addr",
    height=1,
    columns=(
        Column(r"DevID", INDEX),
        Column(r"Model", NAME),
        Column(r"SN", r"(?P<serial>\w+)"),
        Column(r"INODE", r"(?P<node>/dev/\w+)"),
        Column(r"UseRate", rf"(?P<utilisation>{NUMBER}\s*%)"),
        Column(r"L3", rf"{NUMBER}\s*/\s*{NUMBER}\s*[KM]i?B"),
        Column(r"Memory", MEMORY),
        *TITLES,
    ),
)
_WORD = re.compile(r'"([^"]*)"|(\S+)')
_LEAST_WORDS = 22
# Where `xpu_smi -m` says what; it has no header.
_BUS, _INDEX, _SERIAL, _TEMPERATURE, _POWER, _USED, _TOTAL, _LOAD, _MODEL = 0, 2, 3, 4, 8, 17, 18, 19, 21
_POWER_UNITS = {"P800": " W", "K200": " mW"}
"""Model -> what its power counts in; of other models nobody has said."""


def look(host: Host, timeout_s: float) -> Found:
    """Describe every Kunlunxin device; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("xpu_smi", "xpu-smi", folders=_FOLDERS)
    if tool is None:
        return asker.missing("xpu_smi")
    return first_answer(
        lambda: asker.ask([tool, "-m"], parse_machine),
        lambda: asker.ask([tool, "-q"], parse_report),
        lambda: asker.ask([tool], _parse_drawn),
    )


def _parse_drawn(text: str) -> Found:
    found = parse_table(text)
    return found if found.devices else parse_legacy(text)


def parse_machine(text: str) -> Found:
    """Read `xpu_smi -m`: words in fixed places. A line of which any place looks wrong is not believed."""
    devices = [_from_words(line) for line in clean(text).splitlines() if line.strip() and len(line) < 1000]
    return Found(tuple(device for device in devices if device is not None))


def _from_words(line: str) -> Device | None:
    found = list(_WORD.finditer(line))
    words = [match[1] if match[1] is not None else match[2] for match in found]
    quoted = [number for number, match in enumerate(found) if match[1] is not None]
    if len(words) < _LEAST_WORDS or quoted != [_MODEL] or address(words[_BUS]) is None:
        return None
    model = words[_MODEL]
    numbers = [words[place] for place in (_INDEX, _TEMPERATURE, _POWER, _USED, _TOTAL, _LOAD)]
    is_sane = all(re.fullmatch(NUMBER, number) for number in numbers)
    if not is_sane or float(words[_USED]) > float(words[_TOTAL]) or float(words[_LOAD]) > 100:
        return None
    unit = next((unit for name, unit in _POWER_UNITS.items() if model.startswith(name)), " ?")
    row: Row = {
        "bus": words[_BUS],
        "serial": words[_SERIAL],
        "name": model,
        "temperature": f"{words[_TEMPERATURE]} C",
        "power": words[_POWER] + unit,
        "memory_used": f"{words[_USED]} MiB",
        "memory_total": f"{words[_TOTAL]} MiB",
        "utilisation": f"{words[_LOAD]} %",
    }
    return device_of(CHIP, row, index=whole(words[_INDEX]))


def parse_report(text: str) -> Found:
    """Read `xpu-smi -q`; it has no indices, so devices count in its order."""
    head = pairs(text)
    driver = text_of(head.get("Driver Version"))
    devices: list[Device] = []
    for block in blocks(text, r"XPU (?P<bus>[0-9A-Fa-f]{4,8}:[0-9A-Fa-f:.]{7})"):
        row: Row = {"bus": block.title["bus"]}
        for field, key in _REPORT.items():
            value = block.get(key)
            if value is not None:
                row[field] = value
        device = device_of(CHIP, row, index=len(devices))
        devices += [replace(device, driver=driver)] if device is not None else []
    attached = whole(head.get("Attached XPUs"))
    if devices and attached is not None and attached != len(devices):
        text = f"xpu-smi: {attached} devices are attached and {len(devices)} described"
        return Found(tuple(devices), (Problem(where=CHIP, text=text),))
    return Found(tuple(devices))


_REPORT = {
    "name": "Product Name",
    "serial": "Serial Number",
    "memory_total": "Memory Usage/Total",
    "memory_used": "Memory Usage/Used",
    "utilisation": "Utilization/Xpu",
    "temperature": "Temperature/XPU Current Temp",
    "power": "Power Readings/Power Draw",
    "power_limit": "Power Readings/Enforced Power Limit",
}


def parse_table(text: str) -> Found:
    """Read what `xpu-smi` draws."""
    return _drawn(text, _TABLE)


def parse_legacy(text: str) -> Found:
    """Read what the older `xpu_smi` draws: one line per device."""
    return _drawn(text, _LEGACY)


def _drawn(text: str, table: Table) -> Found:
    version = re.search(r"Driver Version:\s*([\w.-]+)", text)
    devices = [device_of(CHIP, row, node=text_of(row.get("node"))) for row in table.read(text)]
    known = [replace(one, driver=version[1] if version else None) for one in devices if one is not None]
    return Found(with_processes(known, text))
