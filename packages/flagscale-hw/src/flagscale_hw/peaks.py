"""Published figures of accelerators: dense rates, memory and bandwidth, each with its source and grade.

A figure is given for exactly the name that the vendor's tool reports. No number is better than a wrong one:
what no source gives, or sources contradict each other about, is None. The table is `specifications.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

__all__ = ["DTYPES", "Figure", "Peak", "Specification", "peak", "specification", "specifications"]

DTYPES = ("bf16", "fp16", "fp8", "int8")

_TABLE = Path(__file__).with_name("specifications.json")
_GIB = 1 << 30
_NAMES_OF_DTYPES = {
    "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16", "fp8": "fp8",
    "float8": "fp8", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "int8": "int8",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published number."""

    value: float
    sources: tuple[str, ...]
    """Where it was published, in words."""
    grade: Literal["measured", "secondary", "weak"]
    """The best of its sources: the vendor's own tool; somebody who cites; a table without sources."""


@dataclass(frozen=True, kw_only=True)
class Specification:
    """What is published about one model."""

    chip: str
    model: str
    """For people."""
    names: tuple[str, ...]
    """Every name under which the vendor's tools report it; empty where no name proves the model."""
    scope: Literal["device", "board", "node"]
    """What the rates are for. Only `device` is what torch counts as one."""
    memory_bytes: Figure | None = None
    memory_bytes_per_s: Figure | None = None
    tera_per_s: Mapping[str, Figure]
    """Dense tera-operations per second by data type; for int8 integer operations."""
    tdp_w: Figure | None = None

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON: every figure with value, sources and grade, unknown ones as null."""
        return {**asdict(self), "tera_per_s": {d: _plain(self.tera_per_s.get(d)) for d in DTYPES}}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """One published rate of one device."""

    model: str
    dtype: str
    flops_per_s: float
    """Dense operations per second; for int8 these are integer operations."""
    source: str
    """Where the number was published."""
    grade: str = "secondary"
    """See `Figure.grade`."""


def _plain(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else asdict(figure)


@cache
def specifications() -> tuple[Specification, ...]:
    """Return every model that figures are known for, by chip."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple(_row(row, table["sources"]) for row in table["models"])


def _row(row: Mapping[str, Any], sources: Mapping[str, Mapping[str, str]]) -> Specification:
    def figure(name: str, factor: float = 1.0) -> Figure | None:
        if name not in row:
            return None
        value, *codes = row[name]
        grades = {sources[code]["grade"] for code in codes}
        return Figure(
            value=value * factor,
            sources=tuple(sources[code]["name"] for code in codes),
            grade=next(grade for grade in ("measured", "secondary", "weak") if grade in grades),
        )

    rates = {dtype: figure(dtype) for dtype in DTYPES}
    return Specification(
        chip=row["chip"],
        model=row["model"],
        names=tuple(row["names"]),
        scope=row["scope"],
        memory_bytes=figure("memory_gib", _GIB),
        memory_bytes_per_s=figure("memory_gb_per_s", 1e9),
        tera_per_s={dtype: found for dtype, found in rates.items() if found is not None},
        tdp_w=figure("tdp_w"),
    )


@cache
def _by_name() -> dict[str, Specification]:
    return {name: row for row in specifications() for name in row.names}


def specification(model_name: str | None) -> Specification | None:
    """Return what is published about a device, or None when nothing is.

    Args:
        model_name: exactly as the vendor's tool reports it (`Device.name`).
    """
    return _by_name().get(model_name or "")


def peak(model_name: str | None, dtype: str) -> Peak | None:
    """Return the published peak of one device, or None when none is known that can be relied on.

    Figures of a whole board, and those that only tables without sources give, are not returned.

    Args:
        model_name: exactly as the driver reports it (`Device.name`).
        dtype: `bf16`, `fp16`, `fp8`, `int8`, or torch's names for them.
    """
    wanted = _NAMES_OF_DTYPES.get(dtype.removeprefix("torch."))
    row = specification(model_name)
    if row is None or model_name is None or wanted is None or row.scope != "device":
        return None
    figure = row.tera_per_s.get(wanted)
    if figure is None or figure.grade == "weak":
        return None
    return Peak(
        model=model_name,
        dtype=wanted,
        flops_per_s=figure.value * 1e12,
        source="; ".join(figure.sources),
        grade=figure.grade,
    )
