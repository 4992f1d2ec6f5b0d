"""Low-rank adapters trained by flagscale-train: written for peft, or added to the model they adapt.

A checkpoint of adapters holds, for each layer `L` of Megatron that has one, `L.lora.A` [rank, input] and
`L.lora.B` [output, rank]; the layer's weight changes by alpha / rank * B A. Where a layer of Megatron is
several of Hugging Face's (query, key and value in one), all of these get the same A and their own rows of B,
which is exactly what was trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from flagscale_convert.cast import to_bfloat16, to_float
from flagscale_convert.errors import DestinationRefused, Unsupported
from flagscale_convert.execution import Progress, Report, convert
from flagscale_convert.locate import Opened, open_checkpoint
from flagscale_convert.megatron_source import MegatronSource
from flagscale_convert.model import Model, understand
from flagscale_convert.plan import make_plan
from flagscale_convert.rules import Binding
from flagscale_convert.staging import write_failure
from flagscale_convert.tensors import Source, TensorInfo

__all__ = ["ExportedAdapter", "export_adapter", "merge_adapter"]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""What peft puts before every name of the model's."""
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Its names of layers that all other models call otherwise, by which a training is told of them."""


@dataclass(frozen=True)
class ExportedAdapter:
    """An adapter that was just written for peft."""

    destination: Path
    base: Path
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    num_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return asdict(self) | {"destination": str(self.destination), "base": str(self.base)}


@dataclass(frozen=True)
class _Change:
    """The change of one tensor of Hugging Face's: scale * B A, all in float32."""

    A: np.ndarray
    """[rank, input]."""
    B: np.ndarray
    """[output, rank]."""


@dataclass(frozen=True)
class _Adapter:
    rank: int
    alpha: float
    dropout: float
    changes: Mapping[str, _Change]
    """By the name of the weight that changes."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def export_adapter(
    src: str | PathLike[str], dst: str | PathLike[str], *, base: str | PathLike[str], overwrite: bool = False
) -> ExportedAdapter:
    """Write trained adapters as peft reads them: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        src: training directory or iteration of flagscale-train with `peft_type: lora`.
        dst: directory to write.
        base: the Hugging Face model that was adapted.
        overwrite: replace an adapter that is there.

    Raises:
        SourceNotFound: no checkpoint there.
        SourceDamaged: a checkpoint is not whole.
        Unsupported: `src` holds no adapters, or they do not fit `base`.
        DestinationRefused: `dst` holds an adapter already, or is no directory.
        WriteFailed: `dst` could not be written.
    """
    adapter = _read(Path(src), _base_model(Path(base)))
    tensors = {}
    for name, change in adapter.changes.items():
        layer = _PREFIX + name.removesuffix(".weight")
        tensors[f"{layer}.lora_A.weight"] = change.A
        tensors[f"{layer}.lora_B.weight"] = change.B
    targets = tuple(sorted({name.split(".")[-2] for name in adapter.changes}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    _write(Path(dst), tensors, config, overwrite=overwrite)
    count = sum(tensor.size for tensor in tensors.values())
    return ExportedAdapter(Path(dst), Path(base), adapter.rank, adapter.alpha, targets, count)


def merge_adapter(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    *,
    base: str | PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the adapted model as a Hugging Face model of its own, in the dtype of `base`.

    The product is computed in float32, a few rows at a time. Arguments and errors are those of
    `export_adapter`; `progress` is told about bytes done.
    """
    plan = make_plan(base, dst, to="hf")
    if plan.model.is_megatron:
        raise _not_a_model(Path(base))
    adapter = _read(Path(src), plan.model)
    # Another conversion than that of the base alone: what one left half done the other must not finish.
    named = hashlib.sha256(plan.digest.encode())
    for change in adapter.changes.values():
        named.update(change.A.tobytes() + change.B.tobytes())
    merged = replace(plan, view=_Merged(plan.view, adapter), digest=named.hexdigest())
    return convert(merged, overwrite=overwrite, progress=progress)


def _base_model(base: Path) -> Model:
    model = understand(open_checkpoint(base))
    if model.is_megatron:
        raise _not_a_model(base)
    return model


def _not_a_model(base: Path) -> Unsupported:
    return Unsupported(f"{base}: is a Megatron checkpoint: give the Hugging Face model that was adapted")


def _read(src: Path, base: Model) -> _Adapter:
    opened = open_checkpoint(src)
    source = opened.source
    args = source.common.args if isinstance(source, MegatronSource) else {}
    if not isinstance(source, MegatronSource) or args.get("peft_type") != "lora":
        raise Unsupported(
            f"{src}: holds no adapters: give a checkpoint that flagscale-train saved with peft_type: lora; "
            "whole models are converted by `flagscale-convert run`"
        )
    asked = {str(name) for name in args.get("lora_target_modules") or ()}
    changes = dict(_changes(opened, source, base, asked))
    left = len(source.tensors()) // 2 - len({id(change.A) for change in changes.values()})
    if left or not changes:
        raise Unsupported(f"{src}: {left} of its adapters are on layers that the base model does not have")
    rank, alpha = int(args["lora_dim"]), float(args["lora_alpha"])
    return _Adapter(rank, alpha, float(args.get("lora_dropout") or 0.0), changes)


def _changes(
    opened: Opened, source: MegatronSource, base: Model, asked: set[str]
) -> Iterator[tuple[str, _Change]]:
    infos = source.tensors()
    for binding in base.bindings:
        layer = binding.megatron.removesuffix(".weight")
        if f"{layer}.lora.A" not in infos:
            continue
        low, high = _array(source, f"{layer}.lora.A"), _array(source, f"{layer}.lora.B")
        if (high.shape[0], low.shape[1]) != binding.whole_shape:
            raise Unsupported(
                f"{opened.directory}: the adapter of {layer} changes a weight of {high.shape[0]} x "
                f"{low.shape[1]}: the base model's is {' x '.join(map(str, binding.whole_shape))}: give the "
                "model that was adapted"
            )
        for part, name in enumerate(binding.hf):
            own = name.split(".")[-2]
            if asked & {layer.rpartition(".")[2], _MIXTRAL.get(own, own)}:
                yield name, _Change(low, _rows_of(binding, part, high))


def _array(source: MegatronSource, name: str) -> np.ndarray:
    info = source.tensors()[name]
    raw: np.ndarray = np.empty((info.shape[0], info.row_bytes), np.uint8)
    source.read_rows(name, 0, raw)
    values = to_float(raw, info.dtype)
    if values is None:
        raise Unsupported(f"`{name}`: dtype ({info.dtype}): a floating-point type is needed")
    return values.astype(np.float32).reshape(info.shape)


def _rows_of(binding: Binding, part: int, whole: np.ndarray) -> np.ndarray:
    rows: np.ndarray = np.empty((binding.part_shapes[part][0], whole.shape[1]), np.float32)
    for span in binding.spans:
        if span.part == part:
            rows[span.part_row : span.part_row + span.rows] = whole[span.row : span.row + span.rows]
    return rows


class _Merged:
    """A Hugging Face source with the changes added."""

    def __init__(self, source: Source, adapter: _Adapter) -> None:
        self._source, self._adapter = source, adapter

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor; they are the base's."""
        return self._source.tensors()

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows from `start` on."""
        change = self._adapter.changes.get(name)
        if change is None:
            self._source.read_rows(name, start, out)
            return
        raw: np.ndarray = np.empty(out.shape, np.uint8)
        self._source.read_rows(name, start, raw)
        dtype = self.tensors()[name].dtype
        values = to_float(raw, dtype)
        assert values is not None  # noqa: S101 - weights of layers that have adapters are floating-point
        added = self._adapter.scale * (change.B[start : start + len(out)] @ change.A)
        merged = values.astype(np.float32) + added
        narrowed = to_bfloat16(merged) if dtype == "BF16" else merged.astype(values.dtype)
        out[...] = np.ascontiguousarray(narrowed).view(np.uint8)


def _write(dst: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], *, overwrite: bool) -> None:
    if dst.exists() and not overwrite:
        raise DestinationRefused(
            f"{dst}: exists: give another directory, or --overwrite to replace the adapter"
        )
    if dst.exists() and (not dst.is_dir() or {path.name for path in dst.iterdir()} - {_WEIGHTS, _CONFIG}):
        raise DestinationRefused(f"{dst}: holds more than an adapter: give another directory")
    partial = dst.with_name(f"{dst.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / _WEIGHTS, {"format": "pt"})
        (partial / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(dst, ignore_errors=True)
        partial.rename(dst)
    except OSError as error:
        raise write_failure(dst, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
