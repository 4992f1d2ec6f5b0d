"""Machines that are not there, for tests on any laptop: yours as well as ours.

    machine = fake_host("ascend", 8)                    # a `Machine`, for planning
    plan = flagscale_train.plan(experiment, machine)

    with faked_host("ascend", 8) as host:               # files and tools, also for the processes you start
        assert flagscale_hw.detect().chip == "ascend"
        subprocess.run(["flagscale-hw", "doctor"])

Both go through the real detection: the machine is what the backends read from the faked files and tools.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from flagscale_hw.chips import runtime
from flagscale_hw.detection import detect
from flagscale_hw.errors import InputError
from flagscale_hw.fake import FAKED, Faults, environment, variables, write_host
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Machine

__all__ = ["FAKED", "Faults", "fake_host", "faked_host", "write_host"]

_GIB = 1 << 30
# Generous: what detection itself allows a tool is for people who wait, and a busy test machine is slow.
_TIMEOUT_S = 60.0


@cache
def fake_host(chip: str, count: int = 0) -> Machine:
    """Return a machine with `count` identical, idle devices.

    Args:
        chip: any of `flagscale_hw.CHIPS`.
        count: number of devices; 0 for `cpu`.

    Raises:
        DetectError: the chip is not known.
        InputError: the count does not fit the chip.
    """
    runtime(chip)
    if chip == "mps":
        return _mac(count)
    with tempfile.TemporaryDirectory(prefix="flagscale-hw-fake-") as folder:
        write_host(Path(folder), chip, count)
        found = detect(Host(Path(folder), {"PATH": os.defpath}), timeout_s=_TIMEOUT_S)
    # How long it took is the only thing that differs from one time to the next.
    return replace(found, vendors=tuple(replace(vendor, elapsed_ms=0.0) for vendor in found.vendors))


def _mac(count: int) -> Machine:
    """Return a Mac: its chip is told by its kernel, so no file can show it."""
    if count != 1:
        raise InputError(f"fake host 'mps' with {count} devices: a Mac has 1")
    return Machine(
        hostname="fake",
        num_cpus=16,
        memory_bytes=64 * _GIB,
        cpu_name="Fake M",
        chip="mps",
        devices=(Device(chip="mps", index=0, name="Fake M", memory_total_bytes=64 * _GIB),),
    )


@contextmanager
def faked_host(chip: str, count: int = 0, *, faults: Faults | None = None) -> Iterator[Host]:
    """Make this process, and the processes it starts, see a faked host until the block ends.

    Args:
        chip: one of `FAKED`.
        count: number of devices; 0 for `cpu`.
        faults: how the vendor's tools misbehave.

    Yields:
        The host, as `detect` takes it.

    Raises:
        DetectError: the chip cannot be faked.
        InputError: the count does not fit the chip.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-hw-fake-") as folder:
        write_host(Path(folder), chip, count, faults=faults)
        with environment(variables(Path(folder), faults)):
            yield Host(Path(folder))
