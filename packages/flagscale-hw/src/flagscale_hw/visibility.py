"""Which devices the environment lets this process use, read as the chip's runtime reads it."""

from __future__ import annotations

from flagscale_hw.backend import Backend
from flagscale_hw.chips import runtime
from flagscale_hw.errors import DetectError
from flagscale_hw.host import Host
from flagscale_hw.machine import Device, Problem

__all__ = ["variable", "visible"]

_HIDE_ALL = ("-1", "NoDevFiles")


def variable(backend: Backend) -> str | None:
    """Name the variable that selects devices for a process; None where there is none."""
    if backend.runtime:
        name = backend.runtime.get("visible_devices_variable")
        return name if isinstance(name, str) else None
    try:
        return runtime(backend.chip).visible_devices_variable
    except DetectError:
        return None


def visible(
    backend: Backend, host: Host, devices: tuple[Device, ...]
) -> tuple[tuple[int, ...] | None, tuple[Problem, ...]]:
    """Return the indices that the environment selects, None when it does not restrict anything.

    CUDA and the runtimes that follow it stop at the first entry that names no device.
    """
    name = variable(backend)
    text = host.environ.get(name) if name else None
    if name is None or text is None:
        return None, ()
    said = f"{name}={text}"
    chosen: list[int] = []
    entries = [entry.strip() for entry in text.split(",")] if text.strip() else []
    for entry in entries:
        index = _index_of(entry, devices, backend.numbered_by)
        if index is None:
            if entry in _HIDE_ALL:
                return tuple(chosen), ()
            what = f"{entry!r} names no device; {_reader(name)} stops before it"
            return tuple(chosen), (_doubt(backend, f"{said}: {what}", devices),)
        if index in chosen:
            return (), (
                _doubt(backend, f"{said}: {entry!r} is named twice; {_reader(name)} then uses none", devices),
            )
        chosen.append(index)
    return tuple(chosen), ()


def _reader(name: str) -> str:
    return "CUDA" if name.startswith("CUDA") else "the runtime"


def _doubt(backend: Backend, text: str, devices: tuple[Device, ...]) -> Problem:
    hint = f"give indices 0 to {len(devices) - 1} or whole UUIDs"
    return Problem(where=backend.chip, text=text, hint=hint)


def _index_of(entry: str, devices: tuple[Device, ...], numbered_by: str) -> int | None:
    if entry.isdecimal():
        matching = [device.index for device in devices if getattr(device, numbered_by) == int(entry)]
    elif "-" in entry[1:]:
        matching = [device.index for device in devices if (device.uuid or "").startswith(entry)]
        matching += [
            device.index for device in devices for part in device.slices if (part.uuid or "") == entry
        ]
    else:
        return None
    return matching[0] if len(matching) == 1 else None
