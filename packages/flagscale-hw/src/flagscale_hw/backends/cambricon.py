"""Cambricon MLU: cnmon's JSON, which it writes into a file, and its table.

A board with two chips shows two cards; the memory is what a program can use, not what is soldered on.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from flagscale_hw.asking import Asker, first_answer, merge
from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import NAME, TITLES, device_of, with_processes
from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.values import NUMBER, whole
from flagscale_hw.host import Host

__all__ = ["CHIP", "look", "parse_json", "parse_table"]

CHIP = "cambricon"
# It writes `cnmon_info.json` where it stands, which is a temporary folder, and says nothing.
_JSON = '"$0" info -e -m -u -j >&2; cat cnmon_info.json'
_TABLE = Table(
    anchor=r"Card\s+VF\s+Name",
    columns=(
        Column(r"VF", r"(?:/|[0-9]+)"),
        Column(r"Firmware", r"v?[\w.]+"),
        Column(r"Name", NAME),
        Column(r"Util", rf"(?P<utilisation>{NUMBER}\s*%)"),
        Column(r"SR-IOV|Mode", r"[\w/]+"),
        *TITLES,
    ),
)


def look(host: Host, timeout_s: float) -> Found:
    """Describe every MLU; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("cnmon")
    if tool is None:
        return asker.missing("cnmon")
    table = asker.ask([tool], parse_table)
    if not table.devices:
        return first_answer(lambda: table, lambda: asker.ask(["/bin/sh", "-c", _JSON, tool], parse_json))
    more = asker.ask(["/bin/sh", "-c", _JSON, tool], parse_json)
    return replace(table, devices=merge(table.devices, more.devices))


def parse_table(text: str) -> Found:
    """Read what `cnmon` draws."""
    version = re.search(r"Driver v?([\w.-]+)", text)
    devices = [device_of(CHIP, row) for row in _TABLE.read(text)]
    known = [replace(one, driver=version[1] if version else None) for one in devices if one is not None]
    return Found(with_processes(known, text))


def parse_json(text: str) -> Found:
    """Read the file that `cnmon info -e -m -u -j` writes: memory in MiB, temperature in degrees Celsius."""
    try:
        cards = json.loads(text)["CnmonInfo"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Found()
    devices = []
    for card in cards if isinstance(cards, list) else ():
        device = device_of(CHIP, _row(card), index=whole(_at(card, "CardNum")))
        devices += [device] if device is not None else []
    return Found(tuple(devices))


_PATHS = {
    "name": (("ProductName",), ""),
    "uuid": (("UUID",), ""),
    "memory_total": (("PhysicalMemUsage", "Total"), " MiB"),
    "memory_used": (("PhysicalMemUsage", "Used"), " MiB"),
    "temperature": (("Temperature", "Chip"), " C"),
    "utilisation": (("Utilization", "MLUAverage"), " %"),
}


def _row(card: object) -> Row:
    row: Row = {}
    for field, (path, unit) in _PATHS.items():
        value = _at(card, *path)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            is_bare = str(value).replace(".", "", 1).isdecimal()
            row[field] = f"{value}{unit if is_bare else ''}"
    return row


def _at(value: Any, *path: str) -> Any:
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value
