"""The files of a per-rank checkpoint (format `torch`), planned before any data is read.

Names are those the modules have in memory, which differ between Megatron's two layer implementations: with
Transformer Engine a norm is part of the projection behind it, without it stands alone; grouped experts keep
one numbered weight each in one module, others are modules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flagscale_convert.architecture import Architecture
from flagscale_convert.dcp_layout import pickled_run, pickled_tensor
from flagscale_convert.errors import Unsupported
from flagscale_convert.layout import FilePlan, Item
from flagscale_convert.parallel import ParallelLayout, RankPlace
from flagscale_convert.pickling import dump
from flagscale_convert.sharding import EXPERT, LAYER, TOWER, Cut, cut_of
from flagscale_convert.tensors import Source, TensorInfo
from flagscale_convert.torch_zip import ArchiveFrame

__all__ = ["Implementation", "Slices", "lay_out_mp_rank"]

Implementation = Literal["transformer_engine", "local"]
"""Megatron's `--transformer-impl`."""
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_EVERYWHERE = frozenset({"image_newline"})
"""What the model has on every stage, whatever else the stage has."""
_LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}
_STATEFUL = re.compile(r"^(.+\.(?:linear_\w+|eh_proj))\.weight\d*$")


@dataclass(frozen=True, slots=True)
class _Slice:
    """Rows of a logical tensor, in one or two runs, and a run of its columns."""

    logical: str
    runs: tuple[tuple[int, int], ...]
    """First row and number of rows."""
    column_byte: int
    info: TensorInfo


class Slices:
    """What each rank's file has of each tensor, as a source: names are `FOLDER:live name`."""

    def __init__(self, source: Source, slices: Mapping[str, _Slice]) -> None:
        self._source, self._slices = source, slices
        self._infos = {name: slice_.info for name, slice_ in slices.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every slice."""
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows of a slice from `start` on."""
        slice_ = self._slices[name]
        before = 0
        for first, count in slice_.runs:
            begin, end = max(start, before), min(start + len(out), before + count)
            if begin < end:
                part = out[begin - start : end - start]
                self._read(slice_, first + begin - before, part)
            before += count

    def _read(self, slice_: _Slice, row: int, out: np.ndarray) -> None:
        whole_bytes = self._source.tensors()[slice_.logical].row_bytes
        if whole_bytes == out.shape[1]:
            self._source.read_rows(slice_.logical, row, out)
            return
        # Whole rows are read for some columns of them: never more at once than the slice itself takes.
        at_once = max(1, out.size // whole_bytes)
        scratch: np.ndarray = np.empty((at_once, whole_bytes), np.uint8)
        for begin in range(0, len(out), at_once):
            part = out[begin : begin + at_once]
            rows = scratch[: len(part)]
            self._source.read_rows(slice_.logical, row + begin, rows)
            part[...] = rows[:, slice_.column_byte : slice_.column_byte + out.shape[1]]


def lay_out_mp_rank(  # noqa: PLR0913 - one caller, most by keyword
    source: Source,
    arch: Architecture,
    args: Mapping[str, Any],
    layout: ParallelLayout,
    *,
    implementation: Implementation,
    grouped_experts: bool,
    folder: str,
    is_legacy: bool = False,
    levels: str = "",
) -> tuple[tuple[FilePlan, ...], Slices]:
    """Lay out a checkpoint.

    Args:
        source: logical Megatron tensors under Transformer Engine's names.
        arch: the model.
        args: saved as the run's arguments, dtype excepted.
        layout: sizes.
        implementation: whose names are written.
        grouped_experts: experts numbered in one module, as `--moe-grouped-gemm` has them.
        folder: iteration directory in the destination.
        is_legacy: names of megatron-core 0.16; later ones call the layer that predicts a further token
            otherwise.
        levels: pattern of names whose groups are keys of dictionaries within one another; if
            empty, there is one dictionary.

    Returns:
        A file per rank, and the slices they are made of.

    Raises:
        Unsupported: the model does not divide so.
    """
    layout.check(arch)
    naming = _Live(arch, layout, implementation, grouped_experts, is_legacy)
    infos = source.tensors()
    shapes = {logical: info.shape for logical, info in infos.items()}
    slices: dict[str, _Slice] = {}
    files = []
    for place in layout.places():
        path = f"{folder}/{layout.folder(place)}/model_optim_rng.pt"
        chunks: list[dict[str, Any]] = []
        items: list[tuple[str, TensorInfo]] = []
        for chunk in range(layout.virtual_pipeline_model_parallel_size or 1):
            state: dict[str, Any] = {}
            for live, logical in naming.names(infos, place, chunk):
                slice_ = _slice(logical, shapes, infos[logical].dtype, layout, place, implementation)
                key = f"{path}:{chunk}:{live}"
                slices[key] = slice_
                state[live] = pickled_tensor(slice_.info.dtype, slice_.info.shape, key=str(len(items)))
                items.append((key, slice_.info))
                stateful = _STATEFUL.match(live)
                if implementation == "transformer_engine" and stateful is not None:
                    state[f"{stateful[1]}._extra_state"] = None
            chunks.append(_nested(state, levels) if levels else state)
        models = (
            {"model": chunks[0]}
            if len(chunks) == 1
            else {f"model{n}": state for n, state in enumerate(chunks)}
        )
        dtype = next(iter(infos.values())).dtype
        frame = ArchiveFrame(
            dump({**pickled_run(args, dtype), **models}), tuple(info.size_bytes for _, info in items)
        )
        files.append(_file(path, frame, [key for key, _ in items]))
    return tuple(files), Slices(source, slices)


def _nested(state: Mapping[str, Any], levels: str) -> dict[str, Any]:
    """Put tensors into dictionaries within one another."""
    nested: dict[str, Any] = {}
    for name, tensor in state.items():
        match = re.fullmatch(levels, name)
        *keys, last = [name] if match is None else [key for key in match.groups() if key is not None]
        inner = nested
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = tensor
    return nested


def _file(path: str, frame: ArchiveFrame, keys: list[str]) -> FilePlan:
    members = frame.members()
    items = tuple(Item(key, position, member) for key, (position, member) in zip(keys, members, strict=True))
    head = frame.head
    end = members[-1][0] + members[-1][1].size_bytes if members else len(head)
    return FilePlan(path, end + len(frame.tail([0] * len(members))), head, items, frame)


@dataclass(frozen=True, slots=True)
class _Live:
    """The names modules have in memory."""

    arch: Architecture
    layout: ParallelLayout
    implementation: Implementation
    grouped_experts: bool
    is_legacy: bool

    def names(
        self, infos: Mapping[str, TensorInfo], place: RankPlace, chunk: int
    ) -> Iterator[tuple[str, str]]:
        """Give live and logical name of every tensor of a chunk, in the order of the model."""
        stages = self.layout.stages(self.arch.num_layers)
        layers = stages[place.pipeline][chunk]
        is_first = place.pipeline == 0 and chunk == 0
        is_last = place.pipeline == len(stages) - 1 and chunk == len(stages[0]) - 1
        has_mtp = any(name.startswith("mtp.") for name in infos)
        for logical in infos:
            layered = LAYER.match(logical)
            if TOWER.match(logical) or logical in _EVERYWHERE:
                if is_first or logical in _EVERYWHERE:
                    yield self._live(logical), logical
            elif layered is not None:
                if int(layered["layer"]) in layers:
                    number = int(layered["layer"]) - layers.start
                    here = f"{layered['stack']}{number}.{self._live(layered['rest'])}"
                    yield from ((live, logical) for live in self._own_expert(here, place))
            elif logical.endswith(_EMBEDDING):
                yield from self._embedding(logical, is_first=is_first, is_last=is_last, has_mtp=has_mtp)
            elif is_last:
                yield from ((live, logical) for live in self._own_expert(self._live(logical), place))

    def _embedding(
        self, logical: str, *, is_first: bool, is_last: bool, has_mtp: bool
    ) -> Iterator[tuple[str, str]]:
        """Give the names a chunk has for the embedding; a tied output layer elsewhere is a copy of it."""
        if is_first or (is_last and has_mtp):
            yield logical, logical
        if is_last and not is_first and self.arch.is_tied:
            yield logical.replace(_EMBEDDING, _OUTPUT), logical

    def _live(self, rest: str) -> str:
        if not self.is_legacy:
            rest = rest.replace(".transformer_layer.", ".mtp_model_layer.")
        if self.implementation == "transformer_engine":
            return rest
        for fused, alone in _LOCAL_NAMES.items():
            if rest.endswith(fused) and ".experts." not in rest:
                return rest.removesuffix(fused) + alone
        return rest

    def _own_expert(self, name: str, place: RankPlace) -> tuple[str, ...]:
        """Give the name with the expert's local number; nothing when another rank has the expert."""
        match = EXPERT.match(name)
        if match is None or self.arch.experts is None:
            return (name,)
        count = self.arch.experts.count // self.layout.expert_model_parallel_size
        local = int(match["expert"]) - place.expert * count
        if not 0 <= local < count:
            return ()
        if self.grouped_experts:
            return (f"{match['head']}{match['rest']}{local}",)
        return (f"{match['head']}local_experts.{local}.{match['rest']}",)


def _slice(
    logical: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    layout: ParallelLayout,
    place: RankPlace,
    implementation: Implementation,
) -> _Slice:
    info = TensorInfo(dtype, shapes[logical])
    is_expert = EXPERT.match(logical) is not None
    ranks = layout.expert_tensor if is_expert else layout.tensor_model_parallel_size
    rank = place.expert_tensor if is_expert else place.tensor
    cut = cut_of(logical, implementation, shapes)
    if ranks == 1 or cut is Cut.WHOLE:
        return _Slice(logical, ((0, info.rows),), 0, info)
    axis, parts = (1, ranks) if cut is Cut.COLUMNS else (0, 2 * ranks if cut is Cut.HALVES else ranks)
    if info.shape[axis] % parts:
        size = "expert_tensor_parallel_size" if is_expert else "tensor_model_parallel_size"
        raise Unsupported(
            f"{size} ({ranks}): axis {axis} of `{logical}` {list(info.shape)} does not divide by it"
        )
    length = info.shape[axis] // ranks
    shape = tuple(length if number == axis else size for number, size in enumerate(info.shape))
    part = TensorInfo(info.dtype, shape)
    if cut is Cut.COLUMNS:
        return _Slice(logical, ((0, info.rows),), rank * part.row_bytes, part)
    if cut is Cut.ROWS:
        return _Slice(logical, ((rank * length, length),), 0, part)
    half = length // 2
    return _Slice(logical, ((rank * half, half), (info.rows // 2 + rank * half, half)), 0, part)
