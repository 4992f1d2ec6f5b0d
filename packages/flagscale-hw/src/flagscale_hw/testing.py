"""Machines that are not there, for tests on any laptop: yours as well as ours.

machine = fake_host("nvidia", 8)
plan = flagscale_train.plan(experiment, machine)
"""

from __future__ import annotations

from flagscale_hw.chips import runtime
from flagscale_hw.errors import InputError
from flagscale_hw.machine import Device, Machine

__all__ = ["fake_host"]

_GIB = 1 << 30


def fake_host(chip: str, count: int = 0) -> Machine:
    """Return a machine with `count` identical, idle devices.

    Args:
        chip: `cpu` or `nvidia`.
        count: number of devices; 0 for `cpu`.

    Raises:
        DetectError: the chip is not known.
        InputError: the count does not fit the chip.
    """
    runtime(chip)
    if (chip == "cpu") != (count == 0) or count < 0:
        raise InputError(
            f"fake host {chip!r} with {count} devices: give 0 for `cpu` and 1 or more for other chips"
        )
    return Machine(
        hostname="fake",
        num_cpus=64,
        memory_bytes=512 * _GIB,
        cpu_name="Fake CPU",
        chip=chip,
        devices=tuple(_idle_h100(index) for index in range(count)),
    )


def _idle_h100(index: int) -> Device:
    return Device(
        chip="nvidia",
        index=index,
        name="NVIDIA H100 80GB HBM3",
        uuid=f"GPU-00000000-0000-0000-0000-{index:012d}",
        memory_total_bytes=80 * _GIB,
        memory_used_bytes=0,
        utilisation_percent=0.0,
        temperature_c=30.0,
        power_w=70.0,
        pci_bus=f"0000:{index + 1:02x}:00.0",
        driver="580.00",
        compute_capability="9.0",
    )
