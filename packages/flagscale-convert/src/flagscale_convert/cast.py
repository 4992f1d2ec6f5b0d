"""A source in another floating-point type. The only module that computes with tensor values.

numpy has no bfloat16, which is the upper half of a float32; torch has, but it is a hundred times the size of
everything else this package needs.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np

from flagscale_convert.errors import Unsupported
from flagscale_convert.tensors import Source, TensorInfo

__all__ = ["Cast", "to_bfloat16", "to_float"]

_NATIVE = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_FLOATS = frozenset({*_NATIVE, "BF16"})
_QUIET_NAN = 0x7FC0


def to_float(raw: np.ndarray, dtype: str) -> np.ndarray | None:
    """View rows of bytes as numbers: float16, float32 or float64 as they are, bfloat16 widened to float32.

    Args:
        raw: uint8, contiguous.
        dtype: safetensors code.

    Returns:
        The numbers; None when the dtype is no floating-point type computed with here.
    """
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(_NATIVE[dtype]) if dtype in _NATIVE else None


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest, ties to even; any NaN becomes the quiet one."""
    bits: np.ndarray = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint32(_QUIET_NAN), rounded).astype(np.uint16)


class Cast:
    """A source whose floating-point tensors are given in one dtype; others are left as they are.

    Args:
        source: what is read.
        dtype: `BF16`, `F16` or `F32`, or None for what is stored; rounding is to nearest, ties to even.
        float32: names that are given in F32 whatever the dtype.
    """

    def __init__(self, source: Source, dtype: str | None, float32: Container[str] = ()) -> None:
        self._source = source
        self._infos = {
            name: TensorInfo("F32" if name in float32 else dtype or info.dtype, info.shape)
            if info.dtype in _FLOATS
            else info
            for name, info in source.tensors().items()
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor, with the new dtype."""
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with converted rows from `start` on.

        Raises:
            Unsupported: a finite value is beyond the range of the new dtype.
        """
        stored = self._source.tensors()[name]
        if stored.dtype == self._infos[name].dtype:
            self._source.read_rows(name, start, out)
            return
        raw: np.ndarray = np.empty((len(out), stored.row_bytes), np.uint8)
        self._source.read_rows(name, start, raw)
        values = to_float(raw, stored.dtype)
        assert values is not None  # noqa: S101 - only floating-point tensors change dtype
        out[...] = self._narrowed(name, values, self._infos[name].dtype).view(np.uint8)

    def _narrowed(self, name: str, values: np.ndarray, dtype: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # looked for below, with the tensor's name
            if dtype == "BF16":
                narrowed = to_bfloat16(values.astype(np.float32, copy=False))
                widened = to_float(narrowed.view(np.uint8), "BF16")
            else:
                narrowed = widened = values.astype(_NATIVE[dtype])
        if np.isfinite(values).all() and not np.isfinite(widened).all():
            largest = float(np.abs(values).max())
            raise Unsupported(
                f"`{name}`: a value ({largest:g}) is beyond the range of {dtype}: choose bf16 or fp32"
            )
        return narrowed
