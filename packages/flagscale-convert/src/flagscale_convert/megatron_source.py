"""What every Megatron checkpoint is to the rest of this package, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_convert import unpickle
from flagscale_convert.tensors import TensorInfo

__all__ = ["CommonState", "MegatronSource"]


@dataclass(frozen=True, slots=True)
class CommonState:
    """What a checkpoint says about itself."""

    args: Mapping[str, Any]
    """Megatron's arguments of the run that saved it; values of other libraries' types are inert records."""
    iteration: int | None
    checkpoint_version: float | None

    @classmethod
    def read(cls, state: Any) -> CommonState:
        """Take it from an unpickled mapping; what is missing or of another type stays empty."""
        common = unpickle.as_mapping(state)
        iteration, version = common.get("iteration"), common.get("checkpoint_version")
        return cls(
            unpickle.as_mapping(common.get("args")),
            iteration if isinstance(iteration, int) else None,
            float(version) if isinstance(version, int | float) else None,
        )


class MegatronSource(ABC):
    """Logical tensors, named per layer and per expert, of one iteration directory."""

    directory: Path
    common: CommonState
    optimizer_tensors: tuple[str, ...]
    """Optimizer states, which are not converted."""
    format: str
    """`torch_dist` or `torch`."""

    @property
    @abstractmethod
    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state."""

    @property
    @abstractmethod
    def extra_states(self) -> tuple[str, ...]:
        """Names of the `_extra_state` objects."""

    @property
    @abstractmethod
    def dialect(self) -> str:
        """How tensors are stored, for people."""

    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every logical model tensor."""

    @abstractmethod
    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows of a logical tensor from `start` on."""

    @abstractmethod
    def gaps(self) -> tuple[str, ...]:
        """Name the logical tensors whose stored parts do not tile their shape exactly once."""

    @abstractmethod
    def is_same(self, one: str, other: str) -> bool:
        """Tell whether two logical tensors are two names of the same bytes."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""
