"""Numbers with units, as vendors' tools print them. What is not exactly such a number is not known."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "MOST",
    "NUMBER",
    "UNKNOWN",
    "address",
    "bytes_of",
    "celsius",
    "clean",
    "percent",
    "text_of",
    "watts",
    "whole",
]

MOST = 1024
"""Devices that one answer may name; a tool that prints without end names no more."""

# Bounded, so that garbage neither overflows nor costs time; ASCII, so that no other script's digits count.
NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,9})?"
UNKNOWN = r"(?:N/?A|n/a|-{1,3}|ERR!|[Uu]nknown|None|Not Supported|\[[^\]|]{0,60}\])"
"""What tools print instead of a value: every one of these is None, and none of them is 0."""

_QUANTITY = re.compile(rf"({NUMBER})\s*([A-Za-z%°℃µ]*)")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|[\x00\r]")
_BUS = re.compile(r"(?:(?:0000)?([0-9a-f]{1,4}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")

# The tools of this field write MB for what is 2**20 bytes: 65536 MB are the 64 GiB of a card.
_BYTES = {
    "B": 1,
    **{
        f"{letter}{rest}": 1 << (10 * power)
        for power, letter in enumerate("KMGT", 1)
        for rest in ("iB", "B", "iBytes", "Bytes")
    },
}
_BYTES["kB"] = 1 << 10
_CELSIUS = dict.fromkeys(("C", "c", "°C", "°c", "℃"), 1.0)
_WATTS = {"W": 1.0, "mW": 0.001}


def clean(text: str) -> str:
    """Take away colours, carriage returns and zero bytes."""
    return _ANSI.sub("", text)


def text_of(value: object) -> str | None:
    """Return what a tool says of a name or a serial number; None for its words for not known."""
    if not isinstance(value, str):
        return None
    words = " ".join(value.split())
    return None if not words or words == "/" or re.fullmatch(UNKNOWN, words) else words[:120]


def whole(value: object) -> int | None:
    """Return a small whole number, such as an index."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < 1_000_000 else None
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value) else None


def bytes_of(value: object, unit: str = "") -> int | None:
    """Return an amount of memory in bytes.

    Args:
        value: such as `65536 MiB`; a number alone counts in `unit`.
        unit: where the title names it, such as `MB`.
    """
    amount = _quantity(value, unit, _BYTES)
    return None if amount is None else int(amount)


def celsius(value: object, unit: str = "") -> float | None:
    """Return a temperature in degrees Celsius."""
    return _quantity(value, unit, _CELSIUS)


def watts(value: object, unit: str = "") -> float | None:
    """Return a power in watts."""
    return _quantity(value, unit, _WATTS)


def percent(value: object, unit: str = "") -> float | None:
    """Return a share between 0 and 100 percent."""
    share = _quantity(value, unit, {"%": 1.0})
    return share if share is not None and share <= 100 else None


def _quantity(value: object, unit: str, units: Mapping[str, float]) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value}"
    found = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return None
    factor = units.get(found[2] or unit)
    return None if factor is None else float(found[1]) * factor


def address(bus: object) -> str | None:
    """Write a bus id as the kernel does: `00000000:3B:00.0` and `3b:00.0` are `0000:3b:00.0`."""
    found = _BUS.fullmatch(bus.strip().lower()) if isinstance(bus, str) else None
    return None if found is None else f"{found[1] or '0':0>4}:{found[2]}:{found[3]}.{found[4]}"
