"""How far two tensors are from each other: for casts, where bits must differ and values must not much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flagscale_convert.cast import to_float
from flagscale_convert.tensors import Source

__all__ = ["TensorStats", "measure"]

_ELEMENTS_AT_ONCE = 1 << 20
_ROUNDOFF: Mapping[str, tuple[float, float]] = {
    "BF16": (2.0**-8, 2.0**-134),
    "F16": (2.0**-11, 2.0**-25),
    "F32": (2.0**-24, 2.0**-150),
    "F64": (0.0, 0.0),
}
"""Largest relative error of rounding to nearest, and largest absolute one near zero."""


@dataclass(frozen=True, slots=True)
class TensorStats:
    """The difference of two tensors of one shape, in float64."""

    tensor: str
    dtypes: tuple[str, str]
    max_abs: float
    """Largest difference of an element."""
    rms: float
    """Root of the mean squared difference."""
    relative: float
    """`rms` over the root mean square of the first; 0 when both are zeros."""
    cosine: float
    """Of the angle between both as vectors; 1 when both are zeros."""
    num_beyond: int
    """Elements further apart than rounding to the coarser type explains, or not finite on one side only."""

    def to_dict(self) -> dict[str, Any]:
        """Give the numbers as plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


def measure(one: Source, other: Source, name: str) -> TensorStats | None:
    """Compare a tensor of two sources, a few rows at a time.

    Returns:
        None when a side is of no floating-point type.
    """
    infos = one.tensors()[name], other.tensors()[name]
    dtypes = (infos[0].dtype, infos[1].dtype)
    if not set(dtypes) <= set(_ROUNDOFF):
        return None
    # Equal types leave nothing to rounding.
    relative, absolute = (0.0, 0.0) if dtypes[0] == dtypes[1] else max(_ROUNDOFF[dtype] for dtype in dtypes)
    sums = np.zeros(4)
    largest, beyond = 0.0, 0
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // max(1, math.prod(infos[0].shape[1:])))
    for start in range(0, infos[0].rows, rows_at_once):
        rows = min(rows_at_once, infos[0].rows - start)
        left, right = (_values(source, name, start, rows) for source in (one, other))
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(left - right)
            apart[left == right] = 0.0  # infinities that agree
            apart[np.isnan(left) & np.isnan(right)] = 0.0
            beyond += int(np.count_nonzero(~(apart <= relative * np.abs(left) + absolute)))
            finite = np.nan_to_num(apart, nan=np.inf)
            largest = max(largest, float(finite.max(initial=0.0)))
            sums += [np.vdot(apart, apart), np.vdot(left, left), np.vdot(right, right), np.vdot(left, right)]
    count = max(1, infos[0].num_elements)
    lengths = math.sqrt(sums[1]) * math.sqrt(sums[2])
    is_zero = not sums[1] and not sums[2]
    return TensorStats(
        name,
        dtypes,
        largest,
        math.sqrt(sums[0] / count),
        0.0 if not sums[0] else math.sqrt(sums[0] / sums[1]) if sums[1] else math.inf,
        float(sums[3] / lengths) if lengths else float(is_zero),
        beyond,
    )


def _values(source: Source, name: str, start: int, rows: int) -> np.ndarray:
    info = source.tensors()[name]
    raw: np.ndarray = np.empty((rows, info.row_bytes), np.uint8)
    source.read_rows(name, start, raw)
    values = to_float(raw, info.dtype)
    assert values is not None  # noqa: S101 - only floating-point types come here
    return values.astype(np.float64).ravel()
