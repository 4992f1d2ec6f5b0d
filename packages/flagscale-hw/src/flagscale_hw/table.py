"""A machine as text: one line per device, an unknown value as `-`, colour only for people at a terminal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from flagscale_hw.chips import runtime
from flagscale_hw.machine import Device, Machine

__all__ = ["Style", "align", "render", "style_for"]

_GIB = 1 << 30
_COLUMNS = ("", "chip", "device", "memory", "use", "temp", "power", "health", "numa", "bus")
_DROPPED_FIRST = ("numa", "bus", "power", "chip", "temp", "use")
"""What a narrow terminal does without, in this order."""
_LEAST_NAME = 8
_HOT_C, _WARM_C = 90.0, 80.0
_FULL = 0.9
_CODES = {"red": "31", "yellow": "33", "green": "32", "dim": "2", "bold": "1"}
_HEALTH = {"ok": "green", "degraded": "yellow", "bad": "red", "unresponsive": "red"}


@dataclass(frozen=True)
class Style:
    """How to print: with which colours, and how wide."""

    has_colour: bool = False
    width: int | None = None
    """Columns of the terminal; None: no limit, for files and pipes."""

    def paint(self, text: str, colour: str) -> str:
        """Return the text in a colour, or as it is."""
        if not self.has_colour or not colour or not text.strip():
            return text
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def style_for(stream: TextIO, environ: Mapping[str, str] | None = None) -> Style:
    """Return the style for a stream: plain unless it is a terminal; `NO_COLOR` is obeyed (no-color.org)."""
    environ = os.environ if environ is None else environ
    if not stream.isatty():
        return Style()
    has_colour = not environ.get("NO_COLOR") and environ.get("TERM", "") != "dumb"
    return Style(has_colour=has_colour, width=shutil.get_terminal_size().columns)


@dataclass(frozen=True)
class _Cell:
    text: str
    colour: str = ""


def render(machine: Machine, style: Style | None = None) -> str:
    """Return the table that `flagscale-hw` prints, without a line's end at its end."""
    style = style or Style()
    memory = f"{machine.memory_bytes / _GIB:.1f} GiB" if machine.memory_bytes else "memory unknown"
    cpus = f"{machine.cpu_name or 'processor unknown'}, {machine.num_cpus} CPUs, {memory}"
    lines = [_cut(f"{machine.hostname}: {cpus}", style.width)]
    devices = (*machine.devices, *machine.others)
    if devices:
        lines += ["", *_table([_row(device) for device in devices], style), ""]
    return "\n".join([*lines, *(_cut(line, style.width) for line in _conclusion(machine))])


def _row(device: Device) -> dict[str, _Cell]:
    return {
        "": _Cell(str(device.index)),
        "chip": _Cell(device.chip),
        "device": _Cell(device.name or "-"),
        "memory": _memory(device),
        "use": _Cell(_number(device.utilisation_percent, "%")),
        "temp": _Cell(_number(device.temperature_c, " C"), _heat(device.temperature_c)),
        "power": _Cell(_power(device)),
        "health": _Cell(device.health or "-", _HEALTH.get(device.health or "", "")),
        "numa": _Cell("-" if device.numa_node is None else str(device.numa_node)),
        "bus": _Cell(device.pci_bus or "-"),
    }


def _memory(device: Device) -> _Cell:
    used, total = device.memory_used_bytes, device.memory_total_bytes
    is_full = bool(total) and used is not None and used > _FULL * (total or 1)
    return _Cell(f"{_gib(used)} / {_gib(total)} GiB", "yellow" if is_full else "")


def _power(device: Device) -> str:
    if device.power_limit_w is None:
        return _number(device.power_w, " W")
    return f"{_number(device.power_w, '')} / {device.power_limit_w:.0f} W"


def _heat(temperature_c: float | None) -> str:
    if temperature_c is None or temperature_c < _WARM_C:
        return ""
    return "red" if temperature_c >= _HOT_C else "yellow"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / _GIB:.1f}"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f}{unit}"


def _table(rows: list[dict[str, _Cell]], style: Style) -> list[str]:
    columns = _columns_that_fit(rows, style.width)
    widths = {column: _width(rows, column) for column in columns}
    over = _total(widths.values()) - (style.width or 0) if style.width else 0
    if over > 0:
        widths["device"] = max(_LEAST_NAME, widths["device"] - over)
    header = "  ".join(column.ljust(widths[column]) for column in columns).rstrip()
    lines = [style.paint(header, "dim")]
    for row in rows:
        cells = [
            style.paint(_cut(row[column].text, widths[column]).ljust(widths[column]), row[column].colour)
            for column in columns
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _columns_that_fit(rows: list[dict[str, _Cell]], width: int | None) -> list[str]:
    columns = list(_COLUMNS)
    if width is None:
        return columns
    for dropped in _DROPPED_FIRST:
        if _total(_width(rows, column) for column in columns) <= width:
            break
        columns.remove(dropped)
    return columns


def _width(rows: list[dict[str, _Cell]], column: str) -> int:
    return max(len(column), *(len(row[column].text) for row in rows))


def _total(widths: Iterable[int]) -> int:
    numbers = list(widths)
    return sum(numbers) + 2 * (len(numbers) - 1)


def _cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else text[: max(1, width - 1)] + "…"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of words as lines with straight columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _conclusion(machine: Machine) -> list[str]:
    row = runtime(machine.chip)
    text = f"torch device {row.torch_device}, collectives {row.collective_backend}"
    if not machine.devices:
        return [f"no accelerator: {text}"]
    variable = row.visible_devices_variable
    if machine.visible_indices is not None and variable:
        text += f"; {variable} lets programs see {len(machine.visible)} of {len(machine.devices)}"
    others = sorted({device.chip for device in machine.others})
    ignored = [f"not used: {', '.join(others)}"] if others else []
    return [f"{len(machine.visible)} x {machine.chip}: {text}", *ignored]
