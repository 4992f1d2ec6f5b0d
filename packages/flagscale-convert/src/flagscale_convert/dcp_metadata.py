"""The `.metadata` file of torch's distributed checkpoints as plain data, read without torch.

It is a pickle of `torch.distributed.checkpoint.metadata.Metadata`, sometimes with classes of Megatron's in
it; all of them become inert records (`unpickle.py`) and only the fields needed here are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale_convert import unpickle
from flagscale_convert.errors import SourceDamaged, SourceNotFound
from flagscale_convert.tensors import TensorInfo, dtype_from_torch

__all__ = ["Chunk", "DcpMetadata", "Location", "read_metadata"]


@dataclass(frozen=True, slots=True)
class Location:
    """Where one saved item lies."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and where its archive lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    location: Location


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """Every tensor and object of a checkpoint directory."""

    tensors: Mapping[str, TensorInfo]
    chunks: Mapping[str, tuple[Chunk, ...]]
    objects: Mapping[str, Location]


def read_metadata(path: Path) -> DcpMetadata:
    """Read a `.metadata` file.

    Raises:
        SourceNotFound: no such file.
        SourceDamaged: truncated, or a chunk that no file holds.
        UnsafePickle: it names something no checkpoint needs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceNotFound(
            f"{path}: cannot be read ({error.strerror}): a torch_dist checkpoint has one"
        ) from error
    root = unpickle.load(data, where=str(path))
    try:
        return _build(root, str(path))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SourceDamaged(
            f"{path}: is no metadata of torch.distributed.checkpoint ({type(error).__name__}: {error})"
        ) from error


def _build(root: Any, where: str) -> DcpMetadata:
    locations: dict[tuple[str, tuple[int, ...] | None], Location] = {}
    for index, info in root.field("storage_data").items():
        offset = index.field("offset")
        key = (str(index.field("fqn")), None if offset is None else _size(offset))
        locations[key] = Location(
            str(info.field("relative_path")), int(info.field("offset")), int(info.field("length"))
        )
    tensors: dict[str, TensorInfo] = {}
    chunks: dict[str, tuple[Chunk, ...]] = {}
    objects: dict[str, Location] = {}
    for name, entry in root.field("state_dict_metadata").items():
        if entry.path.endswith(".BytesStorageMetadata"):
            objects[name] = _located(locations, name, None, where)
            continue
        tensors[name] = TensorInfo(
            _dtype(entry.field("properties"), f"{where}: {name}"), _size(entry.field("size"))
        )
        chunks[name] = tuple(
            Chunk(offsets, _size(chunk.field("sizes")), _located(locations, name, offsets, where))
            for chunk in entry.field("chunks")
            for offsets in (_size(chunk.field("offsets")),)
        )
    return DcpMetadata(tensors, chunks, objects)


def _located(
    locations: Mapping[tuple[str, tuple[int, ...] | None], Location],
    name: str,
    offsets: tuple[int, ...] | None,
    where: str,
) -> Location:
    found = locations.get((name, offsets))
    if found is None:
        at = "" if offsets is None else f" at {list(offsets)}"
        raise SourceDamaged(f"{where}: `{name}`{at} is listed, but no file holds it: the save did not finish")
    if ".." in Path(found.file).parts or Path(found.file).is_absolute():
        raise SourceDamaged(
            f"{where}: `{name}` lies in ({found.file}): only files of the directory itself are read"
        )
    return found


def _size(value: Any) -> tuple[int, ...]:
    """Read a pickled `torch.Size` (or tuple)."""
    items = value.args[0] if isinstance(value, unpickle.Record) else value
    return tuple(int(item) for item in items)


def _dtype(properties: Any, where: str) -> str:
    """Read the dtype of pickled `TensorProperties`, whose state is a tuple (or a dict in old versions)."""
    state = properties.state
    dtype = state["dtype"] if isinstance(state, dict) else state[0]
    # A dtype is pickled as a bare global, so what stands here is the stand-in class itself.
    path = dtype.path if hasattr(dtype, "path") else str(dtype)
    return dtype_from_torch(path.removeprefix("torch."), where=where)
