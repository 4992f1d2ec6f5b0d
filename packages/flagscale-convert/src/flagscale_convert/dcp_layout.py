"""The files of a `torch_dist` checkpoint as megatron-core 0.19 writes it, planned before any data is read.

Layers are stacked, one chunk per layer; names are those of Transformer Engine's layers, which the plain-torch
layers of uniform models share. Each module that has state of its own in some layer flavour gets its
`_extra_state` object: with Megatron's default strictness a missing one stops the load, a superfluous one is
ignored.
"""

from __future__ import annotations

import io
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from flagscale_convert.architecture import Architecture
from flagscale_convert.layout import FilePlan, Item
from flagscale_convert.tensors import TORCH_NAMES, TensorInfo
from flagscale_convert.torch_dist import COMMON_STATE
from flagscale_convert.torch_zip import TensorFrame

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
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    files = _data_files(entries, folder, shard_bytes, storage)
    files.append(_object_file(_objects(arch, args, entries), f"__0_{len(files)}.distcp", folder, storage))
    described: dict[str, Any] = {name: _describe(entry) for name, entry in entries.items()}
    described |= {index.fqn: dcp.BytesStorageMetadata() for index in storage if index.offset is None}
    metadata = dcp.Metadata(
        state_dict_metadata=described, planner_data=None, storage_data=storage, storage_meta=dcp.StorageMeta()
    )
    return tuple(files), {
        f"{folder}/.metadata": pickle.dumps(metadata),
        f"{folder}/metadata.json": METADATA_JSON,
    }


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


def _describe(entry: _Entry) -> dcp.TensorStorageMetadata:
    return dcp.TensorStorageMetadata(
        properties=dcp.TensorProperties(dtype=getattr(torch, TORCH_NAMES[entry.dtype])),
        size=torch.Size(entry.size),
        chunks=[
            dcp.ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
            for chunk in entry.chunks
        ],
    )


def _data_files(
    entries: Mapping[str, _Entry],
    folder: str,
    shard_bytes: int,
    storage: dict[dcp.MetadataIndex, _StorageInfo],
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
        storage[dcp.MetadataIndex(chunk.stored, torch.Size(chunk.offsets), index)] = _StorageInfo(
            f"__0_{len(files)}.distcp", position, total
        )
        items.append(Item(chunk.logical, position + frame.head_bytes, frame))
        position += total
    if items:
        finish()
    return files


def _object_file(
    objects: Mapping[str, bytes], name: str, folder: str, storage: dict[dcp.MetadataIndex, _StorageInfo]
) -> FilePlan:
    data = bytearray()
    for key, encoded in objects.items():
        storage[dcp.MetadataIndex(key)] = _StorageInfo(name, len(data), len(encoded))
        data += encoded
    return FilePlan(f"{folder}/{name}", len(data), bytes(data), ())


def _objects(arch: Architecture, args: Mapping[str, Any], entries: Mapping[str, _Entry]) -> dict[str, bytes]:
    empty = _saved([None])
    modules = (*_LINEAR_STATES, *_ENGINE_STATES, *(_QK_NORM_STATES if arch.has_qk_norm else ()))
    objects = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{arch.num_layers}": empty
        for layer in range(arch.num_layers)
        for module in modules
    }
    objects[_FINAL_NORM_STATE] = empty
    dtype = next(iter(entries.values())).dtype
    run = Namespace(
        **args,
        params_dtype=getattr(torch, TORCH_NAMES[dtype]),
        bf16=dtype == "BF16",
        fp16=dtype == "F16",
    )
    common = {
        "args": run,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
        },
    }
    return {**objects, COMMON_STATE: _saved([common])}


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Pickles as torch would pickle a contiguous CPU tensor whose bytes are in `data/0`."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    num_elements: int


class _TensorPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", getattr(torch, _STORAGES[obj.dtype]), "0", "cpu", obj.num_elements)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        info = TensorInfo(obj.dtype, obj.shape)
        strides, step = [], 1
        for size in reversed(obj.shape):
            strides.append(step)
            step *= size
        rebuild: Callable[..., Any] = _rebuild_tensor_v2
        storage = _Storage(obj.dtype, info.num_elements)
        return rebuild, (storage, 0, obj.shape, tuple(reversed(strides)), False, OrderedDict())


def _frame(chunk: _Chunk) -> TensorFrame:
    stream = io.BytesIO()
    # torch.load reads protocol 2, which is what torch.save writes.
    _TensorPickler(stream, protocol=2).dump(_Tensor(chunk.dtype, chunk.sizes))
    return TensorFrame(stream.getvalue(), TensorInfo(chunk.dtype, chunk.sizes).size_bytes)
