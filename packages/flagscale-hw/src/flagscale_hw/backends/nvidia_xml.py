"""The long report of nvidia-smi and of tools made after it: XML, with the parts of cut cards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree as ET

from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import device_of, field_values
from flagscale_hw.backends.columns import Row
from flagscale_hw.backends.values import clean, text_of
from flagscale_hw.machine import Device, DeviceProcess, Problem, Slice

__all__ = ["parse_xml"]

# Field -> places below <gpu>; newer drivers moved power.
_PLACES = {
    "name": ("product_name",),
    "uuid": ("uuid",),
    "serial": ("serial",),
    "memory_total": ("fb_memory_usage/total",),
    "memory_used": ("fb_memory_usage/used",),
    "utilisation": ("utilization/gpu_util",),
    "temperature": ("temperature/gpu_temp",),
    "power": (
        "gpu_power_readings/power_draw",
        "gpu_power_readings/instant_power_draw",
        "power_readings/power_draw",
    ),
    "power_limit": (
        "gpu_power_readings/current_power_limit",
        "power_readings/power_limit",
        "power_readings/enforced_power_limit",
    ),
}
_SWITCH = {"Enabled": True, "Disabled": False}


def parse_xml(chip: str, text: str) -> Found:
    """Read `nvidia-smi -q -x`; it has no indices, and its order is that of the indices."""
    devices: list[Device] = []
    driver: str | None = None
    problems: tuple[Problem, ...] = ()
    try:
        for element in _elements(clean(text)):
            if element.tag == "driver_version":
                driver = text_of(element.text)
            elif element.tag == "gpu":
                devices.append(replace(_device(chip, len(devices), element), driver=driver))
    except ET.ParseError as error:
        # What came before the break was whole.
        problems = (Problem(where=chip, text=f"the report is not whole XML: {error}"),)
    return Found(tuple(devices), problems)


def _elements(text: str) -> Iterator[ET.Element]:
    parser: ET.XMLPullParser[Any] = ET.XMLPullParser(events=("end",))
    parser.feed(text)
    events: Iterable[Any] = parser.read_events()
    yield from (element for _, element in events)
    parser.close()


def _device(chip: str, index: int, gpu: ET.Element) -> Device:
    row: Row = {"bus": gpu.get("id") or gpu.findtext("pci/pci_bus_id") or ""}
    for field, places in _PLACES.items():
        values = [value for place in places if (value := text_of(gpu.findtext(place))) is not None]
        if values:
            row[field] = values[0]
    mode = gpu.findtext("mig_mode/current_mig") or ""
    more: dict[str, Any] = {
        "is_ecc_on": _SWITCH.get(gpu.findtext("ecc_mode/current_ecc") or ""),
        "is_sliced": _SWITCH.get(mode),
        "slices": tuple(_slice(part) for part in gpu.iterfind("mig_devices/mig_device")),
        "processes": _processes(gpu),
    }
    device = device_of(chip, row, index=index, **more)
    return Device(chip=chip, index=index) if device is None else device


def _slice(part: ET.Element) -> Slice:
    memory = field_values(
        {
            "memory_total": part.findtext("fb_memory_usage/total") or "",
            "memory_used": part.findtext("fb_memory_usage/used") or "",
        }
    )
    graphics = part.findtext("gpu_instance_id") or ""
    compute = part.findtext("compute_instance_id") or ""
    return Slice(
        uuid=text_of(part.findtext("uuid")),
        instance=f"{graphics}/{compute}" if graphics and compute else None,
        memory_total_bytes=memory["memory_total_bytes"],
        memory_used_bytes=memory["memory_used_bytes"],
    )


def _processes(gpu: ET.Element) -> tuple[DeviceProcess, ...] | None:
    found = []
    for process in gpu.iterfind("processes/process_info"):
        pid = process.findtext("pid") or ""
        if re.fullmatch(r"[0-9]{1,10}", pid):
            memory = field_values({"memory_used": process.findtext("used_memory") or ""})
            name = text_of(process.findtext("process_name"))
            found.append(
                DeviceProcess(pid=int(pid), name=name, memory_used_bytes=memory["memory_used_bytes"])
            )
    return tuple(found) or None  # none listed is not none there: a container hides them
