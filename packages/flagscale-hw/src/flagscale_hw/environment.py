"""Which variables let a process, or a container, use certain devices and no others.

Two layers of numbering must not be mixed: a process has the variable of the chip's runtime
(`CUDA_VISIBLE_DEVICES`), a container the one of the container runtime (`NVIDIA_VISIBLE_DEVICES`) or device
nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flagscale_hw.chips import Runtime, runtime
from flagscale_hw.errors import InputError
from flagscale_hw.machine import Device, Machine

__all__ = ["choose", "docker_options", "env", "kubernetes_limits"]


def env(devices: Sequence[Device], *, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that let a process use exactly these devices, in this order.

    The numbers are the driver's, so they replace a restriction that is in force already and do not count
    within it. One exception: on chips with two layers (`ROCR_VISIBLE_DEVICES` under `HIP_VISIBLE_DEVICES`)
    the outer variable stays in force, and the numbers count within it.

    Args:
        devices: what to use, all of one chip.
        environ: the environment that the process will inherit; nothing is inherited when None.

    Raises:
        InputError: the devices are of different chips, one of them is named twice, or the chip numbers its
            devices in a way that could not be found out.
    """
    if not devices:
        return {}
    row = _only_chip(devices)
    indices = [device.index for device in devices]
    if len(set(indices)) < len(indices):
        raise InputError(f"devices {indices}: one is named twice: name each device once")
    if row.visible_devices_variable is None:
        return {}
    numbers = _within(row, devices, environ or {})
    selected = {row.visible_devices_variable: ",".join(numbers)}
    return {**dict([row.device_order] if row.device_order else []), **selected}


def _only_chip(devices: Sequence[Device]) -> Runtime:
    chips = sorted({device.chip for device in devices})
    if len(chips) > 1:
        raise InputError(f"devices of different chips ({', '.join(chips)}): one process uses one chip")
    return runtime(chips[0])


def _number(device: Device) -> str:
    """Return how the chip's runtime calls a device: its index, except on Gaudi, which counts modules."""
    if device.chip != "gaudi":
        return str(device.index)
    if device.physical_index is None:
        raise InputError(
            f"gaudi {device.index}: its module id is not known, and HABANA_VISIBLE_MODULES takes no other "
            "number: install hl-smi, or set the variable by hand"
        )
    return str(device.physical_index)


def _within(row: Runtime, devices: Sequence[Device], environ: Mapping[str, str]) -> list[str]:
    """Return the numbers of the devices, counted within the outer variable where one is in force."""
    numbers = [_number(device) for device in devices]
    text = environ.get(row.outer_devices_variable or "", "").strip()
    if not text:
        return numbers
    outer = [word.strip() for word in text.split(",")]
    places = [_place(outer, number, device.uuid) for number, device in zip(numbers, devices, strict=True)]
    missing = [number for number, place in zip(numbers, places, strict=True) if place is None]
    if missing:
        raise InputError(
            f"devices {', '.join(missing)}: {row.outer_devices_variable}={text} hides them, and it is "
            "applied first: name devices that it has, or unset it"
        )
    return [str(place) for place in places]


def _place(outer: Sequence[str], number: str, uuid: str | None) -> int | None:
    for place, word in enumerate(outer):
        if word == number or (uuid and not word.isdigit() and uuid.startswith(word)):
            return place
    return None


def choose(machine: Machine, words: Sequence[str]) -> tuple[Device, ...]:
    """Return the devices that a person names: numbers as this process counts them, or UUIDs.

    A process that may use devices 4 and 5 counts them 0 and 1, as torch does, so `1` is device 5.

    Args:
        machine: where they are.
        words: numbers, or UUIDs or unambiguous beginnings of them.

    Raises:
        InputError: a word names no device of this process, or more than one, or one that was named already.
    """
    chosen: list[Device] = []
    for word in words:
        device = _named(machine, word)
        if device in chosen:
            raise InputError(f"devices {','.join(words)}: one is named twice: name each device once")
        chosen.append(device)
    return tuple(chosen)


def _named(machine: Machine, word: str) -> Device:
    visible = machine.visible
    if word.isdigit():
        if int(word) < len(visible):
            return visible[int(word)]
        have = f"0 to {len(visible) - 1}" if visible else "none"
        raise InputError(f"device {word}: this process has {have}{_restricted(machine)}")
    matching = [device for device in visible if (device.uuid or "").startswith(word)] if word else []
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise InputError(f"device {word!r}: {len(matching)} UUIDs begin so: give more of it")
    raise InputError(f"device {word!r}: neither a number nor the UUID of a device of this process")


def _restricted(machine: Machine) -> str:
    if machine.visible_indices is None:
        return ""
    return f", because the environment shows it {len(machine.visible)} of {len(machine.devices)}"


def docker_options(devices: Sequence[Device]) -> list[str]:
    """Return the options of `docker run` that give a container exactly these devices.

    The vendor's container runtime is used where there is one, and device nodes where there is none. On chips
    whose devices share one node (`/dev/dri`) all devices become reachable: a variable inside then selects.

    Raises:
        InputError: the devices are of different chips.
    """
    if not devices:
        return []
    row = _only_chip(devices)
    box = row.container
    numbers = ",".join(str(_physical(device)) for device in devices)
    if box.uses_gpus_option:
        return ["--gpus", f'"device={numbers}"']
    if box.runtime and box.variable:
        return [f"--runtime={box.runtime}", "-e", f"{box.variable}={numbers}"]
    options = [f"--device={node}" for node in box.nodes]
    if box.node_of_each:
        options += [
            f"--device={device.node or box.node_of_each.format(_physical(device))}" for device in devices
        ]
    elif row.visible_devices_variable:
        for name, value in env(devices).items():
            options += ["-e", f"{name}={value}"]
    return options


def _physical(device: Device) -> int:
    return device.index if device.physical_index is None else device.physical_index


def kubernetes_limits(devices: Sequence[Device]) -> dict[str, Any]:
    """Return the `resources` of a Kubernetes container that asks for as many devices of this chip.

    Raises:
        InputError: the devices are of different chips, or no device plug-in is known for the chip.
    """
    if not devices:
        return {}
    row = _only_chip(devices)
    if row.kubernetes_resource is None:
        raise InputError(
            f"{row.chip}: no Kubernetes device plug-in is known: ask your cluster's administrator for the "
            "name of the resource"
        )
    return {"limits": {row.kubernetes_resource: len(devices)}}
