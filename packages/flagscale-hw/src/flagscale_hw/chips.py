"""What software runs on a chip: one row per chip, and the environment that selects devices.

What does not live here: finding chips (`detection.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagscale_hw.errors import DetectError, InputError
from flagscale_hw.machine import Device

__all__ = ["Runtime", "env", "runtime"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How frameworks call one chip."""

    chip: str
    torch_device: str
    """Device type in torch: `cpu`, `cuda`, ..."""
    collective_backend: str
    """Backend of torch.distributed: `gloo`, `nccl`, ..."""
    visible_devices_variable: str | None = None
    """Environment variable that selects devices for a process; None where there is nothing to select."""
    device_order: tuple[str, str] | None = None
    """Variable and value that make the runtime number devices as the driver does."""


_RUNTIMES = {
    row.chip: row
    for row in (
        Runtime(chip="cpu", torch_device="cpu", collective_backend="gloo"),
        Runtime(
            chip="nvidia",
            torch_device="cuda",
            collective_backend="nccl",
            visible_devices_variable="CUDA_VISIBLE_DEVICES",
            # CUDA's own order is fastest first, which differs from the driver's on mixed hosts.
            device_order=("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        ),
    )
}


def runtime(chip: str) -> Runtime:
    """Return how frameworks call a chip.

    Raises:
        DetectError: this version does not know the chip.
    """
    try:
        return _RUNTIMES[chip]
    except KeyError:
        raise DetectError(f"chip {chip!r}: not known: known are {', '.join(sorted(_RUNTIMES))}") from None


def env(devices: Sequence[Device]) -> dict[str, str]:
    """Return the variables that let a process use exactly these devices, in this order.

    The numbers are the driver's, so they replace a restriction that is in force already and do not count
    within it.

    Raises:
        InputError: the devices are of different chips, or one of them is named twice.
    """
    chips = sorted({device.chip for device in devices})
    if not chips:
        return {}
    if len(chips) > 1:
        raise InputError(f"devices of different chips ({', '.join(chips)}): one process uses one chip")
    row = runtime(chips[0])
    indices = [device.index for device in devices]
    if len(set(indices)) < len(indices):
        raise InputError(f"devices {indices}: one is named twice: name each device once")
    if row.visible_devices_variable is None:
        return {}
    selected = {row.visible_devices_variable: ",".join(map(str, indices))}
    return {**dict([row.device_order] if row.device_order else []), **selected}
