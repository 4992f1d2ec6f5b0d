"""The plan of a conversion, made from headers and metadata only, before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from flagscale_convert.architecture import Architecture
from flagscale_convert.arrange import as_canonical, as_huggingface, as_megatron
from flagscale_convert.cast import Cast
from flagscale_convert.errors import Unsupported
from flagscale_convert.fp8 import Dequantised
from flagscale_convert.fused_experts import Joined, Transposed
from flagscale_convert.hf_config import write_config
from flagscale_convert.huggingface import CONFIG
from flagscale_convert.layout import FilePlan, lay_out_safetensors
from flagscale_convert.locate import TRACKER, open_checkpoint
from flagscale_convert.megatron_args import write_args
from flagscale_convert.megatron_source import MegatronSource
from flagscale_convert.model import Model, fused_parts, understand
from flagscale_convert.mp_rank_layout import Implementation
from flagscale_convert.parallel import ParallelLayout
from flagscale_convert.rules import Binding, bind
from flagscale_convert.tensors import Source
from flagscale_convert.tokenizer import Tokenizer, find_tokenizer

__all__ = ["DTYPE_CODES", "Format", "Layers", "MegatronVersion", "Plan", "make_plan"]

Format = Literal["hf", "torch_dist", "torch"]
Layers = Literal["auto", "stacked", "per-layer"]
MegatronVersion = Literal["0.16", "0.17", "0.18", "0.19"]
DTYPE_CODES: Mapping[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_RELEASE = "release"
_TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do."""

    source: Path
    """Directory the tensors are read from."""
    destination: Path
    to: Format
    architecture: Architecture
    files: tuple[FilePlan, ...]
    """Big files, in the order they are written."""
    texts: Mapping[str, bytes]
    """Small files by relative path; put in place after the big ones, in this order."""
    copies: Mapping[str, Path]
    """Files carried along as they are, by relative path."""
    notes: tuple[str, ...]
    """What was defaulted, passed over or left out."""
    problems: tuple[str, ...]
    """Why it cannot be run; empty when it can."""
    skipped_tensors: int
    """Optimizer states not converted."""
    must_equal: tuple[tuple[str, str], ...]
    """Pairs of source tensors of which one is dropped as the copy of the other; compared before writing."""
    is_copied: bool
    """True when every byte of the weights is written as it was read: no cast, no fp8."""
    digest: str
    """Names this conversion: same sources, same options, same layout."""
    model: Model = field(compare=False, repr=False)
    view: Source = field(compare=False, repr=False)
    """The source as the destination will have it."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files to write."""
        carried = sum(path.stat().st_size for path in self.copies.values())
        return self.file_bytes + sum(map(len, self.texts.values())) + carried

    @property
    def file_bytes(self) -> int:
        """Bytes of the big files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, tied ones once, padding of the vocabulary not counted."""
        return self.model.num_parameters

    def to_dict(self) -> dict[str, Any]:
        """Give the plan as plain data."""
        dtypes = Counter(info.dtype for info in self.view.tensors().values())
        return {
            "source": str(self.source),
            "destination": str(self.destination),
            "to": self.to,
            "family": self.architecture.family,
            "num_parameters": self.num_parameters,
            "num_tensors": len(self.view.tensors()),
            "dtypes": dict(dtypes),
            "total_bytes": self.total_bytes,
            "files": {file.path: file.size_bytes for file in self.files}
            | {path: len(data) for path, data in self.texts.items()}
            | {path: origin.stat().st_size for path, origin in self.copies.items()},
            "skipped_optimizer_tensors": self.skipped_tensors,
            "notes": list(self.notes),
            "problems": list(self.problems),
        }


def make_plan(  # noqa: PLR0913 - options of a public call, all by keyword
    src: str | PathLike[str],
    dst: str | PathLike[str],
    *,
    to: Format,
    tokenizer: str | PathLike[str] | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
    vocab_size: int | None = None,
    vocab_divisor: int | None = None,
    layers: Layers = "auto",
    parallel: ParallelLayout | None = None,
    transformer_impl: Implementation = "transformer_engine",
    moe_grouped_gemm: bool = False,
    megatron_version: MegatronVersion = "0.19",
    num_layers: int | None = None,
    family: str | None = None,
) -> Plan:
    """Plan a conversion.

    Args:
        src: a Hugging Face model directory, a Megatron iteration directory or a training directory.
        dst: directory to write; need not exist.
        to: `hf`, `torch_dist` or `torch` (one file per rank).
        tokenizer: directory whose tokenizer is carried along; else the one the checkpoint names, if there.
        dtype: `bf16`, `fp16` or `fp32`; None keeps what is stored.
        shard_bytes: largest size of a file, if no single tensor is larger.
        vocab_size: true vocabulary, when the checkpoint does not tell it or tells it wrong.
        vocab_divisor: Megatron pads the vocabulary to a multiple of this times the tensor-parallel size;
            None takes what the source's run was told, else 128.
        layers: how `torch_dist` stores layers: `stacked` in one tensor, `per-layer`, or `auto`: stacked if
            they are alike. Megatron asks for one tensor per layer when its `moe_layer_freq` is a list.
        parallel: sizes to write for. `torch` has a file for each rank of it; `torch_dist` loads under any
            sizes with the same padded vocabulary. None: no parallelism, and a Megatron source's padding is
            kept.
        transformer_impl: whose names `torch` has, as Megatron's option of that name.
        moe_grouped_gemm: whether `torch` has experts as Megatron's option of that name keeps them.
        megatron_version: which megatron-core will load it. Up to 0.18 `torch_dist` has its arguments in
            `common.pt`, which 0.19 reads too; 0.16 has another name for layers of further tokens in `torch`.
        num_layers: keep only so many of the first layers, for a smaller model of the same kind.
        family: which family a Megatron checkpoint is of, where its arguments fit several (see `FAMILIES`).

    Raises:
        SourceNotFound: no checkpoint there.
        SourceDamaged: half-written or truncated.
        Unsupported: a format, architecture or option that cannot be converted.
        UnsafePickle: a pickle in it names something no checkpoint needs.
    """
    for name, value, choices in (
        ("to", to, Format),
        ("layers", layers, Layers),
        ("transformer_impl", transformer_impl, Implementation),
        ("megatron_version", megatron_version, MegatronVersion),
    ):
        if value not in get_args(choices):
            raise Unsupported(f"{name} ({value}): one of {', '.join(get_args(choices))}")
    if dtype is not None and dtype not in DTYPE_CODES:
        raise Unsupported(f"dtype ({dtype}): one of {', '.join(DTYPE_CODES)}")
    opened = open_checkpoint(Path(src))
    asked = None if tokenizer is None else Path(tokenizer)
    sizes = parallel or ParallelLayout()
    divisor = vocab_divisor or _saved_divisor(opened.source)
    model = understand(
        opened,
        tokenizer=asked,
        vocab_size=vocab_size,
        vocab_divisor=divisor * sizes.tensor_model_parallel_size,
        dtype=DTYPE_CODES[dtype or "bf16"],
        family=family,
    )
    if num_layers is not None:
        model = _shallow(model, num_layers)
    arch = model.architecture
    if parallel is not None or to == "torch":
        arch = _padded(arch, divisor * sizes.tensor_model_parallel_size)
    # What is written has the names of one dialect, whatever those of the source are.
    written = bind(model.family.rules, arch)
    view = _view(model, written, to)
    if dtype is not None:
        view = Cast(view, DTYPE_CODES[dtype], model.float32_names(is_megatron=to != "hf"))
    destination = Path(dst)
    parts = _Parts(
        model=model,
        arch=arch,
        view=view,
        destination=destination,
        shard_bytes=shard_bytes,
        vocab_divisor=divisor,
        tokenizer=find_tokenizer(asked, model.tokenizer_places),
        is_stacked=_is_stacked(arch, layers),
        layout=sizes,
        implementation=transformer_impl,
        grouped_experts=moe_grouped_gemm,
        version=megatron_version,
    )
    makers = {"hf": parts.hf, "torch_dist": parts.torch_dist, "torch": parts.torch}
    files, texts, copies = ((), {}, {}) if model.problems else makers[to]()
    plan = Plan(
        source=opened.directory,
        destination=destination,
        to=to,
        architecture=model.architecture,
        files=files,
        texts=texts,
        copies=copies,
        notes=(*opened.notes, *model.notes, *parts.notes),
        problems=model.problems,
        skipped_tensors=model.skipped_tensors,
        must_equal=model.must_equal,
        is_copied=dtype is None and not isinstance(model.source, Cast | Dequantised),
        digest="",
        model=model,
        view=parts.view,
    )
    return replace(plan, digest=_digest(plan, parts))


def _saved_divisor(source: Any) -> int:
    """Tell what a run's vocabulary is padded to a multiple of; Megatron's default is 128."""
    saved = (
        source.common.args.get("make_vocab_size_divisible_by") if isinstance(source, MegatronSource) else None
    )
    return saved if isinstance(saved, int) and saved > 0 else 128


def _shallow(model: Model, num_layers: int) -> Model:
    """Cut a model to its first layers; layers that predict further tokens are behind the last and go too."""
    arch = model.architecture
    num_layers = max(1, min(num_layers, arch.num_layers))
    experts = arch.experts
    if experts is not None:
        dense = tuple(layer for layer in experts.dense_layers if layer < num_layers)
        experts = replace(experts, dense_layers=dense)
    arch = replace(arch, num_layers=num_layers, experts=experts, mtp_layers=0)
    present = model.source.tensors() if model.is_megatron else ()
    copies = {name for binding in model.bindings if binding.is_copy for name in binding.hf}
    return replace(
        model,
        architecture=arch,
        bindings=bind(model.family.rules, arch, present),
        must_equal=tuple(pair for pair in model.must_equal if pair[0] not in copies),
    )


def _padded(arch: Architecture, multiple: int) -> Architecture:
    return replace(arch, padded_vocab_size=-(-arch.vocab_size // multiple) * multiple)


def _view(model: Model, written: Sequence[Binding], to: Format) -> Source:
    """See the source as the destination will have it, dtype and ranks apart."""
    if to == "hf":
        return _as_files(
            as_huggingface(model.source, model.bindings) if model.is_megatron else _only_bound(model), model
        )
    if model.is_megatron:
        return as_canonical(model.source, model.bindings, written)
    return as_megatron(model.source, written)


def _is_stacked(arch: Architecture, layers: Layers) -> bool:
    if layers == "stacked" and not arch.is_uniform:
        raise Unsupported(
            "layers (stacked): some layers have experts and some do not, Megatron stores those one by one:"
            " use auto or per-layer"
        )
    return arch.is_uniform and layers != "per-layer"


def _only_bound(model: Model) -> Source:
    """Leave out of a Hugging Face source what carries nothing, by seeing it through the rules and back."""
    return as_huggingface(as_megatron(model.source, model.bindings), model.bindings)


def _as_files(view: Source, model: Model) -> Source:
    """Fuse experts where a family's files have them so."""
    experts = model.architecture.experts
    if not model.family.is_fused_in_files or experts is None:
        return view
    parts = fused_parts(model.architecture, model.family)
    return Transposed(Joined(view, parts, experts.count), parts.keys())


@dataclass(kw_only=True)
class _Parts:
    """What the layouts share."""

    model: Model
    arch: Architecture
    """The model as it is written: its vocabulary may be padded otherwise than the source's."""
    view: Source
    destination: Path
    shard_bytes: int
    vocab_divisor: int
    tokenizer: Tokenizer | None
    is_stacked: bool
    layout: ParallelLayout
    implementation: Implementation
    grouped_experts: bool
    version: MegatronVersion
    notes: list[str] = field(default_factory=list)

    def hf(self) -> tuple[tuple[FilePlan, ...], dict[str, bytes], dict[str, Path]]:
        """Lay out a model directory; the configuration comes last, without it nothing loads the directory."""
        infos = self.view.tensors()
        files, index = lay_out_safetensors(infos, shard_bytes=self.shard_bytes)
        copies = self._carried("")
        tokens = dict(self.tokenizer.ids) if self.tokenizer is not None else {}
        if self.tokenizer is None:
            self.notes.append(
                "tokenizer: none found, give one with --tokenizer DIR to make the model usable for text"
            )
        texts: dict[str, bytes] = {}
        if "generation_config.json" not in copies:
            texts["generation_config.json"] = _json({"_from_model_config": True, **tokens})
        dtype = Counter(info.dtype for info in infos.values()).most_common(1)[0][0]
        config = write_config(self.model.architecture, dtype=dtype, tokens=tokens)
        return files, {**texts, **index, CONFIG: _json(config)}, copies

    def torch_dist(self) -> tuple[tuple[FilePlan, ...], dict[str, bytes], dict[str, Path]]:
        """Lay out a training directory with one `release` checkpoint; the tracker comes last."""
        from flagscale_convert.dcp_layout import lay_out_torch_dist

        description = self.model.family.description
        if description is not None:
            raise Unsupported(
                f"to (torch_dist): {description.trainer} has no sharded form and cannot load it: use"
                " --to torch"
            )
        copies = self._carried(f"{_TOKENIZER_FOLDER}/")
        written = bind(self.model.family.rules, self.arch)
        twins = {binding.megatron: binding.twins for binding in written if binding.twins}
        files, texts = lay_out_torch_dist(
            self.view.tensors(),
            self.arch,
            self._args(copies),
            twins=twins,
            is_stacked=self.is_stacked,
            folder=_RELEASE,
            shard_bytes=self.shard_bytes,
            with_common_file=self.version != "0.19",
        )
        return files, {**texts, TRACKER: _RELEASE.encode()}, copies

    def torch(self) -> tuple[tuple[FilePlan, ...], dict[str, bytes], dict[str, Path]]:
        """Lay out a training directory with one `release` checkpoint of a file per rank."""
        from flagscale_convert.mp_rank_layout import lay_out_mp_rank

        copies = self._carried(f"{_TOKENIZER_FOLDER}/")
        args = {
            **self._args(copies),
            "ckpt_format": "torch",
            "moe_grouped_gemm": self.grouped_experts,
            "transformer_impl": self.implementation,
        }
        files, self.view = lay_out_mp_rank(
            self.view,
            self.arch,
            args,
            self.layout,
            implementation=self.implementation,
            grouped_experts=self.grouped_experts,
            folder=_RELEASE,
            is_legacy=self.version == "0.16",
            levels="" if self.model.family.description is None else self.model.family.description.levels,
        )
        return files, {TRACKER: _RELEASE.encode()}, copies

    def _args(self, copies: Mapping[str, Path]) -> dict[str, Any]:
        tokenizer = str((self.destination / _TOKENIZER_FOLDER).absolute()) if copies else None
        args = write_args(
            self.arch, tokenizer=tokenizer, vocab_divisor=self.vocab_divisor, is_stacked=self.is_stacked
        )
        return {**args, **self.layout.to_args()}

    def _carried(self, folder: str) -> dict[str, Path]:
        if self.tokenizer is None:
            return {}
        return {f"{folder}{name}": self.tokenizer.directory / name for name in self.tokenizer.files}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _digest(plan: Plan, parts: _Parts) -> str:
    """Name a conversion by its sources (names, sizes, times) and by the layout of what it writes."""
    sources = sorted(
        (str(path.relative_to(plan.source)), path.stat().st_size, path.stat().st_mtime_ns)
        for pattern in ("*", "mp_rank_*/*")
        for path in plan.source.glob(pattern)
        if path.is_file()
    )
    dtypes = sorted({info.dtype for info in plan.view.tensors().values()})
    layout = [(file.path, file.size_bytes) for file in plan.files]
    described = json.dumps([plan.to, str(plan.source.resolve()), sources, dtypes, layout, parts.is_stacked])
    written = hashlib.sha256()
    for data in (*(file.head for file in plan.files), *plan.texts.values()):
        written.update(data)
    described += written.hexdigest()
    return hashlib.sha256(described.encode()).hexdigest()
