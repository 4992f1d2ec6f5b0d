"""What a family brings along whose configuration has nothing in common with the others'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flagscale_convert.architecture import Architecture
from flagscale_convert.tensors import TensorInfo

__all__ = ["Description"]


class _ReadConfig(Protocol):
    def __call__(
        self, config: Mapping[str, Any], *, vocab_divisor: int, where: str, notes: list[str]
    ) -> Architecture: ...


class _ReadArgs(Protocol):
    def __call__(
        self,
        args: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        *,
        vocab_size: int,
        padded_vocab_size: int,
        where: str,
        notes: list[str],
    ) -> Architecture: ...


class _Write(Protocol):
    def __call__(self, arch: Architecture) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """How such a family's configuration is read and written, on both sides."""

    trainer: str
    """The class that trains it, for people."""
    mark: str
    """A tensor on the trainer's side by which a checkpoint of this family is told."""
    fields: frozenset[str]
    """Fields of `config.json` that `read_config` reads."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields with the only values under which the trainer's class computes the same."""
    harmless: frozenset[str] = frozenset()
    """Fields that change nothing."""
    read_config: _ReadConfig
    """Understands a `config.json`; notes gain what was defaulted. Raises `Unsupported`."""
    write_config: _Write
    """Gives the fields of `config.json` that define the model."""
    read_args: _ReadArgs
    """Understands saved arguments, and tensors for what they do not tell. Raises `Unsupported`."""
    write_args: _Write
    """Gives the arguments beyond those that every family has."""
    levels: str = ""
    """Pattern of the names in per-rank files. Its groups are keys of dictionaries within one another."""
