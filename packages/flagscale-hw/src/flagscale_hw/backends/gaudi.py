"""Intel Gaudi: hl-smi's query, and its table where that is not understood.

Programs select devices by the number of the module on its board, which is not the index.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flagscale_hw.asking import Asker, first_answer
from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import TITLES, device_of, with_processes
from flagscale_hw.backends.columns import Table
from flagscale_hw.backends.csvs import FIELDS, parse_csv
from flagscale_hw.host import Host

__all__ = ["CHIP", "look", "parse_query", "parse_table"]

CHIP = "gaudi"
_QUERY = ("index", "module_id", "bus_id", "memory.used", "temperature.aip")
_FIELDS = {
    **FIELDS,
    "module_id": ("physical_index", ""),
    "bus_id": ("bus", ""),
    "temperature.aip": ("temperature", " C"),
}
_TABLE = Table(anchor=r"AIP\s+Name\s.*Bus-?Id", columns=TITLES)


def look(host: Host, timeout_s: float) -> Found:
    """Describe every Gaudi device; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("hl-smi")
    if tool is None:
        return asker.missing("hl-smi")
    found = asker.ask([tool], parse_table)
    modules = asker.ask([tool, "-Q", ",".join(_QUERY), "-f", "csv,noheader"], parse_query)
    if not found.devices:
        return first_answer(lambda: modules, lambda: found)
    by_index = {device.index: device.physical_index for device in modules.devices}
    devices = [replace(device, physical_index=by_index.get(device.index)) for device in found.devices]
    return replace(found, devices=tuple(devices))


def parse_query(text: str) -> Found:
    """Read `hl-smi -Q index,module_id,bus_id,memory.used,temperature.aip -f csv,noheader`."""
    return parse_csv(CHIP, "hl-smi", text, _FIELDS, header=_QUERY)


def parse_table(text: str) -> Found:
    """Read what `hl-smi` draws."""
    devices = [device_of(CHIP, row) for row in _TABLE.read(text)]
    version = re.search(r"Driver Version:\s*([\w.-]+)", text)
    known = [replace(one, driver=version[1] if version else None) for one in devices if one is not None]
    return Found(with_processes(known, text))
