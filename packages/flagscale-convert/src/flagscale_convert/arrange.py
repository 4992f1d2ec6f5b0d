"""A source seen through rules: the same bytes under the names and row order of the other world.

Views read through, nothing is held. They compose: a Megatron checkpoint seen as Hugging Face and that again
as Megatron is the first checkpoint in the canonical dialect.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flagscale_convert.rules import Binding
from flagscale_convert.tensors import DTYPES, Source, TensorInfo

__all__ = ["Arrangement", "Comparison", "as_canonical", "as_huggingface", "as_megatron", "compare_names"]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of an arranged tensor and where they come from."""

    row: int
    rows: int
    source: str
    source_row: int


@dataclass(frozen=True, slots=True)
class _Arranged:
    info: TensorInfo
    pieces: tuple[_Piece, ...]
    """Sorted by row; rows between pieces are zeros."""
    reshaped: str = ""
    """Name of the tensor that has the same elements in another shape; there are no pieces then."""
    is_transposed: bool = False
    """True when that tensor is a matrix with the axes exchanged."""


class Arrangement:
    """A source under other names and row orders."""

    def __init__(self, source: Source, arranged: Mapping[str, _Arranged]) -> None:
        self._source = source
        self._arranged = arranged
        self._infos = {name: entry.info for name, entry in arranged.items()}
        self._starts = {name: [piece.row for piece in entry.pieces] for name, entry in arranged.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every arranged tensor, in the order of the model."""
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows from `start` on; padding rows become zeros."""
        if self._arranged[name].reshaped:
            self._read_reshaped(name, start, out)
            return
        pieces = self._arranged[name].pieces
        stop, covered = start + len(out), start
        index = max(0, bisect_right(self._starts[name], start) - 1)
        while covered < stop:
            piece = pieces[index] if index < len(pieces) else None
            index += 1
            if piece is None or piece.row >= stop:
                out[covered - start :] = 0
                return
            if piece.row > covered:
                out[covered - start : piece.row - start] = 0
                covered = piece.row
            last = min(stop, piece.row + piece.rows)
            if last <= covered:
                continue
            source_row = piece.source_row + covered - piece.row
            self._source.read_rows(piece.source, source_row, out[covered - start : last - start])
            covered = last

    def _read_reshaped(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` from a tensor of other rows, which is read whole: only small ones are reshaped."""
        entry = self._arranged[name]
        info = self._source.tensors()[entry.reshaped]
        whole: np.ndarray = np.empty((info.rows, info.row_bytes), np.uint8)
        self._source.read_rows(entry.reshaped, 0, whole)
        if entry.is_transposed:
            matrix = whole.view(f"u{DTYPES[info.dtype]}")
            whole = np.ascontiguousarray(matrix.T).view(np.uint8)
        out[...] = whole.reshape(entry.info.rows, entry.info.row_bytes)[start : start + len(out)]


def as_huggingface(source: Source, bindings: Iterable[Binding]) -> Arrangement:
    """See a Megatron source (logical names) as Hugging Face."""
    infos = source.tensors()
    arranged = {}
    for binding in bindings:
        whole = infos.get(binding.megatron)
        if whole is None:
            continue
        for part, name in enumerate(binding.hf):
            pieces = [
                _Piece(span.part_row, span.rows, binding.megatron, span.row)
                for span in binding.spans
                if span.part == part
            ]
            info = TensorInfo(whole.dtype, binding.part_shapes[part])
            if binding.has_own_rows:
                arranged[name] = _Arranged(info, (), binding.megatron, binding.is_transposed)
                continue
            arranged[name] = _Arranged(info, tuple(sorted(pieces, key=lambda piece: piece.row)))
    return Arrangement(source, arranged)


def as_megatron(source: Source, bindings: Iterable[Binding]) -> Arrangement:
    """See a Hugging Face source as Megatron's logical tensors.

    Tensors without parts have the type of the source's first one.
    """
    infos = source.tensors()
    first = next(iter(infos.values()), None)
    arranged = {}
    for binding in bindings:
        parts = [infos.get(name) for name in binding.hf] or [first]
        if binding.is_copy or parts[0] is None or None in parts:
            continue
        pieces = [_Piece(span.row, span.rows, binding.hf[span.part], span.part_row) for span in binding.spans]
        info = TensorInfo(parts[0].dtype, binding.whole_shape)
        if binding.has_own_rows and binding.hf:
            arranged[binding.megatron] = _Arranged(info, (), binding.hf[0], binding.is_transposed)
            continue
        arranged[binding.megatron] = _Arranged(info, tuple(sorted(pieces, key=lambda piece: piece.row)))
    return Arrangement(source, arranged)


def as_canonical(source: Source, bindings: Sequence[Binding], written: Sequence[Binding]) -> Arrangement:
    """See a Megatron source under the names, and with the vocabulary padding, that are written.

    Args:
        source: logical tensors under the names of any dialect.
        bindings: the family's rules as bound to the source.
        written: the same rules as bound to the destination.
    """
    infos = source.tensors()
    arranged = {}
    for ours, theirs in zip(written, bindings, strict=True):
        whole = infos.get(theirs.megatron)
        if whole is None:
            continue
        # The rows that carry something come first in every operation; what is behind them is padding.
        rows = whole.rows if theirs.has_own_rows else sum(span.rows for span in theirs.spans)
        piece = _Piece(0, rows, theirs.megatron, 0)
        arranged[ours.megatron] = _Arranged(TensorInfo(whole.dtype, ours.whole_shape), (piece,))
    return Arrangement(source, arranged)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a source has against what its architecture needs."""

    missing: tuple[str, ...]
    unmapped: tuple[str, ...]
    misshaped: tuple[str, ...]
    """One sentence per tensor: name, shape, shape needed."""
    mixed: tuple[str, ...]
    """One sentence per group of tensors that must be merged but differ in dtype."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Every finding as a sentence."""
        return (
            *(f"`{name}` is missing" for name in self.missing),
            *(f"`{name}` has no rule" for name in self.unmapped),
            *self.misshaped,
            *self.mixed,
        )


def compare_names(
    infos: Mapping[str, TensorInfo],
    bindings: Sequence[Binding],
    *,
    is_megatron: bool,
    ignored: Iterable[str] = (),
) -> Comparison:
    """Compare the tensors that are there with those the rules need.

    Args:
        infos: tensors of the source.
        bindings: rules applied to its architecture.
        is_megatron: which side of the rules the source is on.
        ignored: names that may be there and are left out.
    """
    needed: dict[str, tuple[int, ...]] = {}
    mixed = []
    for binding in bindings:
        if is_megatron:
            needed[binding.megatron] = binding.whole_shape
        else:
            needed.update(zip(binding.hf, binding.part_shapes, strict=True))
            dtypes = sorted({infos[name].dtype for name in binding.hf if name in infos})
            if len(dtypes) > 1:
                mixed.append(
                    f"{', '.join(f'`{name}`' for name in binding.hf)}: dtypes ({', '.join(dtypes)}) differ"
                )
    skipped = set(ignored)
    optional = {name for binding in bindings if binding.is_copy for name in binding.hf}
    optional |= {binding.megatron for binding in bindings if not binding.hf}
    return Comparison(
        missing=tuple(name for name in needed if name not in infos and name not in optional),
        unmapped=tuple(name for name in infos if name not in needed and name not in skipped),
        misshaped=tuple(
            f"`{name}` has shape {list(infos[name].shape)}: the configuration needs {list(shape)}"
            for name, shape in needed.items()
            if name in infos and infos[name].shape != shape
        ),
        mixed=tuple(mixed),
    )
