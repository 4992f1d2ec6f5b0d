"""A machine as text: one line per device, an unknown value as `-`."""

from __future__ import annotations

from flagscale_hw.chips import runtime
from flagscale_hw.machine import Device, Machine

__all__ = ["render"]

_GIB = 1 << 30
_HEADER = ("", "chip", "device", "memory", "use", "temp", "power", "bus")


def render(machine: Machine) -> str:
    """Return the table that `flagscale-hw` prints, without a line's end at its end."""
    memory = f"{machine.memory_bytes / _GIB:.1f} GiB" if machine.memory_bytes else "memory unknown"
    lines = [
        f"{machine.hostname}: {machine.cpu_name or 'processor unknown'}, {machine.num_cpus} CPUs, {memory}"
    ]
    if machine.devices:
        lines += ["", *_align([_HEADER, *(_row(device) for device in machine.devices)]), ""]
    return "\n".join([*lines, _conclusion(machine)])


def _row(device: Device) -> tuple[str, ...]:
    return (
        str(device.index),
        device.chip,
        device.name or "-",
        f"{_gib(device.memory_used_bytes)} / {_gib(device.memory_total_bytes)} GiB",
        _number(device.utilisation_percent, "%"),
        _number(device.temperature_c, " C"),
        _number(device.power_w, " W"),
        device.pci_bus or "-",
    )


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / _GIB:.1f}"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f}{unit}"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _conclusion(machine: Machine) -> str:
    row = runtime(machine.chip)
    text = f"torch device {row.torch_device}, collectives {row.collective_backend}"
    if not machine.devices:
        return f"no accelerator: {text}"
    variable = row.visible_devices_variable
    if machine.visible_indices is not None and variable:
        text += f"; {variable} lets programs see {len(machine.visible)} of {len(machine.devices)}"
    return f"{len(machine.visible)} x {machine.chip}: {text}"
