"""AMD: the kernel's files first, which need no library and no rights; then rocm-smi for what they do not say.

The tools say "driver not initialized" where the driver is built into the kernel, in containers and in WSL:
their complaints count only when the files show no device.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from flagscale_hw.asking import Asker, first_answer, merge
from flagscale_hw.backend import Found
from flagscale_hw.backends.blocks import blocks
from flagscale_hw.backends.boxes import device_of
from flagscale_hw.backends.columns import Row
from flagscale_hw.backends.rocm import OPTIONS, parse_concise, parse_json, parse_rocminfo
from flagscale_hw.backends.values import whole
from flagscale_hw.host import Host
from flagscale_hw.machine import Device

__all__ = ["CHIP", "from_files", "look", "parse_list"]

CHIP = "amd"
_FOLDERS = ("/opt/rocm/bin",)
_KFD = "/sys/class/kfd/kfd/topology/nodes"
_PCI = "/sys/bus/pci/devices"


def look(host: Host, timeout_s: float) -> Found:
    """Describe every AMD device; see `Backend.look`."""
    devices = from_files(host)
    asker = Asker(host, CHIP, timeout_s)
    told = _ask_tools(asker)
    if not devices:
        return told
    by_bus = {device.pci_bus: device for device in told.devices if device.pci_bus}
    same = tuple(
        replace(by_bus[device.pci_bus], index=device.index) for device in devices if device.pci_bus in by_bus
    )
    if not by_bus and len(told.devices) == len(devices):
        same = told.devices  # inside a virtual machine the tool hides addresses and keeps the order
    return Found(merge(devices, same), source="files")


def _ask_tools(asker: Asker) -> Found:
    smi = asker.tool("rocm-smi", folders=_FOLDERS)
    amd_smi = asker.tool("amd-smi", folders=_FOLDERS)
    info = asker.tool("rocminfo", folders=_FOLDERS)
    ways: list[Callable[[], Found]] = []
    if smi is not None:
        ways.append(lambda: asker.ask([smi, *OPTIONS], lambda text: parse_json(CHIP, text)))
        ways.append(lambda: asker.ask([smi], lambda text: parse_concise(CHIP, text)))
    if info is not None:
        ways.append(lambda: asker.ask([info], lambda text: parse_rocminfo(CHIP, text)))
    if amd_smi is not None:
        ways.append(lambda: asker.ask([amd_smi, "list"], parse_list))
    return first_answer(*ways) if ways else asker.missing("rocm-smi")


def from_files(host: Host) -> tuple[Device, ...]:
    """Describe the devices of the compute driver, in its order, which is the runtime's."""
    addresses = []
    for node in sorted(host.names(_KFD), key=lambda name: whole(name) or 0):
        facts = dict(re.findall(r"^(\w+) ([0-9]+)$", host.read(f"{_KFD}/{node}/properties") or "", re.M))
        if facts.get("vendor_id") == "4098" and whole(facts.get("simd_count")) and "location_id" in facts:
            place, domain = int(facts["location_id"]), int(facts.get("domain", "0"))
            bus, rest = place >> 8 & 0xFF, place & 0xFF
            addresses.append(f"{domain & 0xFFFF:04x}:{bus:02x}:{rest >> 3:02x}.{rest & 7}")
    present = [one for one in addresses if host.read(f"{_PCI}/{one}/vendor") == "0x1002"]
    return tuple(_from_folder(host, index, one) for index, one in enumerate(present))


def _from_folder(host: Host, index: int, bus: str) -> Device:
    folder = f"{_PCI}/{bus}"
    hwmon = next((f"{folder}/hwmon/{name}" for name in host.names(f"{folder}/hwmon")), f"{folder}/hwmon/none")

    def number(path: str) -> int | None:
        # A card that sleeps gives its memory and answers EBUSY for the rest: not known, and not 0.
        text = host.read(path)
        return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text) else None

    def scaled(path: str, divisor: int) -> float | None:
        value = number(path)
        return None if value is None else value / divisor

    busy = number(f"{folder}/gpu_busy_percent")
    draw = scaled(f"{hwmon}/power1_average", 1_000_000)
    unique = host.read(f"{folder}/unique_id")
    return Device(
        chip=CHIP,
        index=index,
        name=host.read(f"{folder}/product_name") or None,
        uuid=f"0x{unique}" if unique and re.fullmatch(r"[0-9a-f]{16}", unique) else None,
        serial=host.read(f"{folder}/serial_number") or None,
        pci_bus=bus,
        pci_device_id=host.read(f"{folder}/device"),
        memory_total_bytes=number(f"{folder}/mem_info_vram_total") or None,
        memory_used_bytes=number(f"{folder}/mem_info_vram_used"),
        utilisation_percent=None if busy is None else float(busy),
        temperature_c=scaled(f"{hwmon}/temp1_input", 1000),
        power_w=scaled(f"{hwmon}/power1_input", 1_000_000) if draw is None else draw,
        power_limit_w=scaled(f"{hwmon}/power1_cap", 1_000_000),
        driver=host.read("/sys/module/amdgpu/version"),
    )


def parse_list(text: str) -> Found:
    """Read `amd-smi list`, which in a virtual machine knows little more than the number of devices."""
    devices = []
    for block in blocks(text, r"GPU:\s*(?P<index>[0-9]{1,4})"):
        row: Row = {"index": block.title["index"]}
        row |= {
            field: value for field, key in (("bus", "BDF"), ("uuid", "UUID")) if (value := block.get(key))
        }
        device = device_of(CHIP, row)
        devices += [device] if device is not None else []
    return Found(tuple(devices))
