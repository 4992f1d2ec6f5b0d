"""Iluvatar CoreX: its library, which has NVML's functions under another file name; ixsmi's query and table.

A board with two chips shows two devices, and the power of the board at one of them only.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flagscale_hw.asking import Asker, first_answer
from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import TITLES, device_of, with_processes
from flagscale_hw.backends.columns import Table
from flagscale_hw.backends.csvs import FIELDS, parse_csv, query
from flagscale_hw.host import Host

__all__ = ["CHIP", "look", "parse_query", "parse_table"]

CHIP = "iluvatar"
_FOLDERS = ("/usr/local/corex/bin",)
_LIBRARIES = ("libixml.so", "/usr/local/corex/lib64/libixml.so", "/usr/local/corex/lib/libixml.so")
_QUERY = ("index", "name", "memory.total", "memory.used", "utilization.gpu", "temperature.gpu")
_TABLE = Table(anchor=r"GPU\s+Name\s.*Bus-?Id", columns=TITLES)


def look(host: Host, timeout_s: float) -> Found:
    """Describe every Iluvatar device; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("ixsmi", folders=_FOLDERS)
    if tool is None:
        return first_answer(
            lambda: asker.library("flagscale_hw.backends.nvml", CHIP, "nvml", *_LIBRARIES),
            lambda: asker.missing("ixsmi"),
        )
    return first_answer(
        lambda: asker.library("flagscale_hw.backends.nvml", CHIP, "nvml", *_LIBRARIES),
        lambda: asker.ask([tool], parse_table),  # tells more than the query does: bus, power, processes
        lambda: query(asker, tool, "--query-gpu", _QUERY, FIELDS),
    )


def parse_query(text: str) -> Found:
    """Read `ixsmi --query-gpu=... --format=csv,noheader`."""
    return parse_csv(CHIP, "ixsmi", text, header=_QUERY)


def parse_table(text: str) -> Found:
    """Read what `ixsmi` draws."""
    devices = [device_of(CHIP, row) for row in _TABLE.read(text)]
    version = re.search(r"Driver Version:\s*([\w.-]+)", text)
    known = [replace(one, driver=version[1] if version else None) for one in devices if one is not None]
    return Found(with_processes(known, text))
