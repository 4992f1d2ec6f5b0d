"""Tensors as rows of bytes: what every format, rule and file layout here agrees on.

A tensor is `rows` (its first axis) times `row_bytes` (everything behind it). All rules of dense models move
whole rows, so neither reading nor writing needs a tensor library. Casting, which does, is in `cast.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flagscale_convert.errors import Unsupported

__all__ = [
    "DTYPES",
    "TORCH_NAMES",
    "Source",
    "TensorInfo",
    "dtype_from_storage",
    "dtype_from_torch",
    "format_bytes",
]

DTYPES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}
"""Element size in bytes of every dtype, by its safetensors code, which is the name used everywhere here."""

TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F32": "float32",
    "I64": "int64",
    "F64": "float64",
}
_FROM_TORCH = {torch_name: code for code, torch_name in TORCH_NAMES.items()}


def dtype_from_torch(name: str, *, where: str) -> str:
    """Name a torch dtype (`float32`, without `torch.`) by its safetensors code.

    Raises:
        Unsupported: safetensors has no such dtype.
    """
    try:
        return _FROM_TORCH[name]
    except KeyError:
        raise Unsupported(f"{where}: dtype (torch.{name}): allowed are {', '.join(_FROM_TORCH)}") from None


_STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "IntStorage": "I32",
    "FloatStorage": "F32",
    "LongStorage": "I64",
    "DoubleStorage": "F64",
}


def dtype_from_storage(path: str, *, where: str) -> str:
    """Name the element type of a pickled storage class (`torch.FloatStorage`) by its safetensors code.

    Raises:
        Unsupported: no such type is read.
    """
    try:
        return _STORAGES[path.rpartition(".")[2]]
    except KeyError:
        raise Unsupported(f"{where}: storage ({path}): allowed are {', '.join(_STORAGES)}") from None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type and shape of a tensor, without its data."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Length of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.rows * self.row_bytes

    @property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


class Source(Protocol):
    """Anything tensors can be read from, a few rows at a time, from any thread."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor, in the order of the model."""

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows from `start` on.

        out: uint8 of shape (rows wanted, row_bytes); may be a strided view.

        Raises:
            SourceDamaged: the file ends early or its framing is wrong.
        """


def format_bytes(size_bytes: float) -> str:
    """Write a size for people: `1.5 GB` (decimal units, as disks and hubs count)."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= step:
            return f"{size_bytes / step:.1f} {unit}"
    return f"{size_bytes:.0f} B"
