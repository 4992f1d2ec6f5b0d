"""Tsingmicro: tsm_smi's table, a line per card. Lines below with an empty first cell are its chips."""

from __future__ import annotations

import re

from flagscale_hw.asking import Asker
from flagscale_hw.backend import Found
from flagscale_hw.backends.boxes import device_of
from flagscale_hw.backends.values import NUMBER, UNKNOWN, clean
from flagscale_hw.host import Host
from flagscale_hw.machine import Device

__all__ = ["CHIP", "look", "parse_table"]

CHIP = "tsingmicro"
# No capture of this tool is public; this is what a reader of its source describes, and nothing looser.
_CARD = re.compile(r"(?P<index>[0-9]{1,4})\s+(?P<name>[A-Za-z][\w-]*(?: [\w-]+)*)")
_FACTS = re.compile(
    rf"(?P<bus>[0-9A-Fa-f]{{4,8}}:[0-9A-Fa-f]{{2}}:[0-9A-Fa-f]{{2}}\.[0-7]|{UNKNOWN})\s+"
    rf"(?P<temperature>{NUMBER}\s*C|{UNKNOWN})\s+"
    rf"(?P<power>{NUMBER}\s*m?W|{UNKNOWN})\s*/\s*(?P<power_limit>{NUMBER}\s*m?W|{UNKNOWN})\s+"
    rf"(?P<memory_used>{NUMBER}\s*[MG](?:i?B)?|{UNKNOWN})\s*/\s*"
    rf"(?P<memory_total>{NUMBER}\s*[MG](?:i?B)?|{UNKNOWN})\s+(?P<utilisation>{NUMBER}\s*%|{UNKNOWN})"
)


def look(host: Host, timeout_s: float) -> Found:
    """Describe every card; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("tsm_smi", folders=("/usr/local/kuiper/bin",))
    return asker.missing("tsm_smi") if tool is None else asker.ask([tool], parse_table)


def parse_table(text: str) -> Found:
    """Read what `tsm_smi` draws."""
    devices = [_device(line) for line in clean(text).splitlines() if len(line) < 500]
    return Found(tuple(device for device in devices if device is not None))


def _device(line: str) -> Device | None:
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    card = _CARD.fullmatch(cells[0])
    facts = _FACTS.fullmatch(cells[1]) if card is not None and len(cells) > 1 else None
    if card is None or facts is None:
        return None
    row = {**card.groupdict(), **facts.groupdict()}
    for field in ("memory_used", "memory_total"):
        row[field] = re.sub(r"([MG])$", r"\1iB", row[field])
    return device_of(CHIP, row)
