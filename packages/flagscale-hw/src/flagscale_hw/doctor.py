"""Look for what stands in the way of using this machine, and say what to do about it.

What does not live here: what the installed frameworks would select (`selection.py`).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagscale_hw.chips import CHIPS, Runtime, runtime
from flagscale_hw.detection import Sighting, detect, sightings
from flagscale_hw.host import Host, this_host
from flagscale_hw.index import index_dir
from flagscale_hw.machine import Machine

__all__ = ["CODES", "Finding", "examine"]

CODES: Mapping[str, str] = {
    "HW101": "whether a chip is here",
    "HW102": "the bus shows a chip and no driver has it",
    "HW103": "a device node cannot be opened by this user",
    "HW104": "a library or tool did not say what it should",
    "HW105": "a device is not healthy",
    "HW106": "devices that this process may use",
    "HW107": "a backend from another package",
    "HW201": "a variable hides devices from one layer only",
    "HW202": "variables of FlagOS plug-ins contradict each other",
    "HW203": "a variable belongs to another chip",
    "HW301": "the kernel that runs are started on",
    "HW302": "/proc, by which processes are identified",
    "HW303": "the index of runs",
    "HW401": "what torch would select",
    "HW402": "the collective backend of torch",
    "HW403": "what Megatron would select",
    "HW404": "what Transformer Engine would select",
    "HW405": "what vLLM would select",
    "HW406": "the interpreter that was asked",
}
"""Code of a finding -> what it is about. Codes are never given another meaning."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked."""

    code: str
    """One of `CODES`."""
    is_good: bool
    subject: str
    text: str
    hint: str = ""
    """What to do about it; never empty where something is not good."""

    def __str__(self) -> str:
        mark = "ok  " if self.is_good else "FAIL"
        return f"{mark} {self.code} {self.subject}: {self.text}" + (f": {self.hint}" if self.hint else "")

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return asdict(self)


def examine(host: Host | None = None, *, timeout_s: float | None = None) -> list[Finding]:
    """Check a host, this one when None; see `detect` for `timeout_s`."""
    host = this_host() if host is None else host
    seen = sightings(host)
    machine = detect(host, timeout_s=timeout_s)
    return [
        *_chips(seen),
        *_nodes(host, machine),
        *_problems(machine),
        *_health(machine),
        *_usable(machine),
        *_environment(host.environ, machine.chip),
        *_launcher(host),
    ]


def _chips(seen: list[Sighting]) -> Iterator[Finding]:
    absent = [one.backend.chip for one in seen if one.presence == "none"]
    for one in seen:
        chip = one.backend.chip
        if one.presence == "bus_only":
            text = "the bus shows such devices but no driver has them"
            hint = "load the driver, or pass the device nodes into this container"
            yield Finding(code="HW102", is_good=False, subject=chip, text=text, hint=hint)
        elif one.presence == "usable":
            text = "forced by FLAGSCALE_HW_VENDOR" if one.is_forced else "hardware and driver are here"
            yield Finding(code="HW101", is_good=True, subject=chip, text=text)
        if one.backend.origin != "built-in":
            yield Finding(code="HW107", is_good=True, subject=chip, text=f"described by {one.backend.origin}")
    if absent:
        yield Finding(code="HW101", is_good=True, subject="not here", text=", ".join(absent))


def _nodes(host: Host, machine: Machine) -> Iterator[Finding]:
    """Check that this user may open the devices, which tools run by root do not show."""
    closed = [
        device.node
        for device in (*machine.devices, *machine.others)
        if device.node
        and host.path(device.node).exists()
        and not os.access(host.path(device.node), os.R_OK | os.W_OK)
    ]
    if closed:
        yield Finding(
            code="HW103",
            is_good=False,
            subject=machine.chip,
            text=f"{', '.join(closed)}: this user may not open them",
            hint=f"join the group that owns them ({_group_of(host.path(closed[0]))}) and log in again",
        )


def _group_of(node: Path) -> str:
    try:
        return node.group()
    except (KeyError, OSError):
        return "see ls -l"


def _problems(machine: Machine) -> Iterator[Finding]:
    for problem in machine.problems:
        if "no driver has them" in problem.text:  # said by the check of the chip
            continue
        hint = problem.hint or "run the vendor's tool by hand and read what it says"
        yield Finding(code="HW104", is_good=False, subject=problem.where, text=problem.text, hint=hint)


def _health(machine: Machine) -> Iterator[Finding]:
    for device in (*machine.devices, *machine.others):
        if device.health in (None, "ok"):
            continue
        reasons = "; ".join(device.health_reasons) or "no reason given"
        hint = "look at the kernel log; reset the card, or take it out with `flagscale-hw env --devices`"
        subject = f"{device.chip} {device.index}"
        text = f"{device.health}: {reasons}"
        yield Finding(code="HW105", is_good=False, subject=subject, text=text, hint=hint)


def _usable(machine: Machine) -> Iterator[Finding]:
    if not machine.devices:
        return
    text = f"{len(machine.visible)} of {len(machine.devices)} devices are usable from here"
    variable = runtime(machine.chip).visible_devices_variable
    hint = "" if machine.visible else f"unset {variable}, or name devices that are here"
    yield Finding(code="HW106", is_good=bool(machine.visible), subject=machine.chip, text=text, hint=hint)


def _environment(environ: Mapping[str, str], chip: str) -> Iterator[Finding]:
    row = runtime(chip)
    yield from _layers(environ, row)
    yield from _strangers(environ, row)
    yield from _flagos(environ)


def _layers(environ: Mapping[str, str], row: Runtime) -> Iterator[Finding]:
    inner, outer = row.visible_devices_variable, row.outer_devices_variable
    if not inner or not outer or not environ.get(inner) or not environ.get(outer):
        return
    count = len(environ[outer].split(","))
    beyond = [word for word in environ[inner].split(",") if word.strip().isdigit() and int(word) >= count]
    if beyond:
        yield Finding(
            code="HW201",
            is_good=False,
            subject=row.chip,
            text=f"{inner}={environ[inner]} counts within {outer}={environ[outer]}, which has {count}",
            hint=f"unset {outer}, or use numbers below {count} in {inner}",
        )


def _strangers(environ: Mapping[str, str], row: Runtime) -> Iterator[Finding]:
    """Find selections made for other chips: programs ignore them, and then use every device."""
    if row.chip == "cpu":
        return
    ours = {row.visible_devices_variable, row.outer_devices_variable, row.container.variable}
    others = {runtime(chip).visible_devices_variable for chip in CHIPS} - ours - {None}
    for name in sorted(str(other) for other in others):
        if environ.get(name):
            yield Finding(
                code="HW203",
                is_good=False,
                subject=row.chip,
                text=f"{name}={environ[name]} is set, but this chip reads {row.visible_devices_variable}",
                hint="run `flagscale-hw env` and set what it prints",
            )


def _flagos(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Compare what the FlagOS plug-ins are told: each has its own variable for the same wish."""
    for wish in ("PREFER", "STRICT", "PER_OP"):
        names = [f"{prefix}_{wish}" for prefix in ("TE_FL", "VLLM_FL", "SGLANG_FL")]
        said = {name: environ[name] for name in names if environ.get(name)}
        if len(set(said.values())) > 1:
            yield Finding(
                code="HW202",
                is_good=False,
                subject="FlagOS",
                text=", ".join(f"{name}={value}" for name, value in said.items()),
                hint="unset them and say it once, in a FlagOSProfile",
            )
    for prefix in ("VLLM_FL", "SGLANG_FL"):
        both = [f"{prefix}_FLAGOS_WHITELIST", f"{prefix}_FLAGOS_BLACKLIST"]
        if all(environ.get(name) for name in both):
            text = f"{both[0]} and {both[1]} are both set, and the plug-in takes one"
            yield Finding(code="HW202", is_good=False, subject="FlagOS", text=text, hint="unset one of them")


def _launcher(host: Host) -> Iterator[Finding]:
    """Check what `launch` needs."""
    kernel = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", kernel)
    is_new = numbers is not None and (int(numbers[1]), int(numbers[2])) >= (5, 3)
    hint = "" if is_new else "before 5.3 a signal can in theory reach a process that took over a pid"
    yield Finding(code="HW301", is_good=True, subject="launcher", text=f"kernel {kernel}", hint=hint)
    if host.is_real and host.read("/proc/self/stat") is None:
        text = "/proc cannot be read"
        yield Finding(code="HW302", is_good=False, subject="launcher", text=text, hint="mount it")
    folder = index_dir()
    is_writable = _can_write(folder)
    text = f"{folder} can{'' if is_writable else 'not'} be written"
    hint = "" if is_writable else "set FLAGSCALE_STATE_DIR to a folder of yours, or runs will not be listed"
    yield Finding(code="HW303", is_good=is_writable, subject="index of runs", text=text, hint=hint)


def _can_write(folder: Path) -> bool:
    """Try it: rights alone do not tell, least of all for root."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
