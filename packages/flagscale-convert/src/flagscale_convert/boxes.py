"""Read tensors whose parts lie in several places: boxes of rows and columns, row behind row in one file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flagscale_convert.positioned import PositionedFiles

__all__ = ["Box", "read_box"]


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor of at most two axes."""

    file: str
    offset: int
    """Where its first byte lies in the file."""
    first_row: int
    num_rows: int
    column_byte: int
    """Where it begins in each row of the tensor."""
    row_bytes: int


def read_box(files: PositionedFiles, box: Box, start: int, out: np.ndarray, *, what: str) -> int:
    """Fill what a box has of the rows from `start` on.

    Args:
        files: holds the box's file.
        box: the part.
        start: first row wanted.
        out: uint8 of shape (rows wanted, bytes of a whole row).
        what: names the tensor in messages.

    Returns:
        Bytes filled.

    Raises:
        SourceDamaged: the file ends early.
    """
    first = max(start, box.first_row)
    last = min(start + len(out), box.first_row + box.num_rows)
    if first >= last:
        return 0
    offset = box.offset + (first - box.first_row) * box.row_bytes
    target = out[first - start : last - start, box.column_byte : box.column_byte + box.row_bytes]
    if target.flags.c_contiguous:
        files.read_into(box.file, offset, target, what=what)
    else:
        scratch: np.ndarray = np.empty(target.shape, np.uint8)
        files.read_into(box.file, offset, scratch, what=what)
        target[...] = scratch
    return (last - first) * box.row_bytes
