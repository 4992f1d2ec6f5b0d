"""Look at a checkpoint: what it is, whether it is whole, what is suspicious."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_convert.architecture import Architecture
from flagscale_convert.cast import to_float
from flagscale_convert.errors import ConvertError
from flagscale_convert.locate import Opened, open_checkpoint
from flagscale_convert.manifest import check_manifest, manifest_root
from flagscale_convert.megatron_source import MegatronSource
from flagscale_convert.model import understand
from flagscale_convert.mp_rank import MpRankSource
from flagscale_convert.published import published_like
from flagscale_convert.tensors import Source, TensorInfo

__all__ = ["Inspection", "inspect"]

_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint is."""

    path: Path
    format: str
    """`hf`, `torch_dist` or `torch` (one file per rank)."""
    iteration: int | None
    dialect: str
    """How tensors are stored: `stacked` or `per-layer` and a prefix, `sharded` or `single file`."""
    family: str | None
    architecture: Mapping[str, Any]
    num_parameters: int
    num_tensors: int
    model_bytes: int
    dtypes: Mapping[str, int]
    """Tensors per dtype."""
    optimizer_tensors: int
    optimizer_bytes: int
    published: tuple[str, int] | None
    """Repository and parameter count of the published model of this shape, if there is one."""
    notes: tuple[str, ...]
    suspicions: tuple[str, ...]
    """Findings that deserve a look; empty for a healthy checkpoint."""

    def to_dict(self) -> dict[str, Any]:
        """Give the inspection as plain data."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def inspect(path: str | PathLike[str], *, values: bool = False, hashes: bool = False) -> Inspection:
    """Look at a checkpoint.

    Args:
        path: a model directory, an iteration directory or a training directory.
        values: read every weight as well and report NaN, infinity and tensors of zeros.
        hashes: read every file and compare it with the manifest beside the checkpoint; `values` does the same
            where there is a manifest, and sizes are always compared with it.

    Raises:
        SourceNotFound: no checkpoint there.
        SourceDamaged: half-written or truncated.
        UnsafePickle: a pickle in it names something no checkpoint needs.
    """
    opened = open_checkpoint(Path(path))
    source = opened.source
    infos = source.tensors()
    arch, architecture, parameters, notes, suspicions = _understand(opened, infos)
    if values:
        suspicions += _strange_values(source)
        if isinstance(source, MpRankSource):
            suspicions += [f"`{name}`: ranks have different copies" for name in source.copies_that_differ()]
    root = manifest_root(opened.directory, opened.root)
    if hashes:
        suspicions += check_manifest(root or opened.root)
    elif root is not None:
        # Of a training directory only the checkpoint itself: the tracker changes when training goes on.
        suspicions += check_manifest(root, within=opened.directory, with_hashes=values)
    published = None if arch is None else published_like(arch)
    if published is not None and published[1] != parameters:
        suspicions.append(
            f"{parameters:,} parameters: {published[0]}, of the same shape, has {published[1]:,}"
        )
    megatron = source if isinstance(source, MegatronSource) else None
    if megatron is not None:
        suspicions += _strange_states(megatron)
    return Inspection(
        path=opened.directory,
        format=opened.format,
        iteration=None if megatron is None else megatron.common.iteration,
        dialect=_dialect(opened),
        family=None if arch is None else arch.family,
        architecture=architecture,
        num_parameters=parameters,
        num_tensors=len(infos),
        model_bytes=sum(info.size_bytes for info in infos.values()),
        dtypes=dict(Counter(info.dtype for info in infos.values())),
        optimizer_tensors=0 if megatron is None else len(megatron.optimizer_tensors),
        optimizer_bytes=0 if megatron is None else megatron.optimizer_bytes,
        published=published,
        notes=(*opened.notes, *notes),
        suspicions=tuple(suspicions),
    )


def _understand(
    opened: Opened, infos: Mapping[str, TensorInfo]
) -> tuple[Architecture | None, dict[str, Any], int, tuple[str, ...], list[str]]:
    """Read the architecture; one that cannot be converted is itself a finding, not an error."""
    try:
        model = understand(opened)
    except ConvertError as error:
        return None, {}, sum(info.num_elements for info in infos.values()), (), [str(error)]
    arch = model.architecture
    described = {
        name: str(value) if name == "rope_scaling" and value is not None else value
        for name in arch.__slots__
        for value in (getattr(arch, name),)
        if name not in ("experts", "latent", "recurrence", "vision", "audio", "outer")
    }
    for kind, tower in (("vision", arch.vision), ("audio", arch.audio)):
        if tower is not None:
            described |= {f"{kind}_{name}": value for name, value in tower.fields.items()}
    described |= arch.outer
    if arch.latent is not None:
        described |= {f"latent_{name}": value for name, value in asdict(arch.latent).items()}
    if arch.recurrence is not None:
        described |= {f"recurrence_{name}": value for name, value in asdict(arch.recurrence).items()}
    if arch.experts is not None:
        described |= {f"expert_{name}": value for name, value in asdict(arch.experts).items()}
    return arch, described, model.num_parameters, model.notes, list(model.problems)


def _dialect(opened: Opened) -> str:
    source = opened.source
    if isinstance(source, MegatronSource):
        return source.dialect
    shards = len(list(opened.directory.glob("*.safetensors")))
    return "single file" if shards == 1 else f"{shards} shards"


def _strange_states(source: MegatronSource) -> list[str]:
    if source.extra_states or source.format != "torch_dist":
        return []
    return ["no `_extra_state` objects: Megatron's default strictness refuses to load this checkpoint"]


def _strange_values(source: Source) -> list[str]:
    findings = []
    for name, info in source.tensors().items():
        problem = _strange_tensor(source, name, info)
        if problem:
            findings.append(f"`{name}`: {problem}")
    return findings


def _strange_tensor(source: Source, name: str, info: TensorInfo) -> str:
    rows_at_once = max(1, _BUFFER_BYTES // max(1, info.row_bytes))
    is_zero = info.num_elements > 0
    for start in range(0, info.rows, rows_at_once):
        raw: np.ndarray = np.empty((min(rows_at_once, info.rows - start), info.row_bytes), np.uint8)
        source.read_rows(name, start, raw)
        if is_zero and raw.any():
            is_zero = False
        values = to_float(raw, info.dtype)
        if values is not None and not np.isfinite(values).all():
            return f"holds NaN or infinity in rows {start} to {start + len(raw)}"
    return "is all zeros" if is_zero else ""
