"""The files of a `torch_dist` checkpoint as megatron-core 0.19 writes it, planned before any data is read.

Layers are stacked, one chunk per layer, or a tensor each where they differ (or when asked for); the experts
of a layer share one tensor. Names are those of Transformer Engine's layers; where the plain-torch layers have
another, the metadata gives the same bytes both names. Each module that has state of its own in some layer
flavour gets its `_extra_state` object: with Megatron's default strictness a missing one stops the load, a
superfluous one is ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flagscale_convert.architecture import Architecture
from flagscale_convert.dcp_metadata import Location
from flagscale_convert.errors import Unsupported
from flagscale_convert.layout import FilePlan, Item
from flagscale_convert.pickling import Call, Global, New, Pairs, Persistent, dump
from flagscale_convert.sharding import LAYER
from flagscale_convert.tensors import TORCH_NAMES, TensorInfo
from flagscale_convert.torch_dist import COMMON_STATE
from flagscale_convert.torch_zip import TensorFrame, object_archive

__all__ = ["METADATA_JSON", "lay_out_torch_dist", "pickled_run", "pickled_tensor"]

METADATA_JSON = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
_LEGACY_METADATA_JSON = (
    b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1,'
    b' "common_backend": "torch", "common_backend_version": 1}'
)
_EXPERT = re.compile(r"^(.*mlp\.experts\.experts\.)(\d+)\.(.+)$")
_OWN_LAYER = re.compile(r"^(?:\w+\.)*(?:decoder|mtp)\.layers\.\d+\.(?:transformer_layer\.)?")
_STATELESS = re.compile(
    r"(?:^|\.)embedding\.|(?:^|\.)output_layer$|\.router$|^$"
    r"|^(?:thinker\.)?(?:vision_model(?:$|\.(?:conv1|patch_embed|pos_embed|position_embeddings))|audio_model\.)"
)
_STORAGES = {"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}
_EMPTY_STATE = object_archive(dump([None]))
_DCP = "torch.distributed.checkpoint.metadata"
_Storage = dict[tuple[str, tuple[int, ...] | None, int | None], Location]
"""Where each item lies: by name, offsets (none for objects) and number of the chunk."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One chunk to write: the logical tensor, and its place in the stored one."""

    logical: str
    stored: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str


@dataclass
class _Entry:
    """A stored tensor being collected."""

    size: tuple[int, ...]
    dtype: str
    twins: tuple[str, ...]
    """Other names for the same bytes."""
    chunks: list[_Chunk]


def lay_out_torch_dist(  # noqa: PLR0913 - one caller, most by keyword
    infos: Mapping[str, TensorInfo],
    arch: Architecture,
    args: Mapping[str, Any],
    *,
    twins: Mapping[str, tuple[str, ...]],
    is_stacked: bool,
    folder: str,
    shard_bytes: int,
    with_common_file: bool = False,
) -> tuple[tuple[FilePlan, ...], dict[str, bytes]]:
    """Lay out a checkpoint.

    Args:
        infos: logical Megatron tensors.
        arch: the model, for the objects every layer needs.
        args: saved as the run's arguments, dtype excepted.
        twins: further names of logical tensors.
        is_stacked: whether layers share one tensor; they must then be alike.
        folder: iteration directory in the destination.
        shard_bytes: a data file gets no further chunk beyond this.
        with_common_file: arguments in `common.pt`, as up to megatron-core 0.18, which newer ones read too.

    Returns:
        The data files, and the small ones by path.
    """
    naming = _Naming(arch, is_stacked, _depths(infos))
    entries = _entries(infos, naming, twins)
    storage: _Storage = {}
    files = _data_files(entries, folder, shard_bytes, storage)
    named = [*infos, *(twin for name in infos for twin in twins.get(name, ()))]
    objects = _extra_states(named, naming)
    common = _common_state(args, next(iter(entries.values())).dtype, is_stacked=is_stacked)
    if not with_common_file:
        objects[COMMON_STATE] = object_archive(dump([common]))
    files.append(_object_file(objects, f"__0_{len(files)}.distcp", folder, storage))
    described: dict[str, Any] = {
        name: _describe(entry) for stored, entry in entries.items() for name in (stored, *entry.twins)
    }
    described |= {name: New(Global(_DCP, "BytesStorageMetadata")) for name, at, _ in storage if at is None}
    metadata = {
        "state_dict_metadata": described,
        "planner_data": None,
        "storage_data": Pairs(tuple((_index(*key), _stored(location)) for key, location in storage.items())),
        "storage_meta": None,
        "version": "1.0.0",
    }
    return tuple(files), {
        **({f"{folder}/common.pt": object_archive(dump(common))} if with_common_file else {}),
        f"{folder}/.metadata": dump(New(Global(_DCP, "Metadata"), metadata)),
        f"{folder}/metadata.json": _LEGACY_METADATA_JSON if with_common_file else METADATA_JSON,
    }


def _size(size: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (size,))


def _index(name: str, offsets: tuple[int, ...] | None, number: int | None) -> New:
    at = None if offsets is None else _size(offsets)
    return New(Global(_DCP, "MetadataIndex"), {"fqn": name, "offset": at, "index": number})


def _stored(location: Location) -> New:
    state = {"relative_path": location.file, "offset": location.offset, "length": location.length}
    return New(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)


def _dtype(code: str) -> Global:
    return Global("torch", TORCH_NAMES[code])


@dataclass(frozen=True, slots=True)
class _Naming:
    """How logical tensors are stored."""

    arch: Architecture
    is_stacked: bool
    depths: Mapping[str, int]
    """Layers of each stack, by what stands before their numbers."""

    def place(self, logical: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Give the stored name, and index and length of each leading axis."""
        stored = logical
        at: tuple[int, ...] = ()
        lengths: tuple[int, ...] = ()
        layered = LAYER.match(logical)
        if self.is_stacked and layered is not None:
            stored = layered["stack"] + layered["rest"]
            at, lengths = (int(layered["layer"]),), (self.depths[layered["stack"]],)
        grouped = _EXPERT.match(stored)
        if grouped is not None and self.arch.experts is not None:
            stored = grouped[1] + grouped[3]
            at, lengths = (*at, int(grouped[2])), (*lengths, self.arch.experts.count)
        return stored, at, lengths


def _entries(
    infos: Mapping[str, TensorInfo], naming: _Naming, twins: Mapping[str, tuple[str, ...]]
) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for logical, info in infos.items():
        stored, at, lengths = naming.place(logical)
        if stored not in entries:
            others = tuple(naming.place(twin)[0] for twin in twins.get(logical, ()))
            entries[stored] = _Entry((*lengths, *info.shape), info.dtype, others, [])
        offsets = (*at, *(0 for _ in info.shape))
        sizes = (*(1 for _ in at), *info.shape)
        entries[stored].chunks.append(_Chunk(logical, stored, offsets, sizes, info.dtype))
    return entries


def _describe(entry: _Entry) -> New:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Call(Global(_DCP, "_MEM_FORMAT_ENCODING"), (0,))
    # The state of TensorProperties: dtype, layout, requires_grad, memory format, pin_memory.
    properties = (_dtype(entry.dtype), layout, False, memory, False)
    chunks = [
        New(
            Global(_DCP, "ChunkStorageMetadata"),
            {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)},
        )
        for chunk in entry.chunks
    ]
    return New(
        Global(_DCP, "TensorStorageMetadata"),
        {
            "properties": New(Global(_DCP, "TensorProperties"), properties),
            "size": _size(entry.size),
            "chunks": chunks,
        },
    )


def _data_files(
    entries: Mapping[str, _Entry],
    folder: str,
    shard_bytes: int,
    storage: _Storage,
) -> list[FilePlan]:
    files: list[FilePlan] = []
    items: list[Item] = []
    position = 0

    def finish() -> None:
        files.append(FilePlan(f"{folder}/__0_{len(files)}.distcp", position, b"", tuple(items)))

    # In the order of the layers, so that both sides are read and written from front to back.
    chunks = [(index, chunk) for entry in entries.values() for index, chunk in enumerate(entry.chunks)]
    chunks.sort(key=lambda pair: _layer(pair[1].logical))
    for index, chunk in chunks:
        frame = _frame(chunk)
        total = frame.total_bytes
        if items and position + total > shard_bytes:
            finish()
            items, position = [], 0
        location = Location(f"__0_{len(files)}.distcp", position, total)
        for name in (chunk.stored, *entries[chunk.stored].twins):
            storage[name, chunk.offsets, index] = location
        items.append(Item(chunk.logical, position + frame.head_bytes, frame))
        position += total
    if items:
        finish()
    return files


def _layer(logical: str) -> tuple[str, int]:
    """Tell the stack and the layer of a tensor; those outside the layers come first."""
    layered = LAYER.match(logical)
    return ("", -1) if layered is None else (layered["stack"], int(layered["layer"]))


def _depths(logical: Iterable[str]) -> dict[str, int]:
    """Count the layers of each stack."""
    depths: dict[str, int] = {}
    for name in logical:
        layered = LAYER.match(name)
        if layered is not None:
            stack = layered["stack"]
            depths[stack] = max(depths.get(stack, 0), int(layered["layer"]) + 1)
    return depths


def _object_file(objects: Mapping[str, bytes], name: str, folder: str, storage: _Storage) -> FilePlan:
    data = bytearray()
    written: dict[bytes, Location] = {}
    for key, encoded in objects.items():
        # Thousands of experts have the same empty state: it is written once.
        if encoded not in written:
            written[encoded] = Location(name, len(data), len(encoded))
            data += encoded
        storage[key, None, None] = written[encoded]
    return FilePlan(f"{folder}/{name}", len(data), bytes(data), ())


def _extra_states(logical: Iterable[str], naming: _Naming) -> dict[str, bytes]:
    """Write an empty state for every module that has one in some layer flavour.

    Those are the modules that hold a tensor, and the attention between them, which holds none.

    Args:
        logical: names of tensors, twins included.
        naming: how they are stored.
    """
    modules = dict.fromkeys(name.rpartition(".")[0] for name in logical)
    attention = [
        layer[0] + "self_attention.core_attention" for name in modules if (layer := _OWN_LAYER.match(name))
    ]
    states = {}
    for module in dict.fromkeys([*modules, *attention]):
        if _STATELESS.search(module):
            continue
        stored, at, lengths = naming.place(f"{module}._extra_state")
        index, size = ".".join(map(str, at)) or "0", ".".join(map(str, lengths)) or "1"
        states[f"{stored}/shard_{index}_{size}"] = _EMPTY_STATE
    return states


def pickled_run(args: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Describe a run that has not trained yet: its arguments, format version and iteration 0.

    Args:
        args: Megatron's arguments, dtype excepted.
        dtype: safetensors code of the weights.
    """
    run = {**args, "params_dtype": _dtype(dtype), "bf16": dtype == "BF16", "fp16": dtype == "F16"}
    return {
        "args": New(Global("argparse", "Namespace"), run),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }


def _common_state(args: Mapping[str, Any], dtype: str, *, is_stacked: bool) -> dict[str, Any]:
    return {
        **pickled_run(args, dtype),
        # Megatron builds its names by these; whatever its own arguments are, they then fit the file.
        "content_metadata": {
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
            **({} if is_stacked else {"non_homogeneous_layers": True}),
        },
    }


def _frame(chunk: _Chunk) -> TensorFrame:
    """Frame a chunk as `torch.save` would frame a contiguous CPU tensor."""
    return TensorFrame(
        dump(pickled_tensor(chunk.dtype, chunk.sizes)), TensorInfo(chunk.dtype, chunk.sizes).size_bytes
    )


def pickled_tensor(dtype: str, shape: tuple[int, ...], *, key: str = "0") -> Call:
    """Describe a contiguous CPU tensor as torch pickles it.

    Args:
        dtype: safetensors code.
        shape: its axes.
        key: names its bytes in the archive.
    """
    if dtype not in _STORAGES:
        raise Unsupported(f"dtype ({dtype}): Megatron checkpoints are written in {', '.join(_STORAGES)}")
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    storage = Persistent(("storage", Global("torch", _STORAGES[dtype]), key, "cpu", math.prod(shape)))
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        (storage, 0, shape, tuple(reversed(strides)), False, hooks),
    )
