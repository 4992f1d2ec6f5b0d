"""MetaX: mx-smi's table, and its list for UUIDs and states. Other brands of the same stack bring ht-smi.

Programs see these chips through CUDA's names.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flagscale_hw.asking import Asker, first_answer, merge
from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import NAME, TITLES, device_of, with_processes
from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.values import NUMBER, clean, text_of
from flagscale_hw.host import Host
from flagscale_hw.machine import Device

__all__ = ["CHIP", "look", "parse_list", "parse_table"]

CHIP = "metax"
_FOLDERS = ("/opt/mxdriver/bin", "/opt/maca/bin", "/opt/mxn100/bin", "/opt/hpcc/bin")
_TABLE = Table(
    anchor=r"(?:Board|GPU)\s+Name\s.*\|\s*Bus-?Id",
    columns=(
        Column(r"Board", r"(?P<board>[0-9]{1,4})"),
        Column(r"GPU-State", r"(?P<state>[A-Za-z]\S*(?: \S+)*)"),
        Column(r"sGPU-M", r"[A-Za-z/]+"),
        Column(r"Power", rf"(?P<power>{NUMBER}\s*m?W)"),
        Column(r"Name", NAME),
        *TITLES,
    ),
)
_LISTED = re.compile(
    r"\s*GPU#(?P<index>[0-9]{1,4})\s+(?P<name>\S+)\s+(?P<bus>\S+)\s+"
    r"(?P<state>Available|Not Available(?:\([^()]*\))?)\s*(?:\(UUID:\s*(?P<uuid>[\w-]+)\))?\s*"
)
_STATE = re.compile(r"(?P<state>Available|Not Available)(?:\((?P<reason>.*)\))?")


def look(host: Host, timeout_s: float) -> Found:
    """Describe every MetaX device; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("mx-smi", "ht-smi", folders=_FOLDERS)
    if tool is None:
        return asker.missing("mx-smi")
    found = asker.ask([tool], parse_table)
    listed = asker.ask([tool, "-L"], parse_list)
    if not found.devices:
        return first_answer(lambda: listed, lambda: found)
    devices = merge(found.devices, listed.devices)
    known = {device.index for device in devices}
    # A card that does not answer stands in the list and not in the table.
    lost = tuple(device for device in listed.devices if device.index not in known)
    return replace(found, devices=tuple(sorted((*devices, *lost), key=lambda device: device.index)))


def parse_table(text: str) -> Found:
    """Read what `mx-smi` draws, of any version from 2.1."""
    version = re.search(r"Kernel Mode Driver Version:\s*([\w.-]+)", text)
    driver = version[1] if version else None
    devices = [_device(row, driver) for row in _TABLE.read(text)]
    return Found(with_processes([device for device in devices if device is not None], text))


def parse_list(text: str) -> Found:
    """Read `mx-smi -L`."""
    lines = [_LISTED.fullmatch(line) for line in clean(text).splitlines() if len(line) < 500]
    rows = [
        {k: v for k, v in line.groupdict().items() if v is not None} for line in lines if line is not None
    ]
    devices = [_device(row, None) for row in rows]
    return Found(tuple(device for device in devices if device is not None))


def _device(row: Row, driver: str | None) -> Device | None:
    state = _STATE.fullmatch(row.get("state", ""))
    reason = state["reason"] if state else None
    device = device_of(CHIP, row, board=text_of(row.get("board")))
    if device is None or state is None:
        return None if device is None else replace(device, driver=driver)
    return replace(
        device,
        driver=driver,
        health="ok" if state["state"] == "Available" else "bad",
        health_reasons=(reason,) if reason else (),
    )
