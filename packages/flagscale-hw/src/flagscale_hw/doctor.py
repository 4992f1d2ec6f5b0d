"""Look for what stands in the way of using this machine, and say what to do about it."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagscale_hw.detection import TIMEOUT_S, detect, sightings
from flagscale_hw.host import Host
from flagscale_hw.index import index_dir

__all__ = ["Finding", "examine"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked."""

    is_good: bool
    subject: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        mark = "ok  " if self.is_good else "FAIL"
        return f"{mark} {self.subject}: {self.text}" + (f": {self.hint}" if self.hint else "")

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return asdict(self)


def examine(host: Host | None = None, *, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Check a host, this one when None; see `detect` for `timeout_s`."""
    host = Host() if host is None else host
    findings = list(_chips(host))
    machine = detect(host, timeout_s=timeout_s)
    findings += [
        Finding(is_good=False, subject=problem.where, text=problem.text, hint=problem.hint)
        for problem in machine.problems
        if "no driver has them" not in problem.text  # said by the check of the chip
    ]
    if machine.devices:
        text = f"{len(machine.visible)} of {len(machine.devices)} devices are usable from here"
        findings.append(Finding(is_good=bool(machine.visible), subject=machine.chip, text=text))
    return [*findings, *_launcher(host)]


def _chips(host: Host) -> Iterator[Finding]:
    for sighting in sightings(host):
        chip = sighting.backend.chip
        if sighting.presence == "none":
            yield Finding(is_good=True, subject=chip, text="no such hardware here")
        elif sighting.presence == "bus_only":
            text = "the bus shows such devices but no driver has them"
            hint = "load the driver, or pass the device nodes into this container"
            yield Finding(is_good=False, subject=chip, text=text, hint=hint)
        else:
            yield Finding(is_good=True, subject=chip, text="hardware and driver are here")


def _launcher(host: Host) -> Iterator[Finding]:
    """Check what `launch` needs."""
    kernel = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", kernel)
    is_new = numbers is not None and (int(numbers[1]), int(numbers[2])) >= (5, 3)
    hint = "" if is_new else "before 5.3 a signal can in theory reach a process that took over a pid"
    yield Finding(is_good=True, subject="launcher", text=f"kernel {kernel}", hint=hint)
    if host.read("/proc/self/stat") is None:
        yield Finding(is_good=False, subject="launcher", text="/proc cannot be read", hint="mount it")
    folder = index_dir()
    is_writable = _can_write(folder)
    text = f"{folder} can{'' if is_writable else 'not'} be written"
    hint = "" if is_writable else "set FLAGSCALE_STATE_DIR to a folder of yours, or runs will not be listed"
    yield Finding(is_good=is_writable, subject="index of runs", text=text, hint=hint)


def _can_write(folder: Path) -> bool:
    """Try it: rights alone do not tell, least of all for root."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
