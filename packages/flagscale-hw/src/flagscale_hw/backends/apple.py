"""Apple silicon: one device that shares the machine's memory. There is nothing to ask but the kernel."""

from __future__ import annotations

from flagscale_hw.asking import Asker
from flagscale_hw.backend import Found
from flagscale_hw.backends.values import clean, text_of
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Problem

__all__ = ["CHIP", "look", "parse_sysctl"]

CHIP = "mps"


def look(host: Host, timeout_s: float) -> Found:
    """Describe the one device; see `Backend.look`."""
    asker = Asker(host, CHIP, timeout_s)
    tool = asker.tool("sysctl", folders=("/usr/sbin",))
    if tool is None:
        return Found((Device(chip=CHIP, index=0),), source="files")
    answer = asker.run([tool, "-n", "hw.memsize", "machdep.cpu.brand_string"])
    if isinstance(answer, Problem):
        return Found((Device(chip=CHIP, index=0),), (answer,))
    return parse_sysctl(answer.output)


def parse_sysctl(text: str) -> Found:
    """Read `sysctl -n hw.memsize machdep.cpu.brand_string`: bytes, then the name of the chip."""
    lines = [line.strip() for line in clean(text).splitlines()] + ["", ""]
    is_size = lines[0].isascii() and lines[0].isdecimal() and len(lines[0]) <= 15
    device = Device(
        chip=CHIP,
        index=0,
        name=text_of(lines[1]),
        memory_total_bytes=(int(lines[0]) or None) if is_size else None,
    )
    return Found((device,), source="tool")
