"""Ask NVIDIA's management library through ctypes; run as a program, because the library may hang or crash.

    python -m flagscale_hw.backends.nvml

prints one JSON object per line: `{"device": {...}}`, `{"problem": {...}}`, and `{"done": true}` at the end,
each as soon as it is known, so that a hang on one card keeps the cards before it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["describe", "main"]

_LIBRARIES = (
    "libnvidia-ml.so.1",
    "/usr/lib/wsl/lib/libnvidia-ml.so.1",
    "/usr/local/nvidia/lib64/libnvidia-ml.so.1",
)
_NOT_SUPPORTED = 3
_TEXT_BYTES = 96


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
    """Calls by name, failures as exceptions."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise _Failure(_NOT_SUPPORTED, f"{name}: the driver is too old for it") from None
        code = int(function(*arguments))
        if code != 0:
            raise _Failure(code, f"{name}: {self._text_of(code)}")

    def _text_of(self, code: int) -> str:
        explain = getattr(self._library, "nvmlErrorString", None)
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


def describe(raw_library: Any) -> Iterator[dict[str, Any]]:
    """Yield what the library knows, one message at a time.

    Args:
        raw_library: `libnvidia-ml` as ctypes loaded it, or anything with the same functions.
    """
    library = _Library(raw_library)
    try:
        library.call("nvmlInit_v2")
        count = library.number("nvmlDeviceGetCount_v2")
    except _Failure as failure:
        yield _problem("nvidia", f"libnvidia-ml.so.1: {failure}")
        return
    try:
        driver: str | None = library.text("nvmlSystemGetDriverVersion")
    except _Failure:
        driver = None
    for index in range(count):
        yield from _device(library, index, driver)
    yield {"done": True}


def _device(library: _Library, index: int, driver: str | None) -> Iterator[dict[str, Any]]:
    device: dict[str, Any] = {"chip": "nvidia", "index": index, "driver": driver}
    handle = ctypes.c_void_p()
    try:
        library.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    except _Failure as failure:
        yield _problem(f"nvidia {index}", str(failure))
        yield {"device": device}
        return
    for name, ask in _FIELDS.items():
        try:
            device[name] = ask(library, handle)
        except _Failure as failure:
            device[name] = None
            if failure.code != _NOT_SUPPORTED:
                yield _problem(f"nvidia {index} {name}", str(failure))
    memory = device.pop("memory")
    device["memory_total_bytes"], device["memory_used_bytes"] = memory or (None, None)
    yield {"device": device}


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
}


def _problem(where: str, text: str) -> dict[str, Any]:
    return {"problem": {"where": where, "text": text}}


def main() -> int:
    """Print everything; exit code 1 when there is no such library."""
    failure = ""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            failure = failure or str(error)
            continue
        for message in describe(library):
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()
        return 0
    sys.stdout.write(json.dumps(_problem("nvidia", f"libnvidia-ml.so.1 cannot be loaded: {failure}")) + "\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
