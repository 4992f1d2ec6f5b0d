"""Ask NVIDIA's management library, or one made after it, through ctypes.

It runs as a program, because the library may hang or crash:

    python -m flagscale_hw.backends.nvml nvidia nvml libnvidia-ml.so.1

takes the chip, the prefix of the functions and the libraries to try. It prints one JSON object per line:
`{"device": {...}}`, `{"problem": {...}}`, and `{"done": true}` at the end, each as soon as it is known, so
that a hang on one card keeps the cards before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["describe", "main"]

_NOT_SUPPORTED = 3
_TEXT_BYTES = 96
_MAX_SLICES = 64


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Memory2(ctypes.Structure):
    """As `_Memory`, but what the driver keeps for itself does not count as used."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Utilisation(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Pci(ctypes.Structure):
    _fields_ = (
        ("bus_id_legacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("device_id", ctypes.c_uint),
        ("subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    )


class _Failure(Exception):
    """A call that did not succeed."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class _Library:
    """Calls by NVML's names, failures as exceptions."""

    def __init__(self, library: Any, prefix: str, name: str) -> None:
        self._library = library
        self._prefix = prefix
        self.name = name

    def call(self, name: str, *arguments: Any) -> None:
        name = self._prefix + name.removeprefix("nvml")
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise _Failure(_NOT_SUPPORTED, f"{name}: the driver is too old for it") from None
        code = int(function(*arguments))
        if code != 0:
            raise _Failure(code, f"{name}: {self._text_of(code)}")

    def _text_of(self, code: int) -> str:
        explain = getattr(self._library, f"{self._prefix}ErrorString", None)
        if explain is None:
            return f"error {code}"
        explain.restype = ctypes.c_char_p
        return (explain(code) or b"").decode(errors="replace") or f"error {code}"

    def text(self, name: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        self.call(name, *arguments, buffer, ctypes.c_uint(_TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def number(self, name: str, *arguments: Any) -> int:
        value = ctypes.c_uint()
        self.call(name, *arguments, ctypes.byref(value))
        return value.value


def describe(
    raw_library: Any, chip: str = "nvidia", prefix: str = "nvml", name: str = "libnvidia-ml.so.1"
) -> Iterator[dict[str, Any]]:
    """Yield what the library knows, one message at a time.

    Args:
        raw_library: `libnvidia-ml` as ctypes loaded it, or anything with the same functions.
        chip: whose devices it describes.
        prefix: what its functions begin with, instead of `nvml`.
        name: its file, for the problems.
    """
    library = _Library(raw_library, prefix, name)
    try:
        library.call("nvmlInit_v2")
        count = library.number("nvmlDeviceGetCount_v2")
    except _Failure as failure:
        yield _problem(chip, f"{name}: {failure}")
        return
    try:
        driver: str | None = library.text("nvmlSystemGetDriverVersion")
    except _Failure:
        driver = None
    for index in range(count):
        yield from _device(library, chip, index, driver)
    yield {"done": True}


def _device(library: _Library, chip: str, index: int, driver: str | None) -> Iterator[dict[str, Any]]:
    device: dict[str, Any] = {"chip": chip, "index": index, "driver": driver}
    handle = ctypes.c_void_p()
    try:
        library.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    except _Failure as failure:
        yield _problem(f"{chip} {index}", str(failure))
        yield {"device": {**device, "health": "bad", "health_reasons": [str(failure)]}}
        return
    for name, ask in _FIELDS.items():
        try:
            device[name] = ask(library, handle)
        except _Failure as failure:
            device[name] = None
            if failure.code != _NOT_SUPPORTED:
                yield _problem(f"{chip} {index} {name}", str(failure))
    memory = device.pop("memory")
    device["memory_total_bytes"], device["memory_used_bytes"] = memory or (None, None)
    device["health"], device["health_reasons"] = _health(library, handle)
    if device["is_sliced"]:
        device["slices"] = list(_slices(library, handle))
    yield {"device": device}


def _is_sliced(library: _Library, handle: ctypes.c_void_p) -> bool:
    now, later = ctypes.c_uint(), ctypes.c_uint()
    library.call("nvmlDeviceGetMigMode", handle, ctypes.byref(now), ctypes.byref(later))
    return now.value == 1


def _is_ecc_on(library: _Library, handle: ctypes.c_void_p) -> bool:
    now, later = ctypes.c_uint(), ctypes.c_uint()
    library.call("nvmlDeviceGetEccMode", handle, ctypes.byref(now), ctypes.byref(later))
    return now.value == 1


def _health(library: _Library, handle: ctypes.c_void_p) -> tuple[str | None, list[str]]:
    """Judge a card by its memory: rows or pages that broke, and errors that could not be corrected.

    None where the library answers none of it, as for cards without ECC: that a card answers is no proof.
    """
    said: dict[str, int] = {}
    for ask in (_remapped_rows, _retired_pages, _uncorrected_errors):
        with contextlib.suppress(_Failure):
            said |= ask(library, handle)
    if not said:
        return None, []
    found = [(health, text.format(said[name])) for name, health, text in _SIGNS if said.get(name)]
    if not found:
        return "ok", []
    return min(health for health, _ in found), [text for _, text in found]  # `bad` sorts before `degraded`


def _remapped_rows(library: _Library, handle: ctypes.c_void_p) -> dict[str, int]:
    names = ("corrected", "uncorrected", "remap_pending", "remap_failed")
    values = [ctypes.c_uint() for _ in names]
    library.call("nvmlDeviceGetRemappedRows", handle, *map(ctypes.byref, values))
    return {name: value.value for name, value in zip(names, values, strict=True)}


def _retired_pages(library: _Library, handle: ctypes.c_void_p) -> dict[str, int]:
    return {"retire_pending": library.number("nvmlDeviceGetRetiredPagesPendingStatus", handle)}


def _uncorrected_errors(library: _Library, handle: ctypes.c_void_p) -> dict[str, int]:
    count = ctypes.c_ulonglong()
    uncorrected, since_load = ctypes.c_uint(1), ctypes.c_uint(0)
    library.call("nvmlDeviceGetTotalEccErrors", handle, uncorrected, since_load, ctypes.byref(count))
    return {"errors": count.value}


_SIGNS = (
    ("remap_failed", "bad", "a broken row of its memory could not be replaced: the card must be"),
    ("remap_pending", "degraded", "a broken row of its memory is replaced at the next reset"),
    ("retire_pending", "degraded", "a broken page of its memory is retired at the next reset"),
    ("errors", "degraded", "{} uncorrected memory errors since the driver was loaded"),
)


def _slices(library: _Library, handle: ctypes.c_void_p) -> Iterator[dict[str, Any]]:
    """Yield the MIG devices of a card; numbers without one are skipped, as the library leaves gaps."""
    try:
        most = min(library.number("nvmlDeviceGetMaxMigDeviceCount", handle), _MAX_SLICES)
    except _Failure:
        return
    for number in range(most):
        part = ctypes.c_void_p()
        try:
            library.call(
                "nvmlDeviceGetMigDeviceHandleByIndex", handle, ctypes.c_uint(number), ctypes.byref(part)
            )
        except _Failure:
            continue
        yield _slice(library, part)


def _slice(library: _Library, part: ctypes.c_void_p) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, ask in _SLICE_FIELDS.items():
        try:
            facts[name] = ask(library, part)
        except _Failure:
            facts[name] = None
    memory = facts.pop("memory")
    facts["memory_total_bytes"], facts["memory_used_bytes"] = memory or (None, None)
    return facts


def _instance(library: _Library, part: ctypes.c_void_p) -> str:
    graphics = library.number("nvmlDeviceGetGpuInstanceId", part)
    return f"{graphics}/{library.number('nvmlDeviceGetComputeInstanceId', part)}"


def _memory(library: _Library, handle: ctypes.c_void_p) -> tuple[int, int]:
    precise = _Memory2(version=ctypes.sizeof(_Memory2) | 2 << 24)
    try:
        library.call("nvmlDeviceGetMemoryInfo_v2", handle, ctypes.byref(precise))
    except _Failure:  # drivers before 510
        memory = _Memory()
        library.call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return memory.total, memory.used
    return precise.total, precise.used


def _utilisation(library: _Library, handle: ctypes.c_void_p) -> float:
    rates = _Utilisation()
    library.call("nvmlDeviceGetUtilizationRates", handle, ctypes.byref(rates))
    return float(rates.gpu)


def _pci_bus(library: _Library, handle: ctypes.c_void_p) -> str:
    pci = _Pci()
    library.call("nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(pci))
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def _capability(library: _Library, handle: ctypes.c_void_p) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


_FIELDS: dict[str, Callable[[_Library, ctypes.c_void_p], Any]] = {
    "pci_bus": _pci_bus,
    "name": lambda library, handle: library.text("nvmlDeviceGetName", handle),
    "uuid": lambda library, handle: library.text("nvmlDeviceGetUUID", handle),
    "compute_capability": _capability,
    "memory": _memory,
    "utilisation_percent": _utilisation,
    "temperature_c": lambda library, handle: float(
        library.number("nvmlDeviceGetTemperature", handle, ctypes.c_uint(0))
    ),
    "power_w": lambda library, handle: library.number("nvmlDeviceGetPowerUsage", handle) / 1000,
    "power_limit_w": lambda library, handle: library.number("nvmlDeviceGetEnforcedPowerLimit", handle) / 1000,
    "serial": lambda library, handle: library.text("nvmlDeviceGetSerial", handle),
    "is_ecc_on": _is_ecc_on,
    "is_sliced": _is_sliced,
}
_SLICE_FIELDS: dict[str, Callable[[_Library, ctypes.c_void_p], Any]] = {
    "uuid": lambda library, part: library.text("nvmlDeviceGetUUID", part),
    "name": lambda library, part: library.text("nvmlDeviceGetName", part),
    "instance": _instance,
    "memory": _memory,
}


def _problem(where: str, text: str) -> dict[str, Any]:
    return {"problem": {"where": where, "text": text}}


def main(chip: str, prefix: str, *names: str) -> int:
    """Print everything; exit code 1 when there is no such library."""
    failure = ""
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            failure = failure or str(error)
            continue
        for message in describe(library, chip, prefix, name):
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()
        return 0
    sys.stdout.write(json.dumps(_problem(chip, f"{names[0]} cannot be loaded: {failure}")) + "\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[3:]))
