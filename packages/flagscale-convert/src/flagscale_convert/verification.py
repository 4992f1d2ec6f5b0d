"""Compare two checkpoints of any formats through the rules, without writing anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from flagscale_convert.arrange import as_huggingface, as_megatron
from flagscale_convert.comparison import TensorStats, measure
from flagscale_convert.errors import Unsupported
from flagscale_convert.locate import Opened, open_checkpoint
from flagscale_convert.manifest import check_manifest, manifest_root
from flagscale_convert.model import Model, require_fit, understand
from flagscale_convert.tensors import DTYPES, Source, TensorInfo

__all__ = ["Difference", "Mode", "VerifyReport", "first_difference", "verify"]

Mode = Literal["cover", "bitwise", "stats", "logits"]
_LOGIT_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that float32 arithmetic explains."""
_TEXT_LAYER = re.compile(r"(?:^|\.)(?:model|language_model)\.layers\.(\d+)\.")
"""A layer of a language model, under its Hugging Face name; towers have other names for theirs."""
_WEIGHTS = (".safetensors", ".distcp", ".pt")
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
    mode: Mode = "bitwise"
    stats: tuple[TensorStats, ...] = ()
    """Of every tensor, in mode `stats`."""
    logits: tuple[float, float] | None = None
    """Largest difference and largest logit, in mode `logits`."""

    @property
    def is_equal(self) -> bool:
        """True when nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain data."""
        return {
            "is_equal": self.is_equal,
            "mode": self.mode,
            "num_tensors": self.num_tensors,
            "compared_bytes": self.compared_bytes,
            "differences": [{"tensor": found.tensor, "what": found.what} for found in self.differences],
            "stats": [entry.to_dict() for entry in self.stats],
            "logits": None if self.logits is None else list(self.logits),
        }


def verify(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    mode: Mode = "bitwise",
    vocab_size: int | None = None,
    num_layers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare two checkpoints of any formats and parallel layouts.

    Compared are the configuration (what shapes the model and what it computes) and the tensors under their
    Hugging Face names; padding rows of the vocabulary mean nothing and are not compared.

    Args:
        a: one checkpoint.
        b: the other.
        mode: `cover` compares names, types and shapes and reads no weights; `bitwise` every bit, and files
            with the manifest beside them if there is one; `stats`
            values, for checkpoints of different types: elements further apart than rounding explains are
            differences; `logits` what both compute, run by transformers.
        vocab_size: true vocabulary, where a checkpoint does not tell it.
        num_layers: compare only so many of the first layers, which `logits` needs for large models.
        progress: told about bytes compared and bytes in all.

    Raises:
        SourceNotFound: no checkpoint there.
        SourceDamaged: half-written or truncated.
        Unsupported: an architecture that is not known, or (`logits`) transformers cannot run it.
    """
    if mode not in get_args(Mode):
        raise Unsupported(f"mode ({mode}): one of {', '.join(get_args(Mode))}")
    opened_a, opened_b = open_checkpoint(Path(a)), open_checkpoint(Path(b))
    model_a, model_b = _understand_both(opened_a, opened_b, vocab_size)
    require_fit(model_a, Path(a))
    require_fit(model_b, Path(b))
    view_a, view_b = _view(model_a), _view(model_b)
    infos_a, infos_b = (
        _first_layers(view_a.tensors(), num_layers),
        _first_layers(view_b.tensors(), num_layers),
    )
    found = _compare_architectures(model_a, model_b)
    found += _compare_infos(infos_a, infos_b, with_dtypes=mode in ("cover", "bitwise"))
    shared = [name for name, info in infos_a.items() if name in infos_b and infos_b[name].shape == info.shape]
    if mode == "logits":
        return _verify_logits(a, b, found, len(shared), num_layers, vocab_size)
    if mode == "cover":
        return VerifyReport(len(shared), 0, tuple(found), mode)
    total = sum(infos_a[name].size_bytes for name in shared)
    done = 0
    stats: list[TensorStats] = []
    for name in shared:
        found += _compare_tensor(view_a, view_b, name, stats if mode == "stats" else None)
        done += infos_a[name].size_bytes
        if progress is not None:
            progress(done, total)
    if mode == "bitwise":
        found += [*_damaged_files(opened_a), *_damaged_files(opened_b)]
    return VerifyReport(len(shared), total, tuple(found), mode, tuple(stats))


def _damaged_files(opened: Opened) -> list[Difference]:
    """Name files of weights that are no longer as written, which tells which side is damaged."""
    root = manifest_root(opened.directory, opened.root)
    if root is None:
        return []
    damaged = check_manifest(root, within=opened.directory)
    # Texts may be edited; that changes nothing that is compared here but the configuration, which was.
    return [Difference(str(root), text) for text in damaged if text.partition(": ")[0].endswith(_WEIGHTS)]


def _compare_tensor(
    one: Source, other: Source, name: str, stats: list[TensorStats] | None
) -> list[Difference]:
    """Compare the values of a tensor, where they are measured, or its bits."""
    measured = None if stats is None else measure(one, other, name)
    if measured is not None and stats is not None:
        stats.append(measured)
        return [Difference(name, _beyond(measured))] if measured.num_beyond else []
    if one.tensors()[name] != other.tensors()[name]:
        return []
    element = first_difference(one, name, other, name)
    return [] if element is None else [Difference(name, f"first differs at element {list(element)}")]


def _beyond(measured: TensorStats) -> str:
    return (
        f"{measured.num_beyond} elements are further apart than rounding explains: by up to"
        f" {measured.max_abs:.3g}, cosine {measured.cosine:.6f}"
    )


def _first_layers(infos: Mapping[str, TensorInfo], num_layers: int | None) -> dict[str, TensorInfo]:
    """Leave out the layers behind the first ones."""

    def is_kept(name: str) -> bool:
        layered = _TEXT_LAYER.search(name)
        return num_layers is None or layered is None or int(layered[1]) < num_layers

    return {name: info for name, info in infos.items() if is_kept(name)}


def _verify_logits(
    a: str | PathLike[str],
    b: str | PathLike[str],
    found: list[Difference],
    num_tensors: int,
    num_layers: int | None,
    vocab_size: int | None,
) -> VerifyReport:
    from flagscale_convert.logits import logits_difference

    if any("against" in difference.what and "configuration" not in difference.tensor for difference in found):
        return VerifyReport(num_tensors, 0, tuple(found), "logits")
    difference, largest = logits_difference(a, b, num_layers=num_layers, vocab_size=vocab_size)
    if not difference <= _LOGIT_TOLERANCE * largest:
        found.append(Difference("logits", f"differ by up to {difference:.3g}, the largest is {largest:.3g}"))
    return VerifyReport(num_tensors, 0, tuple(found), "logits", (), (difference, largest))


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


def _compare_infos(
    one: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo], *, with_dtypes: bool
) -> list[Difference]:
    found = [Difference(name, "only in the first") for name in one if name not in other]
    found += [Difference(name, "only in the second") for name in other if name not in one]
    for name, info in one.items():
        theirs = other.get(name, info)
        if theirs.shape != info.shape or (with_dtypes and theirs != info):
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
