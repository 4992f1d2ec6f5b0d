"""NVIDIA: gate by device nodes, driver files and the bus; facts by NVML, nvidia-smi or the driver's files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from flagscale_hw.backend import Found, Presence, pci_functions
from flagscale_hw.host import Answer, Host
from flagscale_hw.machine import Device, Problem

__all__ = ["CHIP", "look", "parse_csv", "presence", "visible"]

CHIP = "nvidia"

_VENDOR = "0x10de"
_CLASSES = frozenset({"0300", "0302"})
_NODE = re.compile(r"nvidia\d+")
_UNKNOWN = re.compile(
    r"\[?(N/A|Not Supported|Insufficient Permissions|Unknown Error|GPU is lost|ERR!|-|/)?\]?", re.IGNORECASE
)
_REJECTED = re.compile(r'Field "([\w.]+)" is not a valid field')
_GPUS = "/proc/driver/nvidia/gpus"
_MAX_COMMAS = 3
_HIDE_ALL = ("-1", "NoDevFiles")

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


def presence(host: Host) -> Presence:
    """Say whether NVIDIA devices are here and whether their driver is."""
    nodes = host.names("/dev")
    # WSL has neither bus nor nodes, only one paravirtual device and the library that Windows lends.
    is_wsl = "dxg" in nodes and host.path("/usr/lib/wsl/lib/libnvidia-ml.so.1").exists()
    if is_wsl or any(_NODE.fullmatch(node) for node in nodes):
        return "usable"
    if host.read("/proc/driver/nvidia/version") is not None and host.names(_GPUS):
        return "usable"
    return "bus_only" if pci_functions(host, _VENDOR, _CLASSES) else "none"


def look(host: Host, timeout_s: float) -> Found:
    """Describe every NVIDIA device; a library or tool that hangs costs at most `timeout_s`."""
    found = _ask_library(host, timeout_s) if host.is_real else Found()
    has_hung = any("no answer within" in problem.text for problem in found.problems)
    if not found.devices and not has_hung:
        tool = _ask_tool(host, timeout_s)
        found = Found(tool.devices, found.problems + tool.problems if not tool.devices else tool.problems)
    if not found.devices or has_hung:
        found = Found(_complete_from_files(host, found.devices), found.problems)
    if not found.devices and not found.problems:
        return Found(problems=(Problem(where=CHIP, text="the driver is loaded but lists no device"),))
    return found


def _ask_library(host: Host, timeout_s: float) -> Found:
    answer = host.run_module("flagscale_hw.nvml", timeout_s)
    devices: list[Device] = []
    problems: list[Problem] = []
    is_done = False
    for line in answer.output.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # libraries print to standard output when they please
        if "device" in said:
            devices.append(Device(**said["device"]))
        elif "problem" in said:
            problems.append(Problem(**said["problem"]))
        is_done = is_done or "done" in said
    if answer.exit_code is None:
        problems.append(_hung("libnvidia-ml.so.1", timeout_s))
    elif not is_done and not problems:
        problems.append(Problem(where=CHIP, text=f"libnvidia-ml.so.1: {_last_line(answer)}"))
    return Found(tuple(devices), tuple(problems))


def _hung(what: str, timeout_s: float) -> Problem:
    return Problem(
        where=CHIP,
        text=f"{what}: no answer within {timeout_s:g} s; it was killed",
        hint="look for Xid errors in the kernel log; a card may need a reset",
    )


def _last_line(answer: Answer) -> str:
    lines = [line.strip() for line in (answer.errors + "\n" + answer.output).splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with code {answer.exit_code} and no message"


def _ask_tool(host: Host, timeout_s: float) -> Found:
    tool = host.find_tool("nvidia-smi")
    if tool is None:
        return Found(
            problems=(Problem(where=CHIP, text="nvidia-smi: not found", hint="install the driver's tools"),)
        )
    columns = list(_COLUMNS)
    while columns:
        try:
            answer = host.run([tool, f"--query-gpu={','.join(columns)}", "--format=csv,nounits"], timeout_s)
        except OSError as error:
            return Found(problems=(Problem(where=CHIP, text=f"nvidia-smi: {error.strerror}"),))
        if answer.exit_code is None:
            return Found(problems=(_hung("nvidia-smi", timeout_s),))
        rejected = _REJECTED.search(answer.output + answer.errors)
        if rejected is None or rejected[1] not in columns:
            break
        columns.remove(rejected[1])  # an older driver: ask for the rest
    found = parse_csv(answer.output)
    if answer.exit_code != 0 and not found.problems:
        return Found(found.devices, (Problem(where=CHIP, text=f"nvidia-smi: {_last_line(answer)}"),))
    return found


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
    addresses = listed or [function.address for function in pci_functions(host, _VENDOR, _CLASSES)]
    version = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", host.read("/proc/driver/nvidia/version") or "")
    driver = version[1] if version else None
    by_bus = {device.pci_bus: device for device in known}
    devices = [
        by_bus.get(bus) or replace(_from_driver_file(host, bus), index=index, driver=driver)
        for index, bus in enumerate(addresses)
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


def visible(host: Host, devices: tuple[Device, ...]) -> tuple[tuple[int, ...] | None, tuple[Problem, ...]]:
    """Read `CUDA_VISIBLE_DEVICES` as CUDA does: it stops at the first entry that names no device."""
    text = host.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None, ()
    chosen: list[int] = []
    entries = [entry.strip() for entry in text.split(",")] if text.strip() else []
    for entry in entries:
        index = _index_of(entry, devices)
        if index is None:
            if entry in _HIDE_ALL:
                return tuple(chosen), ()
            return tuple(chosen), (_doubt(text, f"{entry!r} names no device; CUDA stops before it", devices),)
        if index in chosen:
            return (), (_doubt(text, f"{entry!r} is named twice; CUDA then uses none", devices),)
        chosen.append(index)
    return tuple(chosen), ()


def _doubt(text: str, what: str, devices: tuple[Device, ...]) -> Problem:
    return Problem(
        where=CHIP,
        text=f"CUDA_VISIBLE_DEVICES={text}: {what}",
        hint=f"give indices 0 to {len(devices) - 1} or whole UUIDs",
    )


def _index_of(entry: str, devices: tuple[Device, ...]) -> int | None:
    if entry.isdigit():
        indices = [device.index for device in devices]
        return int(entry) if int(entry) in indices else None
    if not entry.startswith("GPU-"):
        return None
    matching = [device.index for device in devices if (device.uuid or "").startswith(entry)]
    return matching[0] if len(matching) == 1 else None
