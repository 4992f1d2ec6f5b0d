"""What every engine adapter takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from flagscale_hw import File
from flagscale_serve.service import Instance

__all__ = ["Context", "Engine", "Rendered"]


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where an instance will run."""

    python: str
    """Interpreter that has the engine; a bare name is looked up where the engine starts."""
    chip: str
    torch_device: str
    """`cpu`, `cuda`, ..."""
    num_threads: int
    """CPU threads this instance may keep busy."""
    kv_cache_bytes: int
    """Memory this instance may fill with keys and values when the chip is the CPU itself."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One instance, translated."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: tuple[File, ...] = ()
    warnings: tuple[str, ...] = ()
    served_names: tuple[str, ...]
    """The names that this engine really answers to; the first is shown."""


class Engine(Protocol):
    """One serving program."""

    @property
    def name(self) -> str:
        """What users write as `engine`."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Importable names that the engine's Python must have."""

    @property
    def distributions(self) -> tuple[str, ...]:
        """Distributions whose metadata the engine reads at start; the first is its own."""

    @property
    def install(self) -> str:
        """What a person types to get it."""

    @property
    def phases(self) -> tuple[tuple[str, str], ...]:
        """Part of a log line -> what the engine is doing from then on, in order."""

    @property
    def grace_s(self) -> float:
        """Seconds it needs to end by itself after SIGTERM."""

    def render(self, instance: Instance, context: Context) -> Rendered:
        """Translate one instance.

        Raises:
            InvalidService: it asks for what this engine cannot do.
        """
