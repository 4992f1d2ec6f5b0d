"""A parallel layout: how many ranks of each kind, and which layers, experts and slices each of them holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flagscale_convert.architecture import Architecture
from flagscale_convert.errors import Unsupported

__all__ = ["ParallelLayout", "RankPlace"]


@dataclass(frozen=True, slots=True, order=True)
class RankPlace:
    """The coordinates by which a per-rank file is named, and the slice of each expert in it."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Sizes under Megatron's own names, all at least 1.

    Raises:
        Unsupported: a size below 1, or virtual stages without a pipeline.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """None: as the tensor-parallel size, as in Megatron."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage."""
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise Unsupported(f"{name} ({value}): must be at least 1")
        if (self.virtual_pipeline_model_parallel_size or 1) > 1 and self.pipeline_model_parallel_size == 1:
            raise Unsupported(
                f"virtual_pipeline_model_parallel_size ({self.virtual_pipeline_model_parallel_size}): needs a"
                " pipeline_model_parallel_size above 1"
            )

    @classmethod
    def from_args(cls, args: Any) -> ParallelLayout:
        """Read the sizes among a run's saved arguments; those absent or not positive are left at 1."""
        sizes = {name: args.get(name) for name in cls.__slots__}
        return cls(**{name: size for name, size in sizes.items() if isinstance(size, int) and size >= 1})

    def to_args(self) -> dict[str, Any]:
        """Give Megatron's arguments."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "expert_tensor_parallel_size": self.expert_tensor,
        }

    @property
    def expert_tensor(self) -> int:
        """Ranks that share one expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    def places(self) -> tuple[RankPlace, ...]:
        """Give every per-rank file.

        Files are named by tensor, pipeline and expert rank. Dense and expert ranks are two numberings of the
        same processes, so which slice of an expert a file holds follows from counting through both.

        Raises:
            Unsupported: two ranks that hold different slices would write the same file.
        """
        tensor, expert, expert_tensor = (
            self.tensor_model_parallel_size,
            self.expert_model_parallel_size,
            self.expert_tensor,
        )
        slices: dict[tuple[int, int], int] = {}
        for rank in range(math.lcm(tensor, expert * expert_tensor)):
            key = (rank % tensor, rank // expert_tensor % expert)
            if slices.setdefault(key, rank % expert_tensor) != rank % expert_tensor:
                raise Unsupported(
                    f"expert_tensor_parallel_size ({expert_tensor}) with tensor_model_parallel_size"
                    f" ({tensor}): the per-rank format names files by tensor and expert rank only,"
                    f" so slices of"
                    " experts would overwrite each other: use torch_dist, or a divisor of the"
                    " tensor-parallel size"
                )
        return tuple(
            RankPlace(key[0], stage, key[1], slices[key])
            for stage in range(self.pipeline_model_parallel_size)
            for key in sorted(slices)
        )

    def folder(self, place: RankPlace) -> str:
        """Name the directory of a rank."""
        name = f"mp_rank_{place.tensor:02d}"
        if self.pipeline_model_parallel_size > 1:
            name += f"_{place.pipeline:03d}"
        return f"{name}_{place.expert:03d}" if self.expert_model_parallel_size > 1 else name

    def stages(self, num_layers: int) -> tuple[tuple[range, ...], ...]:
        """Give the layers of every chunk of every stage, as Megatron divides them.

        Source: `get_num_layers_to_build` and `get_transformer_layer_offset` of megatron-core.

        Raises:
            Unsupported: the layers do not divide.
        """
        counts = self._layers_per_stage(num_layers)
        chunks = self.virtual_pipeline_model_parallel_size or 1
        for stage, count in enumerate(counts):
            if count % chunks:
                raise Unsupported(
                    f"virtual_pipeline_model_parallel_size ({chunks}): the {count} layers of stage {stage} do"
                    " not divide by it"
                )
        stages: list[list[range]] = [[] for _ in counts]
        layer = 0
        for _ in range(chunks):
            for stage, count in enumerate(counts):
                stages[stage].append(range(layer, layer + count // chunks))
                layer += count // chunks
        return tuple(map(tuple, stages))

    def _layers_per_stage(self, num_layers: int) -> list[int]:
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        size = self.pipeline_model_parallel_size
        if size == 1:
            return [num_layers]
        middle = size - (first is not None) - (last is not None)
        left = num_layers - (first or 0) - (last or 0)
        if left < 0 or (middle and left % middle) or (not middle and left):
            raise Unsupported(
                f"pipeline_model_parallel_size ({size}): {left} of {num_layers} layers do not divide by"
                f" {middle} stages: set num_layers_in_first_pipeline_stage or"
                f" num_layers_in_last_pipeline_stage"
            )
        counts = [left // middle if middle else 0] * size
        if first is not None:
            counts[0] = first
        if last is not None:
            counts[-1] = last
        return counts

    def check(self, arch: Architecture) -> None:
        """Refuse sizes this model cannot have.

        Raises:
            Unsupported: it names the size.
        """
        self.stages(arch.num_layers)
        size = self.expert_model_parallel_size
        if arch.experts is None and size > 1:
            raise Unsupported(f"expert_model_parallel_size ({size}): the model has no experts")
        if arch.experts is not None and arch.experts.count % size:
            raise Unsupported(
                f"expert_model_parallel_size ({size}): must divide the {arch.experts.count} experts"
            )
        tensor = self.tensor_model_parallel_size
        if arch.recurrence is not None and (tensor, self.pipeline_model_parallel_size) != (1, 1):
            raise Unsupported(
                f"tensor_model_parallel_size ({tensor}), pipeline_model_parallel_size"
                f" ({self.pipeline_model_parallel_size}): the class that trains {arch.family} has no parallel"
                " layers: both must be 1"
            )
        if arch.vision is not None and arch.vision.num_heads % tensor:
            raise Unsupported(
                f"tensor_model_parallel_size ({tensor}): must divide the {arch.vision.num_heads} attention"
                " heads of the vision tower"
            )
        if arch.num_heads % tensor:
            raise Unsupported(
                f"tensor_model_parallel_size ({tensor}): must divide the {arch.num_heads} attention heads"
            )
