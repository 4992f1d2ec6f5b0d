"""A source in another floating-point type. The only module that computes with tensor values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flagscale_convert.tensors import TORCH_NAMES, Source, TensorInfo

__all__ = ["Cast"]

_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


class Cast:
    """A source whose floating-point tensors are given in one dtype; others are left as they are.

    Args:
        source: what is read.
        dtype: safetensors code, such as `BF16`; rounding is to nearest even.
    """

    def __init__(self, source: Source, dtype: str) -> None:
        self._source, self._dtype = source, dtype
        self._infos = {
            name: TensorInfo(dtype, info.shape) if info.dtype in _FLOATS else info
            for name, info in source.tensors().items()
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor, with the new dtype."""
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with converted rows from `start` on."""
        stored = self._source.tensors()[name]
        if stored.dtype == self._infos[name].dtype:
            self._source.read_rows(name, start, out)
            return
        import torch

        raw: np.ndarray = np.empty((len(out), stored.row_bytes), np.uint8)
        self._source.read_rows(name, start, raw)
        values = torch.from_numpy(raw).view(getattr(torch, TORCH_NAMES[stored.dtype]))
        out[...] = values.to(getattr(torch, TORCH_NAMES[self._dtype])).view(torch.uint8).numpy()
