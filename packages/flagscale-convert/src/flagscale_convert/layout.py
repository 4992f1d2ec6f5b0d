"""What the files of a destination will look like, to the byte, before the first one is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from flagscale_convert.huggingface import INDEX, SINGLE
from flagscale_convert.tensors import TensorInfo
from flagscale_convert.torch_zip import ArchiveFrame, MemberFrame, TensorFrame

__all__ = ["FilePlan", "Item", "lay_out_safetensors"]


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor in a file."""

    tensor: str
    offset: int
    """Where its data begins in the file."""
    frame: TensorFrame | MemberFrame | None = None
    """What stands around it in torch's archives; its head ends where the data begins."""


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One big file: what stands at its start, then tensors."""

    path: str
    """Relative to the destination."""
    size_bytes: int
    head: bytes
    items: tuple[Item, ...]
    archive: ArchiveFrame | None = None
    """Writes what stands at the end, once every tensor's checksum is known."""


def lay_out_safetensors(
    infos: Mapping[str, TensorInfo], *, shard_bytes: int
) -> tuple[tuple[FilePlan, ...], dict[str, bytes]]:
    """Lay out a model as safetensors shards in the order of the model.

    Args:
        infos: the tensors.
        shard_bytes: a shard gets no further tensor beyond this; a single larger tensor gets a shard of its
        own.

    Returns:
        The files, and the index (empty when one file holds everything).
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.size_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.size_bytes
    if len(shards) == 1:
        return (_safetensors(SINGLE, shards[0]),), {}
    files = tuple(
        _safetensors(f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    )
    index = {
        "metadata": {"total_size": sum(info.size_bytes for info in infos.values())},
        "weight_map": {item.tensor: file.path for file in files for item in file.items},
    }
    return files, {INDEX: json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"}


def _safetensors(path: str, infos: Mapping[str, TensorInfo]) -> FilePlan:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    places = []
    for name, info in infos.items():
        places.append((name, position))
        end = position + info.size_bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = len(encoded).to_bytes(8, "little") + encoded
    items = tuple(Item(name, len(head) + start) for name, start in places)
    return FilePlan(path, len(head) + position, head, items)
