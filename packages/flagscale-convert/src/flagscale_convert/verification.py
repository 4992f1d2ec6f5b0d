"""Compare two checkpoints of any formats bit by bit, through the rules, without writing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_convert.arrange import as_huggingface, as_megatron
from flagscale_convert.locate import Opened, open_checkpoint
from flagscale_convert.model import Model, require_fit, understand
from flagscale_convert.tensors import DTYPES, Source, TensorInfo

__all__ = ["Difference", "VerifyReport", "first_difference", "verify"]

_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which the checkpoints differ."""

    tensor: str
    """Hugging Face name, or the name of a configuration value."""
    what: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.what}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a comparison found."""

    num_tensors: int
    compared_bytes: int
    differences: tuple[Difference, ...]

    @property
    def is_equal(self) -> bool:
        """True when nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain data."""
        return {
            "is_equal": self.is_equal,
            "num_tensors": self.num_tensors,
            "compared_bytes": self.compared_bytes,
            "differences": [{"tensor": found.tensor, "what": found.what} for found in self.differences],
        }


def verify(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare two checkpoints, each Hugging Face or torch_dist.

    Compared are the configuration (what shapes the model and what it computes) and every bit of every tensor,
    under their Hugging Face names; padding rows of the vocabulary mean nothing and are not compared.

    Args:
        a: one checkpoint.
        b: the other.
        vocab_size: true vocabulary, where a checkpoint does not tell it.
        progress: told about bytes compared and bytes in all.

    Raises:
        SourceNotFound: no checkpoint there.
        SourceDamaged: half-written or truncated.
        Unsupported: an architecture that is not known.
    """
    model_a, model_b = _understand_both(open_checkpoint(Path(a)), open_checkpoint(Path(b)), vocab_size)
    require_fit(model_a, Path(a))
    require_fit(model_b, Path(b))
    view_a, view_b = _view(model_a), _view(model_b)
    found = [*_compare_architectures(model_a, model_b)]
    infos_a, infos_b = view_a.tensors(), view_b.tensors()
    found += _compare_infos(infos_a, infos_b)
    shared = [name for name, info in infos_a.items() if infos_b.get(name) == info]
    total = sum(infos_a[name].size_bytes for name in shared)
    done = 0
    for name in shared:
        element = first_difference(view_a, name, view_b, name)
        if element is not None:
            found.append(Difference(name, f"first differs at element {list(element)}"))
        done += infos_a[name].size_bytes
        if progress is not None:
            progress(done, total)
    return VerifyReport(len(shared), total, tuple(found))


def _understand_both(one: Opened, other: Opened, vocab_size: int | None) -> tuple[Model, Model]:
    """Understand two checkpoints; where only one knows the vocabulary, the other takes it."""
    left, right = understand(one, vocab_size=vocab_size), understand(other, vocab_size=vocab_size)
    if left.knows_vocabulary and not right.knows_vocabulary:
        right = understand(other, vocab_size=left.architecture.vocab_size)
    elif right.knows_vocabulary and not left.knows_vocabulary:
        left = understand(one, vocab_size=right.architecture.vocab_size)
    return left, right


def _view(model: Model) -> Source:
    if model.is_megatron:
        return as_huggingface(model.source, model.bindings)
    return as_huggingface(as_megatron(model.source, model.bindings), model.bindings)


def _compare_architectures(one: Model, other: Model) -> list[Difference]:
    left, right = one.architecture, other.architecture
    names = [name for name in left.__slots__ if name not in ("padded_vocab_size", "init_std")]
    return [
        Difference(f"configuration `{name}`", f"{getattr(left, name)} against {getattr(right, name)}")
        for name in names
        if getattr(left, name) != getattr(right, name)
    ]


def _compare_infos(one: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> list[Difference]:
    found = [Difference(name, "only in the first") for name in one if name not in other]
    found += [Difference(name, "only in the second") for name in other if name not in one]
    for name, info in one.items():
        if name in other and other[name] != info:
            theirs = other[name]
            found.append(
                Difference(
                    name, f"{info.dtype} {list(info.shape)} against {theirs.dtype} {list(theirs.shape)}"
                )
            )
    return found


def first_difference(one: Source, name: str, other: Source, other_name: str) -> tuple[int, ...] | None:
    """Give the index of the first element whose bits differ; None when all are equal.

    Both tensors must have the same dtype and shape.
    """
    info = one.tensors()[name]
    rows_at_once = max(1, _BUFFER_BYTES // max(1, info.row_bytes))
    for start in range(0, info.rows, rows_at_once):
        rows = min(rows_at_once, info.rows - start)
        left: np.ndarray = np.empty((rows, info.row_bytes), np.uint8)
        right = np.empty_like(left)
        one.read_rows(name, start, left)
        other.read_rows(other_name, start, right)
        if not np.array_equal(left, right):
            byte = int(np.flatnonzero(left.ravel() != right.ravel())[0]) + start * info.row_bytes
            element = byte // DTYPES[info.dtype]
            return tuple(int(axis) for axis in np.unravel_index(element, info.shape or (1,)))
    return None
