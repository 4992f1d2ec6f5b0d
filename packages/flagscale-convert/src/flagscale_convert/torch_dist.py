"""Read Megatron's `torch_dist` checkpoints, tensor by tensor, without Megatron or torch.

Every dialect gives the same logical tensors, named per layer (`decoder.layers.3.mlp.linear_fc1.weight`) and
per expert (`decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight`) however they are stored: one stacked
tensor with leading layer and expert axes, or a tensor per layer; with or without a `model.` prefix; in any
grid of chunks that any tensor-, pipeline- or expert-parallel layout left.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_convert import torch_zip
from flagscale_convert.boxes import Box, read_box
from flagscale_convert.dcp_metadata import Chunk, DcpMetadata, Location, read_metadata
from flagscale_convert.errors import SourceDamaged
from flagscale_convert.megatron_source import CommonState, MegatronSource
from flagscale_convert.positioned import PositionedFiles
from flagscale_convert.tensors import DTYPES, TensorInfo

__all__ = ["COMMON_STATE", "TorchDistSource"]

COMMON_STATE = "common_state/shard_0_1"
_PREFIX = re.compile(
    r"^(?:model\.|module\.)+(?=decoder\.|embedding\.|output_layer\.|mtp\."
    r"|language_model\.|vision_model\.|vision_projection\.|audio_model\.|thinker\.|image_newline$)"
)
_STACKED = re.compile(r"^(?P<stack>(?:\w+\.)*decoder\.layers\.)(?!\d+\.)(?P<rest>.+)$")
_GROUPED = re.compile(r"^(?P<head>.+\.mlp\.experts\.experts\.)(?P<rest>linear_fc[12]\..+)$")
_OPTIMIZER = re.compile(r"^(?:optimizer\b|chained_\d+\.|opt_param_scheduler)")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a logical tensor is kept: the whole of a stored one, or one index of its leading axes."""

    name: str
    at: tuple[int, ...]
    """Index of the layer axis, of the expert axis, of both or of none."""


@dataclass
class _Located:
    """Payload positions already found; one archive is opened once."""

    payloads: dict[Location, torch_zip.Payload] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class TorchDistSource(MegatronSource):
    """One iteration directory of a `torch_dist` checkpoint as a source of logical tensors.

    Args:
        directory: holds `.metadata` and the `.distcp` files.

    Raises:
        SourceNotFound: no such checkpoint, or a data file is missing.
        SourceDamaged: half-written or truncated.
        UnsafePickle: a pickle in it names something no checkpoint needs.
    """

    format = "torch_dist"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata: DcpMetadata = read_metadata(directory / ".metadata")
        self.files = PositionedFiles(directory)
        self.optimizer_tensors = tuple(name for name in self.metadata.tensors if _OPTIMIZER.match(name))
        self.prefix = ""
        """What stood before every model tensor's name, such as `model.`."""
        self.is_stacked = False
        """True when layers share one tensor with a leading layer axis."""
        self._tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, _Stored] = {}
        self._chunks: dict[_Stored, list[Chunk]] = {}
        self._located = _Located()
        for name, info in self.metadata.tensors.items():
            if not _OPTIMIZER.match(name):
                self._add(name, info)
        self._check_files()
        self.common = self._read_common()

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state, which is not converted."""
        return sum(self.metadata.tensors[name].size_bytes for name in self.optimizer_tensors)

    @property
    def extra_states(self) -> tuple[str, ...]:
        """Names of the `_extra_state` objects."""
        return tuple(name for name in self.metadata.objects if "._extra_state" in name)

    @property
    def dialect(self) -> str:
        """`stacked` or `per-layer`, and a prefix if there is one."""
        stacked = "stacked" if self.is_stacked else "per-layer"
        return f"{stacked}, prefix `{self.prefix}`" if self.prefix else stacked

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every logical model tensor."""
        return self._tensors

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def _add(self, name: str, info: TensorInfo) -> None:
        prefix = _PREFIX.match(name)
        if prefix is not None:
            self.prefix = prefix.group()
        logical = name.removeprefix(self.prefix) if prefix is not None else name
        parts: list[tuple[str, tuple[int, ...]]] = [(logical, ())]
        stacked = _STACKED.match(logical)
        if stacked is not None and info.shape:
            self.is_stacked = True
            parts = [
                (f"{stacked['stack']}{layer}.{stacked['rest']}", (layer,)) for layer in range(info.shape[0])
            ]
        if _GROUPED.match(logical) and len(info.shape) > len(parts[0][1]):
            parts = [
                (_GROUPED.sub(rf"\g<head>{expert}.\g<rest>", part), (*at, expert))
                for part, at in parts
                for expert in range(info.shape[len(at)])
            ]
        for part, at in parts:
            self._tensors[part] = TensorInfo(info.dtype, info.shape[len(at) :])
            self._stored[part] = _Stored(name, at)
        for chunk in self.metadata.chunks[name]:
            axes = len(parts[0][1])
            spans = zip(chunk.offsets[:axes], chunk.sizes[:axes], info.shape, strict=False)
            ranges = (range(first, min(first + count, length)) for first, count, length in spans)
            for at in itertools.product(*ranges):
                self._chunks.setdefault(_Stored(name, at), []).append(chunk)

    def _locations(self) -> Iterator[tuple[str, Location]]:
        for name, chunks in self.metadata.chunks.items():
            for chunk in chunks:
                yield name, chunk.location
        yield from self.metadata.objects.items()

    def _check_files(self) -> None:
        """Refuse a directory whose files are missing or shorter than the metadata says."""
        ends: dict[str, tuple[int, str]] = {}
        for name, location in self._locations():
            end = location.offset + location.length
            if end > ends.get(location.file, (0, ""))[0]:
                ends[location.file] = (end, name)
        for file, (end, name) in sorted(ends.items()):
            size = self.files.size(file)
            if size < end:
                raise SourceDamaged(
                    f"{self.directory / file}: has {size} bytes, `{name}` ends at {end}: the file is"
                    " truncated:"
                    " copy the checkpoint again, or use an older iteration"
                )

    def _read_common(self) -> CommonState:
        """Read arguments and iteration, from the common-state object or from an older `common.pt`."""
        legacy = self.directory / "common.pt"
        if legacy.exists():
            with PositionedFiles(self.directory) as files:
                state = torch_zip.read_object(
                    files.descriptor(legacy.name), 0, files.size(legacy.name), where=str(legacy)
                )
        elif COMMON_STATE in self.metadata.objects:
            state = self.read_object(COMMON_STATE)
        else:
            state = {}
        if isinstance(state, list | tuple):
            state = state[0] if state else {}
        return CommonState.read(state)

    def read_object(self, name: str) -> Any:
        """Read a saved object as plain containers and inert records."""
        location = self.metadata.objects[name]
        return torch_zip.read_object(
            self.files.descriptor(location.file),
            location.offset,
            location.length,
            where=f"{self.directory / location.file}: {name}",
        )

    def gaps(self) -> tuple[str, ...]:
        """Name the logical tensors whose chunks do not tile their shape exactly once."""
        return tuple(name for name in self._tensors if not self._is_tiled(name))

    def _is_tiled(self, name: str) -> bool:
        stored = self._stored[name]
        axes = len(stored.at)
        boxes = [(chunk.offsets[axes:], chunk.sizes[axes:]) for chunk in self._chunks.get(stored, ())]
        volume = sum(math.prod(sizes) for _, sizes in boxes)
        return volume == self._tensors[name].num_elements and not _any_overlap(boxes)

    def is_same(self, one: str, other: str) -> bool:
        """Tell whether two logical tensors are two names of the same bytes."""
        first, second = self._stored[one], self._stored[other]
        return (
            first.at == second.at
            and self._tensors[one] == self._tensors[other]
            and self._chunks.get(first) == self._chunks.get(second)
        )

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows of a logical tensor from `start` on."""
        stored, info = self._stored[name], self._tensors[name]
        item_bytes = DTYPES[info.dtype]
        filled = 0
        axes = len(stored.at)
        for chunk in self._chunks.get(stored, ()):
            offsets, sizes = chunk.offsets[axes:] or (0,), chunk.sizes[axes:] or (1,)
            if offsets[0] >= start + len(out) or offsets[0] + sizes[0] <= start:
                continue
            skipped = 0  # what other layers and experts of the same chunk take before this one
            for axis, index in enumerate(stored.at):
                skipped += (index - chunk.offsets[axis]) * math.prod(chunk.sizes[axis + 1 :])
            box = Box(
                file=chunk.location.file,
                offset=self._payload(name, chunk).offset + skipped * item_bytes,
                first_row=offsets[0],
                num_rows=sizes[0],
                column_byte=(offsets[1] if len(offsets) > 1 else 0) * item_bytes,
                row_bytes=math.prod(sizes[1:]) * item_bytes,
            )
            filled += read_box(self.files, box, start, out, what=f"`{name}`")
        if filled != out.size:
            raise SourceDamaged(
                f"{self.directory}: `{name}`: chunks give {filled} of {out.size} bytes of rows {start} to"
                f" {start + len(out)}: the checkpoint has gaps or overlaps: use an older iteration"
            )

    def _payload(self, name: str, chunk: Chunk) -> torch_zip.Payload:
        location = chunk.location
        with self._located.lock:
            known = self._located.payloads.get(location)
        if known is None:
            stored = self.metadata.tensors[self._stored[name].name]
            known = torch_zip.find_tensor(
                self.files.descriptor(location.file),
                location.offset,
                location.length,
                TensorInfo(stored.dtype, chunk.sizes),
                where=f"{self.directory / location.file}: {name}",
            )
            with self._located.lock:
                self._located.payloads[location] = known
        return known


def _any_overlap(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Tell whether two boxes share an element."""
    return any(
        all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in zip(*one, *other, strict=True))
        for index, one in enumerate(boxes)
        for other in boxes[:index]
    )
