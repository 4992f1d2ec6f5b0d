"""The files of a `torch_dist` checkpoint as megatron-core 0.19 writes it, planned before any data is read.

Layers are stacked, one chunk per layer; names are those of Transformer Engine's layers, which the plain-torch
layers of uniform models share. Each module that has state of its own in some layer flavour gets its
`_extra_state` object: with Megatron's default strictness a missing one stops the load, a superfluous one is
ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale_convert.architecture import Architecture
from flagscale_convert.dcp_metadata import Location
from flagscale_convert.layout import FilePlan, Item
from flagscale_convert.pickling import Call, Global, New, Pairs, Persistent, dump
from flagscale_convert.tensors import TORCH_NAMES, TensorInfo
from flagscale_convert.torch_dist import COMMON_STATE
from flagscale_convert.torch_zip import TensorFrame, object_archive

__all__ = ["METADATA_JSON", "lay_out_torch_dist"]

METADATA_JSON = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_LINEAR_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_ENGINE_STATES = ("self_attention.core_attention",)
_QK_NORM_STATES = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_FINAL_NORM_STATE = "decoder.final_layernorm._extra_state/shard_0_1"
_STORAGES = {"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}
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
    chunks: list[_Chunk]


def lay_out_torch_dist(
    infos: Mapping[str, TensorInfo],
    arch: Architecture,
    args: Mapping[str, Any],
    *,
    folder: str,
    shard_bytes: int,
) -> tuple[tuple[FilePlan, ...], dict[str, bytes]]:
    """Lay out a checkpoint.

    Args:
        infos: logical Megatron tensors.
        arch: the model, for the objects every layer needs.
        args: saved as the run's arguments, dtype excepted.
        folder: iteration directory in the destination.
        shard_bytes: a data file gets no further chunk beyond this.

    Returns:
        The data files, and `.metadata` and `metadata.json` by path.
    """
    entries = _entries(infos, arch.num_layers)
    storage: _Storage = {}
    files = _data_files(entries, folder, shard_bytes, storage)
    files.append(_object_file(_objects(arch, args, entries), f"__0_{len(files)}.distcp", folder, storage))
    described: dict[str, Any] = {name: _describe(entry) for name, entry in entries.items()}
    described |= {name: New(Global(_DCP, "BytesStorageMetadata")) for name, at, _ in storage if at is None}
    metadata = {
        "state_dict_metadata": described,
        "planner_data": None,
        "storage_data": Pairs(tuple((_index(*key), _stored(location)) for key, location in storage.items())),
        "storage_meta": None,
        "version": "1.0.0",
    }
    return tuple(files), {
        f"{folder}/.metadata": dump(New(Global(_DCP, "Metadata"), metadata)),
        f"{folder}/metadata.json": METADATA_JSON,
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


def _entries(infos: Mapping[str, TensorInfo], num_layers: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for logical, info in infos.items():
        layered = _LAYER.match(logical)
        if layered is None:
            chunk = _Chunk(logical, logical, (0,) * len(info.shape), info.shape, info.dtype)
            entries[logical] = _Entry(info.shape, info.dtype, [chunk])
            continue
        stored = f"decoder.layers.{layered[2]}"
        entry = entries.setdefault(stored, _Entry((num_layers, *info.shape), info.dtype, []))
        offsets = (int(layered[1]), *(0 for _ in info.shape))
        entry.chunks.append(_Chunk(logical, stored, offsets, (1, *info.shape), info.dtype))
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
    chunks.sort(key=lambda pair: pair[1].offsets[0] if _LAYER.match(pair[1].logical) else -1)
    for index, chunk in chunks:
        frame = _frame(chunk)
        total = frame.total_bytes
        if items and position + total > shard_bytes:
            finish()
            items, position = [], 0
        storage[chunk.stored, chunk.offsets, index] = Location(f"__0_{len(files)}.distcp", position, total)
        items.append(Item(chunk.logical, position + frame.head_bytes, frame))
        position += total
    if items:
        finish()
    return files


def _object_file(objects: Mapping[str, bytes], name: str, folder: str, storage: _Storage) -> FilePlan:
    data = bytearray()
    for key, encoded in objects.items():
        storage[key, None, None] = Location(name, len(data), len(encoded))
        data += encoded
    return FilePlan(f"{folder}/{name}", len(data), bytes(data), ())


def _objects(arch: Architecture, args: Mapping[str, Any], entries: Mapping[str, _Entry]) -> dict[str, bytes]:
    empty = object_archive(dump([None]))
    modules = (*_LINEAR_STATES, *_ENGINE_STATES, *(_QK_NORM_STATES if arch.has_qk_norm else ()))
    objects = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{arch.num_layers}": empty
        for layer in range(arch.num_layers)
        for module in modules
    }
    objects[_FINAL_NORM_STATE] = empty
    dtype = next(iter(entries.values())).dtype
    run = {**args, "params_dtype": _dtype(dtype), "bf16": dtype == "BF16", "fp16": dtype == "F16"}
    common = {
        "args": New(Global("argparse", "Namespace"), run),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
        },
    }
    return {**objects, COMMON_STATE: object_archive(dump([common]))}


def _frame(chunk: _Chunk) -> TensorFrame:
    """Frame a chunk as `torch.save` would frame a contiguous CPU tensor."""
    strides, step = [], 1
    for size in reversed(chunk.sizes):
        strides.append(step)
        step *= size
    storage = Persistent(
        ("storage", Global("torch", _STORAGES[chunk.dtype]), "0", "cpu", math.prod(chunk.sizes))
    )
    hooks = Call(Global("collections", "OrderedDict"), ())
    rebuilt = Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        (storage, 0, chunk.sizes, tuple(reversed(strides)), False, hooks),
    )
    return TensorFrame(dump(rebuilt), TensorInfo(chunk.dtype, chunk.sizes).size_bytes)
