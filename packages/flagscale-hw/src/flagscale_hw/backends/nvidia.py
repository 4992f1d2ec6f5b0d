"""NVIDIA: gate by device nodes, driver files and the bus; facts by NVML, nvidia-smi or the driver's files."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from flagscale_hw.asking import Asker, first_answer, is_hung
from flagscale_hw.backend import Found
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Problem

__all__ = ["CHIP", "look", "parse_csv"]

CHIP = "nvidia"

_UNKNOWN = re.compile(
    r"\[?(N/A|Not Supported|Insufficient Permissions|Unknown Error|GPU is lost|ERR!|-|/)?\]?", re.IGNORECASE
)
_REJECTED = re.compile(r'Field "([\w.]+)" is not a valid field')
_GPUS = "/proc/driver/nvidia/gpus"
_MAX_COMMAS = 3

# nvidia-smi's column -> our field.
_COLUMNS = {
    "index": "index",
    "uuid": "uuid",
    "name": "name",
    "memory.total": "memory_total_bytes",
    "memory.used": "memory_used_bytes",
    "utilization.gpu": "utilisation_percent",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "pci.bus_id": "pci_bus",
    "driver_version": "driver",
    "compute_cap": "compute_capability",
}
_NUMBERS = ("utilisation_percent", "temperature_c", "power_w")


def look(host: Host, timeout_s: float) -> Found:
    """Describe every NVIDIA device; a library or tool that hangs costs at most `timeout_s`."""
    asker = Asker(host, CHIP, timeout_s)
    found = first_answer(lambda: asker.library("flagscale_hw.backends.nvml"), lambda: _ask_tool(asker))
    if not found.devices or is_hung(found):
        found = replace(found, devices=_complete_from_files(host, found.devices))
    return found


def _ask_tool(asker: Asker) -> Found:
    tool = asker.tool("nvidia-smi")
    if tool is None:
        return asker.missing("nvidia-smi")
    columns = list(_COLUMNS)
    while True:
        answer = asker.ask([tool, f"--query-gpu={','.join(columns)}", "--format=csv,nounits"], parse_csv)
        rejected = _REJECTED.search(" ".join(problem.text for problem in answer.problems))
        if rejected is None or rejected[1] not in columns:
            return answer
        columns.remove(rejected[1])  # an older driver: ask for the rest


def parse_csv(text: str) -> Found:
    """Read the table of `nvidia-smi --query-gpu=... --format=csv` by its header, with or without units.

    Lines that are no rows, such as the report of a lost card between good ones, become problems.
    """
    header: list[str] = []
    devices: list[Device] = []
    problems: list[Problem] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        if not header and "index" in cells:
            header = cells
            continue
        device = _device(header, cells)
        if device is None:
            problems.append(Problem(where=CHIP, text=f"nvidia-smi: {line[:300]}"))
        else:
            devices.append(device)
    return Found(tuple(devices), tuple(problems))


def _device(header: list[str], cells: list[str]) -> Device | None:
    titles = [title.partition("[")[0].strip() for title in header]
    surplus = len(cells) - len(titles)
    if not titles or surplus < 0 or (surplus and "name" not in titles):
        return None
    if surplus > _MAX_COMMAS:
        return None
    if surplus:
        at = titles.index("name")  # the only column in which a comma may stand
        cells = [*cells[:at], ", ".join(cells[at : at + surplus + 1]), *cells[at + surplus + 1 :]]
    row = dict(zip(titles, cells, strict=True))
    if not row.get("index", "").isdigit():
        return None
    values = {ours: _value(ours, row[theirs]) for theirs, ours in _COLUMNS.items() if theirs in row}
    return Device(chip=CHIP, **values)


def _value(name: str, cell: str) -> Any:
    if name == "index":
        return int(cell)
    if _UNKNOWN.fullmatch(cell):
        return None
    if name == "pci_bus":
        return short_address(cell)
    if name in _NUMBERS or name.endswith("_bytes"):
        found = re.match(r"\d+(\.\d+)?(?=\s|%|$)", cell)
        if found is None:
            return None
        return int(float(found[0])) * (1 << 20) if name.endswith("_bytes") else float(found[0])
    return cell


def short_address(bus: str) -> str:
    """Write `00000000:3B:00.0` as the kernel does: `0000:3b:00.0`."""
    domain, _, rest = bus.lower().partition(":")
    return f"{domain[-4:]:0>4}:{rest}"


def _complete_from_files(host: Host, known: tuple[Device, ...]) -> tuple[Device, ...]:
    """Add the devices of which only the driver's files or the bus tell."""
    listed = [short_address(name) for name in host.names(_GPUS)]
    version = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", host.read("/proc/driver/nvidia/version") or "")
    driver = version[1] if version else None
    by_bus = {device.pci_bus: device for device in known}
    devices = [
        by_bus.get(bus) or replace(_from_driver_file(host, bus), index=index, driver=driver)
        for index, bus in enumerate(listed)
    ]
    if len(devices) >= len(known):
        return tuple(devices)
    return known


def _from_driver_file(host: Host, bus: str) -> Device:
    text = host.read(f"{_GPUS}/{bus}/information") or ""
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    uuid = facts.get("GPU UUID", "")
    return Device(
        chip=CHIP,
        index=0,
        name=facts.get("Model") or None,
        uuid=uuid
        if uuid and "?" not in uuid
        else None,  # the driver prints question marks until a first program ran
        pci_bus=bus,
    )
