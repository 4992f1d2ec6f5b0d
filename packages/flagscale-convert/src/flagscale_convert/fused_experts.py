"""Experts that files keep fused: one tensor of all experts of a layer, its last two axes exchanged or not.

Qwen3-VL's files with experts have their projections as (experts, inputs, outputs); transformers 5 writes
(experts, outputs, inputs), as every other weight is, and reads both. A thread holds one expert at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

import numpy as np

from flagscale_convert.tensors import DTYPES, Source, TensorInfo

__all__ = ["Divided", "Joined", "Transposed"]


class Transposed:
    """A source of which some tensors of three axes are given with the last two exchanged."""

    def __init__(self, source: Source, names: Collection[str]) -> None:
        self._source, self._names = source, names
        self._infos = {
            name: TensorInfo(info.dtype, (info.shape[0], *info.shape[:0:-1])) if name in names else info
            for name, info in source.tensors().items()
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor."""
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows from `start` on."""
        if name not in self._names:
            self._source.read_rows(name, start, out)
            return
        info = self._source.tensors()[name]
        element = f"u{DTYPES[info.dtype]}"
        raw: np.ndarray = np.empty((1, info.row_bytes), np.uint8)
        for row in range(len(out)):
            self._source.read_rows(name, start + row, raw)
            matrix = raw.view(element).reshape(info.shape[1:])
            out[row] = np.ascontiguousarray(matrix.T).view(np.uint8).reshape(-1)


class Divided:
    """A source of which some tensors of three axes are given as matrices, several of each expert.

    Args:
        source: what is read.
        parts: names of the matrices of a tensor, expert by expert, equal parts one behind the other.
    """

    def __init__(self, source: Source, parts: Mapping[str, tuple[str, ...]]) -> None:
        self._source = source
        self._infos = {name: info for name, info in source.tensors().items() if name not in parts}
        self._places: dict[str, tuple[str, int, int]] = {}
        self._last = threading.local()
        for whole, names in parts.items():
            info = source.tensors()[whole]
            per_expert = len(names) // info.shape[0]
            rows = info.shape[1] // per_expert
            for number, name in enumerate(names):
                self._infos[name] = TensorInfo(info.dtype, (rows, info.shape[2]))
                self._places[name] = whole, number // per_expert, number % per_expert * rows

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor."""
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows from `start` on."""
        if name not in self._places:
            self._source.read_rows(name, start, out)
            return
        whole, expert, first = self._places[name]
        rows = self._expert(whole, expert).reshape(-1, self._infos[name].row_bytes)
        out[...] = rows[first + start : first + start + len(out)]

    def _expert(self, whole: str, expert: int) -> np.ndarray:
        """Read an expert, once for all its matrices and rows: a thread reads them one after the other."""
        if getattr(self._last, "place", None) != (whole, expert):
            raw: np.ndarray = np.empty((1, self._source.tensors()[whole].row_bytes), np.uint8)
            self._source.read_rows(whole, expert, raw)
            self._last.place, self._last.raw = (whole, expert), raw
        held: np.ndarray = self._last.raw
        return held


class Joined:
    """The counterpart of `Divided`: matrices are given as one tensor of three axes."""

    def __init__(self, source: Source, parts: Mapping[str, tuple[str, ...]], experts: int) -> None:
        self._source, self._parts, self._experts = source, parts, experts
        wholes = {names[0]: whole for whole, names in parts.items()}
        inner = {name for names in parts.values() for name in names}
        self._infos: dict[str, TensorInfo] = {}
        for name, info in source.tensors().items():
            if name in wholes:
                rows = len(parts[wholes[name]]) // experts * info.rows
                self._infos[wholes[name]] = TensorInfo(info.dtype, (experts, rows, info.shape[1]))
            elif name not in inner:
                self._infos[name] = info

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor."""
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the experts from `start` on."""
        if name not in self._parts:
            self._source.read_rows(name, start, out)
            return
        names = self._parts[name]
        per_expert = len(names) // self._experts
        for expert in range(len(out)):
            first = (start + expert) * per_expert
            for number, part in enumerate(names[first : first + per_expert]):
                info = self._source.tensors()[part]
                place = out[expert, number * info.size_bytes : (number + 1) * info.size_bytes]
                self._source.read_rows(part, 0, place.reshape(info.rows, info.row_bytes))
