"""Read the CSV that nvidia-smi and its relatives print for a query, by its header."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from flagscale_hw.asking import Asker
from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import device_of
from flagscale_hw.backends.columns import Row
from flagscale_hw.backends.values import MOST, clean, text_of, whole
from flagscale_hw.machine import Device, Problem

__all__ = ["FIELDS", "parse_csv", "query"]

# Column of the query -> field of the row, and the unit of a number that stands alone.
FIELDS: Mapping[str, tuple[str, str]] = {
    "index": ("index", ""),
    "uuid": ("uuid", ""),
    "name": ("name", ""),
    "serial": ("serial", ""),
    "memory.total": ("memory_total", " MiB"),
    "memory.used": ("memory_used", " MiB"),
    "utilization.gpu": ("utilisation", " %"),
    "temperature.gpu": ("temperature", " C"),
    "power.draw": ("power", " W"),
    "power.limit": ("power_limit", " W"),
    "pci.bus_id": ("bus", ""),
    "driver_version": ("driver", ""),
    "compute_cap": ("compute_capability", ""),
    "mig.mode.current": ("mig", ""),
}

_REJECTED = re.compile(r'Field "([\w.]+)" is not a valid field')
_UNIT = re.compile(r"\[(MiB|MB|GiB|%|W|C)\]")
_MAX_COMMAS = 3
_LONGEST_LINE = 2000


def query(
    asker: Asker, tool: Path, option: str, columns: Sequence[str], fields: Mapping[str, tuple[str, str]]
) -> Found:
    """Ask a tool for columns, and an older one for those that it knows."""
    left = list(columns)
    while True:
        answer = asker.ask(
            [tool, f"{option}={','.join(left)}", "--format=csv"],
            lambda text: parse_csv(asker.chip, tool.name, text, fields),
        )
        rejected = _REJECTED.search(" ".join(problem.text for problem in answer.problems))
        if answer.devices or rejected is None or rejected[1] not in left or len(left) == 1:
            return answer
        left.remove(rejected[1])


def parse_csv(
    chip: str,
    tool: str,
    text: str,
    fields: Mapping[str, tuple[str, str]] = FIELDS,
    header: Sequence[str] = (),
) -> Found:
    """Read a table with or without units.

    Args:
        chip: whose devices they are.
        tool: who says so, for the problems.
        text: what it printed. Lines that are no rows, such as the report of a lost card between good ones,
            become problems.
        fields: as `FIELDS`.
        header: the columns that were asked for, where the tool prints none.
    """
    titles = list(header)
    devices: list[Device] = []
    problems: list[Problem] = []
    for line in islice(filter(None, map(str.strip, clean(text).splitlines())), MOST):
        cells = [cell.strip() for cell in line[:_LONGEST_LINE].split(",")]
        if not titles and "index" in cells:
            titles = cells
            continue
        row = _row(titles, cells, fields)
        device = None if row is None else _device(chip, row)
        if device is None:
            problems.append(Problem(where=chip, text=f"{tool}: {line[:300]}"))
        else:
            devices.append(device)
    return Found(tuple(devices), tuple(problems))


def _row(titles: Sequence[str], cells: list[str], fields: Mapping[str, tuple[str, str]]) -> Row | None:
    names = [title.partition("[")[0].strip() for title in titles]
    surplus = len(cells) - len(names)
    if not names or not 0 <= surplus <= _MAX_COMMAS or len(set(names)) < len(names):
        return None
    if surplus:
        if "name" not in names:
            return None
        at = names.index("name")  # the only column in which a comma may stand
        cells = [*cells[:at], ", ".join(cells[at : at + surplus + 1]), *cells[at + surplus + 1 :]]
    row: Row = {}
    for title, name, cell in zip(titles, names, cells, strict=True):
        if name in fields:
            field, unit = fields[name]
            said = _UNIT.search(title)
            is_bare = bool(unit) and cell.replace(".", "", 1).isdecimal()
            row[field] = f"{cell} {said[1]}" if is_bare and said else cell + (unit if is_bare else "")
    return row


def _device(chip: str, row: Row) -> Device | None:
    capability = text_of(row.get("compute_capability"))
    is_number = capability is not None and re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,2}", capability)
    more: dict[str, Any] = {"compute_capability": capability if is_number else None}
    physical = whole(row.get("physical_index"))
    is_sliced = {"enabled": True, "disabled": False}.get(row.get("mig", "").lower())
    return device_of(chip, row, **more, physical_index=physical, is_sliced=is_sliced)
