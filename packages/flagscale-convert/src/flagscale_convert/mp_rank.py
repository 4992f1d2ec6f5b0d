"""Read Megatron's per-rank checkpoints (`mp_rank_XX[_YYY[_ZZZ]]/model_optim_rng.pt`, format `torch`).

Each file holds the slices of one tensor-, pipeline- and expert-parallel rank, its layers and experts numbered
from its own first one. Here they become the same logical tensors that `torch_dist` checkpoints give. Where a
layer belongs is told by counting the layers of the stages before, so uneven stages and any pipeline layout
need no arguments to be understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_convert import torch_zip, unpickle
from flagscale_convert.boxes import Box, read_box
from flagscale_convert.errors import SourceDamaged, SourceNotFound, Unsupported
from flagscale_convert.megatron_source import CommonState, MegatronSource
from flagscale_convert.parallel import ParallelLayout, RankPlace
from flagscale_convert.positioned import PositionedFiles
from flagscale_convert.sharding import EXPERT, LAYER, TOWER, Cut, cut_of
from flagscale_convert.tensors import TensorInfo

__all__ = ["FILE_NAMES", "MpRankSource"]

FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt")
_FOLDER = re.compile(r"mp_rank_\d{2,}(?:_\d{3,})?(?:_\d{3,})?")
_CHUNK = re.compile(r"model(\d*)")
_PREFIX = re.compile(r"^(?:module\.)+")
_LEGACY = re.compile(
    r"^(?:language_model(?:$|\.encoder\.|\.embedding\.(?!word_embeddings\.weight$))|encoder\.)"
)
_SEQUENTIAL = re.compile(r"^(.+\.mlp\.experts\.)local_experts\.(\d+)\.(.+)$")
_GROUPED = re.compile(r"^(.+\.mlp\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d+)$")
_TRANSPOSED = re.compile(r"\.mlp\.experts\.weight[12]$")
_DISTRIBUTED_OPTIMIZER = "distrib_optim.pt"
_BUFFER_BYTES = 8 << 20
_DEPTH = 4
"""How far dictionaries within one another are followed: further than trainers nest them, not endlessly."""
_WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class _Slice:
    """What one file has of a logical tensor."""

    file: str
    offset: int
    info: TensorInfo


@dataclass(frozen=True)
class _Rank:
    """One file, opened."""

    place: RankPlace
    file: str
    saved: torch_zip.SavedObject
    chunks: tuple[Mapping[Any, Any], ...]
    """Live names to records, one mapping per virtual stage."""


class MpRankSource(MegatronSource):
    """One iteration directory of a per-rank checkpoint as a source of logical tensors.

    Args:
        directory: holds the `mp_rank_*` directories.

    Raises:
        SourceNotFound: there are none.
        SourceDamaged: a rank's file is missing or truncated, or slices do not fit each other.
        UnsafePickle: a pickle in it names something no checkpoint needs.
        Unsupported: an older form than megatron-core's, or a layout whose files overwrote each other.
    """

    format = "torch"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = PositionedFiles(directory)
        first = self._read(*self._first())
        self.common = CommonState.read(first)
        self.layout = ParallelLayout.from_args(self.common.args)
        self.optimizer_tensors: tuple[str, ...] = ()
        self._optimizer_bytes = 0
        self._extra_states: list[str] = []
        self._tensors: dict[str, TensorInfo] = {}
        self._boxes: dict[str, tuple[Box, ...]] = {}
        self._copies: dict[str, list[list[_Slice]]] = {}
        """By tensor, slices that should be alike."""
        ranks = self._open_ranks()
        self._add_all(ranks)
        self._count_optimizer(ranks)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the files of the distributed optimizer; states inside the ranks' files are not counted."""
        return self._optimizer_bytes

    @property
    def extra_states(self) -> tuple[str, ...]:
        """Names of the `_extra_state` objects."""
        return tuple(self._extra_states)

    @property
    def dialect(self) -> str:
        """The sizes by which the files are divided."""
        layout = self.layout
        sizes = [
            f"TP {layout.tensor_model_parallel_size}",
            f"PP {layout.pipeline_model_parallel_size}",
        ]
        if self.common.args.get("num_experts"):
            sizes += [f"EP {layout.expert_model_parallel_size}", f"ETP {layout.expert_tensor}"]
        if layout.virtual_pipeline_model_parallel_size:
            sizes.append(f"VPP {layout.virtual_pipeline_model_parallel_size}")
        return ", ".join(sizes)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every logical model tensor."""
        return self._tensors

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def gaps(self) -> tuple[str, ...]:
        """Nothing: slices that do not fit are refused on opening."""
        return ()

    def is_same(self, one: str, other: str) -> bool:
        """Tell whether two names are of the same bytes, which this format cannot express."""
        return one == other

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows of a logical tensor from `start` on."""
        for box in self._boxes[name]:
            read_box(self.files, box, start, out, what=f"`{name}`")

    def copies_that_differ(self) -> tuple[str, ...]:
        """Name the tensors that every rank should have alike, and that are not alike in all files."""
        return tuple(
            name
            for name, groups in self._copies.items()
            if not all(self._are_alike(name, group) for group in groups)
        )

    def _are_alike(self, name: str, group: list[_Slice]) -> bool:
        size = group[0].info.size_bytes
        for start in range(0, size, _BUFFER_BYTES):
            mine: np.ndarray = np.empty(min(_BUFFER_BYTES, size - start), np.uint8)
            theirs = np.empty_like(mine)
            self.files.read_into(group[0].file, group[0].offset + start, mine, what=f"`{name}`")
            for copy in group[1:]:
                self.files.read_into(copy.file, copy.offset + start, theirs, what=f"`{name}`")
                if not np.array_equal(mine, theirs):
                    return False
        return True

    def _first(self) -> tuple[str, str]:
        folders = sorted(
            path.name for path in self.directory.glob("mp_rank_*") if _FOLDER.fullmatch(path.name)
        )
        if not folders:
            raise SourceNotFound(f"{self.directory}: has no mp_rank_* directory: give an iteration directory")
        return folders[0], self._file_of(folders[0])

    def _file_of(self, folder: str) -> str:
        for name in FILE_NAMES:
            if (self.directory / folder / name).exists():
                return f"{folder}/{name}"
        raise SourceDamaged(
            f"{self.directory / folder}: has no {FILE_NAMES[0]}: a rank's file is missing: the save did not"
            " finish or the copy is not whole: copy it again, or use an older iteration"
        )

    def _read(self, _folder: str, file: str) -> Mapping[str, Any]:
        return unpickle.as_mapping(self._open(file).value)

    def _open(self, file: str) -> torch_zip.SavedObject:
        return torch_zip.open_object(
            self.files.descriptor(file), self.files.size(file), where=str(self.directory / file)
        )

    def _open_ranks(self) -> list[_Rank]:
        ranks = []
        for place in self.layout.places():
            file = self._file_of(self.layout.folder(place))
            saved = self._open(file)
            state = unpickle.as_mapping(saved.value)
            numbered = sorted(
                (int(match[1] or 0), key)
                for key in state
                if isinstance(key, str)
                if (match := _CHUNK.fullmatch(key))
            )
            if not numbered:
                raise SourceDamaged(
                    f"{self.directory / file}: holds no `model`: it is no rank's file of Megatron"
                )
            chunks = tuple(_flat(unpickle.as_mapping(state[key])) for _, key in numbered)
            ranks.append(_Rank(place, file, saved, chunks))
        counts = sorted({len(rank.chunks) for rank in ranks})
        if len(counts) > 1:
            raise SourceDamaged(
                f"{self.directory}: ranks have {counts} model chunks: they are of different runs"
            )
        return ranks

    def _add_all(self, ranks: list[_Rank]) -> None:
        firsts = self._first_layers(ranks)
        found: dict[str, dict[int, list[_Slice]]] = {}
        for chunk in range(len(ranks[0].chunks)):
            for rank in ranks:
                offset = firsts[rank.place.pipeline, chunk]
                for logical, record, live in self._named(rank, chunk, offset):
                    located = rank.saved.locate(record, live)
                    if located is None:
                        continue
                    info, payload = located
                    number = rank.place.expert_tensor if EXPERT.match(logical) else rank.place.tensor
                    slices = found.setdefault(logical, {}).setdefault(number, [])
                    slices.append(_Slice(rank.file, payload.offset, info))
        if not self.common.args.get("untie_embeddings_and_output_weights", True):
            _join_tied(found)
        shapes = {
            logical: next(iter(slices_of.values()))[0].info.shape for logical, slices_of in found.items()
        }
        for logical, slices_of in sorted(found.items(), key=lambda pair: _order(pair[0])):
            self._assemble(logical, slices_of, shapes)

    def _first_layers(self, ranks: list[_Rank]) -> dict[tuple[int, int], int]:
        """Give the number of the first layer of each stage and chunk."""
        counts: dict[tuple[int, int], int] = {}
        for rank in ranks:
            for chunk, state in enumerate(rank.chunks):
                layers = {
                    int(match["layer"])
                    for key in state
                    if isinstance(key, str)
                    if (match := LAYER.match(_PREFIX.sub("", key))) and not TOWER.match(key)
                }
                if layers != set(range(len(layers))):
                    raise SourceDamaged(
                        f"{self.directory / rank.file}: has layers {sorted(layers)}: some are missing"
                    )
                if counts.setdefault((rank.place.pipeline, chunk), len(layers)) != len(layers):
                    raise SourceDamaged(
                        f"{self.directory / rank.file}: has {len(layers)} layers, its peers others"
                    )
        firsts, layer = {}, 0
        for chunk in range(len(ranks[0].chunks)):
            for stage in range(self.layout.pipeline_model_parallel_size):
                firsts[stage, chunk] = layer
                layer += counts[stage, chunk]
        return firsts

    def _named(self, rank: _Rank, chunk: int, first_layer: int) -> Iterator[tuple[str, Any, str]]:
        """Give logical names, records and live names of a chunk."""
        for live, record in rank.chunks[chunk].items():
            if not isinstance(live, str):
                continue
            name = _PREFIX.sub("", live)
            if _LEGACY.match(name) or _TRANSPOSED.search(name):
                raise Unsupported(
                    f"{self.directory / rank.file}: `{live}`: only models of megatron-core whose experts are"
                    " separate or Transformer Engine's are read: load it with its own Megatron and save it as"
                    " torch_dist"
                )
            if name.endswith("_extra_state"):
                self._extra_states.append(name)
                continue
            layered = LAYER.match(name)
            if layered is not None and not TOWER.match(name):
                name = f"{layered['stack']}{first_layer + int(layered['layer'])}.{layered['rest']}"
            name = name.replace(".mtp_model_layer.", ".transformer_layer.")
            yield self._expert_name(name, rank.place.expert), record, live

    def _expert_name(self, name: str, expert_rank: int) -> str:
        sequential, grouped = _SEQUENTIAL.match(name), _GROUPED.match(name)
        if sequential is None and grouped is None:
            return name
        count = self.common.args.get("num_experts")
        if not isinstance(count, int) or count % self.layout.expert_model_parallel_size:
            raise SourceDamaged(
                f"{self.directory}: num_experts ({count}) does not divide among its expert ranks"
            )
        first = expert_rank * (count // self.layout.expert_model_parallel_size)
        if sequential is not None:
            return f"{sequential[1]}experts.{first + int(sequential[2])}.{sequential[3]}"
        assert grouped is not None  # noqa: S101 - one of the two matched
        return f"{grouped[1]}experts.{first + int(grouped[3])}.{grouped[2]}"

    def _assemble(
        self, logical: str, slices_of: Mapping[int, list[_Slice]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        is_expert = EXPERT.match(logical) is not None
        ranks = self.layout.expert_tensor if is_expert else self.layout.tensor_model_parallel_size
        missing = [str(number) for number in range(ranks) if number not in slices_of]
        if missing:
            raise SourceDamaged(
                f"{self.directory}: `{logical}`: its slices of ranks {', '.join(missing)} are in no file"
            )
        parts = [slices_of[number][0] for number in range(ranks)]
        if len({slice_.info for slices in slices_of.values() for slice_ in slices}) > 1:
            found = sorted({str(list(part.info.shape)) for slices in slices_of.values() for part in slices})
            raise SourceDamaged(f"{self.directory}: `{logical}`: slices differ ({', '.join(found)})")
        cut = cut_of(logical, self.common.args.get("transformer_impl"), shapes)
        part = parts[0].info
        axis = 1 if cut is Cut.COLUMNS else 0
        boxes: tuple[Box, ...]
        if cut is Cut.WHOLE or ranks == 1:
            whole, boxes = part, (_box(parts[0], 0, 0, 0, part.rows),)
            groups = [[slice_ for slices in slices_of.values() for slice_ in slices]]
        else:
            shape = list(part.shape)
            shape[axis] *= ranks
            whole = TensorInfo(part.dtype, tuple(shape))
            boxes = tuple(_boxes(parts, cut))
            groups = list(slices_of.values())
        self._tensors[logical], self._boxes[logical] = whole, boxes
        self._copies[logical] = [group for group in groups if len(group) > 1]

    def _count_optimizer(self, ranks: list[_Rank]) -> None:
        for path in sorted(self.directory.glob(f"mp_rank_*/{_DISTRIBUTED_OPTIMIZER}")):
            self._optimizer_bytes += path.stat().st_size
            self.optimizer_tensors = (*self.optimizer_tensors, str(path.relative_to(self.directory)))
        self.optimizer_tensors += tuple(
            f"{rank.file}: optimizer"
            for rank in ranks
            if "optimizer" in unpickle.as_mapping(rank.saved.value)
        )


def _flat(state: Mapping[Any, Any], depth: int = _DEPTH) -> dict[Any, Any]:
    """Join the keys of dictionaries within one another to names; states of other libraries stay whole."""
    flat: dict[Any, Any] = {}
    for key, value in state.items():
        is_held = isinstance(value, Mapping) or (isinstance(value, unpickle.Record) and bool(value.items))
        if not depth or not isinstance(key, str) or not is_held or key.endswith("_extra_state"):
            flat[key] = value
            continue
        flat |= {
            f"{key}.{inner}": item for inner, item in _flat(unpickle.as_mapping(value), depth - 1).items()
        }
    return flat


def _join_tied(found: dict[str, dict[int, list[_Slice]]]) -> None:
    """Take the copy of the embedding that the last stage keeps, and trains along, for the embedding."""
    for embedding in [name for name in found if name.endswith(_WORD_EMBEDDINGS)]:
        output = embedding.replace(_WORD_EMBEDDINGS, "output_layer.weight")
        for number, slices in found.pop(output, {}).items():
            found[embedding].setdefault(number, []).extend(slices)


def _order(logical: str) -> tuple[int, str, int, str]:
    """Sort in the order of the model."""
    layered = LAYER.match(logical)
    if layered is not None:
        return 1, layered["stack"], int(layered["layer"]), layered["rest"]
    return (0 if "embedding." in logical else 2), "", 0, logical


def _box(part: _Slice, skip_rows: int, first_row: int, column: int, rows: int) -> Box:
    info = part.info
    return Box(part.file, part.offset + skip_rows * info.row_bytes, first_row, rows, column, info.row_bytes)


def _boxes(parts: list[_Slice], cut: Cut) -> Iterator[Box]:
    rows, half = parts[0].info.rows, parts[0].info.rows // 2
    for number, part in enumerate(parts):
        if cut is Cut.COLUMNS:
            yield _box(part, 0, 0, number * part.info.row_bytes, rows)
        elif cut is Cut.ROWS:
            yield _box(part, 0, number * rows, 0, rows)
        else:
            yield _box(part, 0, number * half, 0, half)
            yield _box(part, half, (len(parts) + number) * half, 0, half)
