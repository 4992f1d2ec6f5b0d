"""Huawei Ascend: npu-smi's table and its mapping of chips.

Three numbers are told apart. The NPU id names the card; the chip id a die on it; programs use the logic id,
or on cards whose table has a column Phy-ID that one, which is also the number of the device node.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from flagscale_hw.asking import Asker
from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import TITLES, device_of, read_processes
from flagscale_hw.backends.columns import Column, Row, Table
from flagscale_hw.backends.values import NUMBER, bytes_of, clean, whole
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Health, Problem

__all__ = ["CHIP", "apply_mapping", "look", "parse_mapping", "parse_table"]

CHIP = "ascend"
_FOLDERS = ("/usr/local/sbin", "/usr/local/Ascend/driver/tools")
_SMALL = r"[0-9]{1,4}"
_TABLE = Table(
    anchor=r"NPU(?: ID)?[\s|]+Name\s.*Health",
    columns=(
        Column(r"NPU Util(?:\(%\))?|AICore(?:\(%\))?", rf"(?P<utilisation>{NUMBER})"),
        Column(r"NPU ID|NPU", rf"(?P<board>{_SMALL})"),
        Column(r"Health", r"(?P<health>[A-Za-z]+)"),
        Column(r"Power(?:\([A-Za-z]+\))?", rf"(?P<power>{NUMBER})"),
        Column(r"Hugepages-Usage(?:\([A-Za-z]+\))?", r"[0-9]+\s*/\s*[0-9]+"),
        Column(r"HBM-Usage(?:\([A-Za-z]+\))?", rf"(?P<hbm_used>{NUMBER})\s*/\s*(?P<hbm_total>{NUMBER})"),
        Column(r"Phy-ID", rf"(?P<physical>{_SMALL})"),
        Column(r"Device", rf"(?P<device>{_SMALL})"),
        Column(r"Chip", rf"(?P<die>{_SMALL})"),
        *TITLES,
    ),
)
_MAPPING = Table(
    anchor=r"NPU ID\s+.*Chip ID",
    height=1,
    columns=(
        Column(r"NPU ID", rf"(?P<board>{_SMALL})"),
        Column(r"Slot ID", _SMALL),
        Column(r"Chip ID", rf"(?P<die>{_SMALL})"),
        Column(r"Chip Logic ID", rf"(?P<logic>{_SMALL})"),
        Column(r"Chip Phy-ID", rf"(?P<physical>{_SMALL})"),
        Column(r"Chip Name", r"(?P<name>\S(?:.*?\S)?)"),
    ),
)
_HEALTH: dict[str, Health] = {
    "ok": "ok",
    "warning": "degraded",
    "alarm": "bad",
    "critical": "bad",
    "fault": "bad",
}
_DENIED = re.compile(r"-8005\b")


def look(host: Host, timeout_s: float) -> Found:
    """Describe every NPU; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("npu-smi", folders=_FOLDERS)
    if tool is None:
        return asker.missing("npu-smi")
    found = asker.ask([tool, "info"], parse_table)
    if not found.devices:
        return replace(found, problems=tuple(map(_explained, found.problems)))
    mapping = asker.run([tool, "info", "-m"])
    if isinstance(mapping, Problem):
        return found
    return replace(found, devices=apply_mapping(found.devices, parse_mapping(mapping.output)))


def _explained(problem: Problem) -> Problem:
    if _DENIED.search(problem.text) is None:
        return problem
    hint = "the driver refuses this user or container: join its group (HwHiAiUser) or ask as root"
    return replace(problem, hint=hint)


def parse_table(text: str) -> Found:
    """Read `npu-smi info`.

    The index of a device is its Phy-ID where the table has that column, else its place in the table, which
    is the logic id as long as the table is whole.
    """
    version = re.search(r"\bVersion:\s*([\w.-]+)", text)
    devices: list[Device] = []
    for row in _TABLE.read(text):
        device = _device(row, len(devices), version[1] if version else None)
        devices += [device] if device is not None else []
    return Found(_with_processes(devices, text))


def _device(row: Row, place: int, driver: str | None) -> Device | None:
    if "board" not in row:
        return None
    physical = whole(row.get("physical"))
    device = device_of(
        CHIP,
        row,
        index=place if physical is None else physical,
        physical_index=whole(row.get("device")) if physical is None else physical,
        board=row["board"],
        die=whole(row.get("die")),
        health=_HEALTH.get(row.get("health", "").lower()),
    )
    if device is None:
        return None
    # Cards with HBM show the little memory of their control processor as well.
    hbm = bytes_of(row.get("hbm_total"))
    if hbm:
        device = replace(device, memory_total_bytes=hbm, memory_used_bytes=bytes_of(row.get("hbm_used")))
    reasons = (row["health"],) if device.health in ("degraded", "bad") else ()
    return replace(device, driver=driver, health_reasons=reasons)


def _with_processes(devices: Sequence[Device], text: str) -> tuple[Device, ...]:
    said = read_processes(text)
    if said is None:
        return tuple(devices)
    return tuple(
        replace(
            device,
            processes=tuple(
                process
                for row, process in said
                if row.get("index") == device.board and whole(row.get("die")) in (device.die, None)
            ),
        )
        for device in devices
    )


def parse_mapping(text: str) -> list[Row]:
    """Read `npu-smi info -m`: card and die -> logic id, Phy-ID and name; without management processors."""
    rows = _MAPPING.read(clean(text))
    return [row for row in rows if row.get("name", "").lower() != "mcu" and "board" in row]


def apply_mapping(devices: Sequence[Device], mapping: Sequence[Row]) -> tuple[Device, ...]:
    """Give devices the logic ids that the mapping tells; Phy-ID where it tells that instead.

    A mapping that names one id twice, or does not know one of the devices, is not used at all.
    """
    ids = {
        (row["board"], whole(row.get("die"))): (whole(row.get("logic")), whole(row.get("physical")))
        for row in mapping
    }
    found = [ids.get((device.board or "", device.die or 0)) for device in devices]
    indices = [None if one is None else (one[1] if one[0] is None else one[0]) for one in found]
    if None in indices or len(set(indices)) < len(indices):
        return tuple(devices)
    return tuple(
        replace(
            device,
            index=index or 0,
            physical_index=device.physical_index if one is None or one[1] is None else one[1],
        )
        for device, index, one in zip(devices, indices, found, strict=True)
    )
