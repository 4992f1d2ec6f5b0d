"""Block-scaled fp8 weights, as DeepSeek-V3 and Kimi-K2 are published, read as plain floating-point tensors.

A weight of dtype F8_E4M3 has a companion `<name>_scale_inv` with one number per block, by which the block's
values are multiplied (formula: `weight_dequant` beside the published DeepSeek-V3 weights): in float32,
rounded once to what is asked for. A block has at most 256 different values, so each is computed and rounded
once per block and looked up from there on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flagscale_convert.cast import to_bfloat16, to_float
from flagscale_convert.errors import Unsupported
from flagscale_convert.tensors import Source, TensorInfo

__all__ = ["Dequantised", "read_block_size"]

_SUFFIX = "_scale_inv"
_CACHED_ELEMENTS = 1 << 16
"""Elements worked on at once, few enough for a core's cache."""


def _e4m3_values() -> np.ndarray:
    """Give the value of every byte read as F8_E4M3 (OCP 8-bit floating point: bias 7, no infinity)."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    subnormal = mantissa * 2.0**-9
    magnitude = np.where(exponent == 0, subnormal, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code > 127, -magnitude, magnitude).astype(np.float32)


_VALUES = _e4m3_values()


def read_block_size(config: Mapping[str, Any], *, where: str) -> tuple[int, int] | None:
    """Read the block size of `quantization_config`; None when weights are not quantised.

    Args:
        config: a parsed `config.json`.
        where: names it in messages.

    Raises:
        Unsupported: another quantisation than block-scaled fp8.
    """
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return None
    fields = quantisation if isinstance(quantisation, Mapping) else {}
    method, block = fields.get("quant_method"), fields.get("weight_block_size")
    is_block = (
        isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    )
    if block is None or method != "fp8" or not is_block or fields.get("fmt", "e4m3") != "e4m3":
        raise Unsupported(
            f"{where}: quantization_config (quant_method {method}, weight_block_size {block}): only fp8"
            " (e4m3) with a scale per block of rows and columns is read: dequantise the model first"
        )
    return block[0], block[1]


class Dequantised:
    """A source whose fp8 weights are given as floating-point numbers; their scales are gone.

    Args:
        source: what is read.
        block: rows and columns of a block; those at the edges may be smaller.
        dtype: `BF16`, `F16` or `F32`.
        where: names the source in messages.

    Raises:
        Unsupported: a weight without scale, a scale without weight, or one of the wrong shape.
    """

    def __init__(self, source: Source, block: tuple[int, int], dtype: str, *, where: str) -> None:
        self._source, self._block = source, block
        self._infos: dict[str, TensorInfo] = {}
        stored = source.tensors()
        for name, info in stored.items():
            if name.endswith(_SUFFIX):
                weight = name.removesuffix(_SUFFIX)
                if stored.get(weight, info).dtype != "F8_E4M3":
                    raise Unsupported(f"{where}: `{name}` belongs to no fp8 weight `{weight}`")
                continue
            if info.dtype == "F8_E4M3":
                self._check(name, info, stored.get(name + _SUFFIX), where)
            self._infos[name] = TensorInfo(dtype, info.shape) if info.dtype == "F8_E4M3" else info

    def _check(self, name: str, info: TensorInfo, scale: TensorInfo | None, where: str) -> None:
        if scale is None:
            raise Unsupported(
                f"{where}: `{name}` is fp8 without `{name}{_SUFFIX}`: its values are unknown without"
            )
        needed = tuple(-(-size // step) for size, step in zip(info.shape, self._block, strict=False))
        if len(info.shape) != 2 or scale.shape != needed or scale.dtype not in ("F32", "BF16"):
            raise Unsupported(
                f"{where}: `{name}{_SUFFIX}` is {scale.dtype} {list(scale.shape)}: for {list(info.shape)} in"
                f" blocks of {self._block[0]} x {self._block[1]}, F32 or BF16 {list(needed)} is needed"
            )

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor but the scales."""
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows from `start` on."""
        stored, info = self._source.tensors()[name], self._infos[name]
        if stored == info:
            self._source.read_rows(name, start, out)
            return
        rows, columns = self._block
        first = start // rows
        scales = self._scales(name, first, -(-(start + len(out)) // rows))
        # Where each column's table begins, the tables of a row of blocks lying one behind the other.
        tables_at = np.arange(info.shape[1], dtype=np.uint32) // columns * 256
        if tables_at[-1] < 1 << 16:
            tables_at = tables_at.astype(np.uint16)  # half the bytes through the cache
        values = out if out.flags.c_contiguous else np.empty(out.shape, np.uint8)
        numbers = values.view(_NUMPY[info.dtype])
        codes: np.ndarray = np.empty((min(rows, len(out)), stored.row_bytes), np.uint8)
        at_once = max(1, _CACHED_ELEMENTS // info.shape[1])
        done = 0
        while done < len(out):
            block = (start + done) // rows
            count = min(len(out) - done, (block + 1) * rows - start - done)
            self._source.read_rows(name, start + done, codes[:count])
            tables = _tables(scales[block - first], info.dtype)
            for row in range(0, count, at_once):
                part = codes[row : min(row + at_once, count)]
                target = numbers[done + row : done + row + len(part)]
                np.take(tables, part + tables_at, out=target, mode="clip")
            done += count
        if values is not out:
            out[...] = values

    def _scales(self, name: str, first: int, last: int) -> np.ndarray:
        """Read the scales of rows of blocks `first` to `last`: float32, (block rows, block columns)."""
        info = self._source.tensors()[name + _SUFFIX]
        raw: np.ndarray = np.empty((last - first, info.row_bytes), np.uint8)
        self._source.read_rows(name + _SUFFIX, first, raw)
        scales = to_float(raw, info.dtype)
        assert scales is not None  # noqa: S101 - checked when opened
        return scales


_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def _tables(scales: np.ndarray, dtype: str) -> np.ndarray:
    """Give the number for every byte in every block of a row, ready to be written: shape (blocks * 256,)."""
    with np.errstate(over="ignore", invalid="ignore"):  # as torch: infinity
        exact = np.outer(scales, _VALUES).ravel()
        return to_bfloat16(exact) if dtype == "BF16" else exact.astype(_NUMPY[dtype])
