"""Hygon DCU: hy-smi, or the rocm-smi of its toolkit, and rocminfo for names. Programs see it as ROCm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from flagscale_hw.asking import Asker, first_answer, merge
from flagscale_hw.backend import Found
from flagscale_hw.backends.rocm import OPTIONS, parse_concise, parse_json, parse_rocminfo
from flagscale_hw.backends.values import address, clean
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Health, Problem

__all__ = ["CHIP", "look", "parse_health"]

CHIP = "hygon"
_FOLDERS = ("/opt/dtk/.hyhal/bin", "/opt/hyhal/bin", "/opt/dtk/bin")
_HEALTHY = re.compile(
    r"\s*[DH]CU\[(?P<index>[0-9]{1,4})\]\s*:\s*Bus Id\s*:\s*(?P<bus>\S+)\s*:\s*(?P<state>[A-Za-z]+)\s*"
)
_HEALTH: dict[str, Health] = {"healthy": "ok", "warning": "degraded", "critical": "bad"}


def look(host: Host, timeout_s: float) -> Found:
    """Describe every DCU; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("hy-smi", "rocm-smi", folders=_FOLDERS)
    if tool is None:
        return asker.missing("hy-smi")
    found = first_answer(
        lambda: asker.ask([tool, *OPTIONS], lambda text: parse_json(CHIP, text)),
        lambda: asker.ask([tool], lambda text: parse_concise(CHIP, text)),
    )
    devices = found.devices
    rocminfo = asker.tool("rocminfo", folders=_FOLDERS)
    if rocminfo is not None and devices and any(device.name is None for device in devices):
        named = asker.ask([rocminfo], lambda text: parse_rocminfo(CHIP, text))
        devices = merge(devices, named.devices)
    if tool.name == "hy-smi" and devices:
        said = asker.run([tool, "--healthcheck"])
        states = {} if isinstance(said, Problem) else parse_health(said.output)
        devices = tuple(_judged(device, states) for device in devices)
    return replace(found, devices=devices)


def parse_health(text: str) -> dict[int, tuple[str | None, str]]:
    """Read `hy-smi --healthcheck`: index -> bus address and state in the tool's word."""
    lines = [_HEALTHY.fullmatch(line) for line in clean(text).splitlines() if len(line) < 300]
    return {int(line["index"]): (address(line["bus"]), line["state"]) for line in lines if line is not None}


def _judged(device: Device, states: Mapping[int, tuple[str | None, str]]) -> Device:
    bus, state = states.get(device.index, (None, ""))
    health = _HEALTH.get(state.lower())
    if health is None or (bus and device.pci_bus and bus != device.pci_bus):
        return device
    reasons = () if health == "ok" else (state,)
    return replace(device, health=health, health_reasons=reasons, pci_bus=device.pci_bus or bus)
