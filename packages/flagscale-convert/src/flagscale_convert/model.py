"""A checkpoint understood: its architecture, its rules applied, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flagscale_convert.architecture import Architecture
from flagscale_convert.arrange import compare_names
from flagscale_convert.cast import Cast
from flagscale_convert.errors import Unsupported
from flagscale_convert.families import FAMILIES, Family
from flagscale_convert.fp8 import Dequantised, read_block_size
from flagscale_convert.fused_experts import Divided, Transposed
from flagscale_convert.hf_config import read_config
from flagscale_convert.huggingface import CONFIG, HuggingFaceSource, read_json
from flagscale_convert.locate import Opened
from flagscale_convert.megatron_args import read_args
from flagscale_convert.megatron_source import MegatronSource
from flagscale_convert.rules import Binding, bind
from flagscale_convert.tensors import Source, TensorInfo, format_bytes
from flagscale_convert.tokenizer import find_tokenizer

__all__ = ["Model", "fused_parts", "require_fit", "understand"]

_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Model:
    """A checkpoint with its meaning."""

    architecture: Architecture
    family: Family
    bindings: tuple[Binding, ...]
    source: Source
    is_megatron: bool
    problems: tuple[str, ...]
    """Tensors that are missing, unknown or of the wrong shape."""
    notes: tuple[str, ...]
    skipped_tensors: int
    must_equal: tuple[tuple[str, str], ...]
    knows_vocabulary: bool
    """False when padding could not be told from the vocabulary, and all rows were taken for it."""
    tokenizer_places: tuple[Path, ...]
    """Where its tokenizer may lie, likeliest first."""

    def float32_names(self, *, is_megatron: bool) -> frozenset[str]:
        """Name the tensors that stay float32 whatever the model is cast to, by the names of one side."""
        return _pinned_names(self.bindings, is_megatron=is_megatron)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, tied ones and copies once, padding of the vocabulary not counted."""
        total = 0
        for binding in self.bindings:
            if binding.is_copy:
                continue
            for rows, *columns in binding.part_shapes:
                size = rows
                for column in columns:
                    size *= column
                total += size
        return total


def _pinned_names(bindings: Iterable[Binding], *, is_megatron: bool) -> frozenset[str]:
    return frozenset(
        name
        for binding in bindings
        if binding.is_float32
        for name in ((binding.megatron,) if is_megatron else binding.hf)
    )


def _with_float32(source: Source, names: frozenset[str]) -> Source:
    """Widen tensors that must be float32 and were stored narrower; nearly always there are none."""
    infos = source.tensors()
    return (
        Cast(source, None, names)
        if any(infos[name].dtype != "F32" for name in names & infos.keys())
        else source
    )


def understand(
    opened: Opened,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    vocab_divisor: int = 128,
    dtype: str = "BF16",
    family: str | None = None,
) -> Model:
    """Read the configuration of a checkpoint and compare its tensors with the family's rules.

    Args:
        opened: the checkpoint.
        tokenizer: directory given by the user.
        vocab_size: true vocabulary given by the user.
        vocab_divisor: what a Hugging Face vocabulary will be padded to a multiple of.
        dtype: what fp8 weights are read as, by its safetensors code.
        family: which family a Megatron checkpoint is of, where its arguments fit several.

    Raises:
        Unsupported: an architecture or value that cannot be converted.
    """
    if isinstance(opened.source, MegatronSource):
        return _understand_megatron(opened, opened.source, tokenizer, vocab_size, family)
    return _understand_huggingface(opened, opened.source, vocab_divisor, dtype)


def _understand_huggingface(
    opened: Opened, files: HuggingFaceSource, vocab_divisor: int, dtype: str
) -> Model:
    where = opened.directory / CONFIG
    config = read_json(where)
    read = read_config(config, where=str(where), vocab_divisor=vocab_divisor)
    notes = list(read.notes)
    files.rename(FAMILIES[read.architecture.family].prefixes)
    arch = _without_absent_mtp(read.architecture, files, notes)
    family = FAMILIES[arch.family]
    bindings = bind(family.rules, arch)
    source: Source = files
    if family.is_fused_in_files:
        source = _divided(files, arch, family)
    else:
        _divide_fused(files, arch, family, bindings)
    block = read_block_size(config, where=str(where))
    if block is not None:
        source = Dequantised(source, block, dtype, where=str(opened.directory))
        notes.append(f"quantization_config: fp8 weights are dequantised to {dtype}")
    source = _with_float32(source, _pinned_names(bindings, is_megatron=False))
    infos = source.tensors()
    layers = range(arch.num_layers + arch.mtp_layers)
    dropped = {name.format(i=layer) for name in family.dropped for layer in layers} & set(infos)
    if dropped:
        notes.append(
            f"{len(dropped)} tensors of rotary frequencies left out: they follow from the configuration"
        )
    unused = set(family.unused) & set(infos)
    if unused:
        dropped |= unused
        notes.append(f"{', '.join(sorted(unused))}: left out: no output depends on them")
    beyond = {name for name in infos if name.startswith(family.beyond)} if family.beyond else set()
    if beyond:
        dropped |= beyond
        parts = sorted({name.partition(".")[0] for name in beyond})
        size = format_bytes(sum(infos[name].size_bytes for name in beyond))
        notes.append(
            f"{', '.join(parts)}: {len(beyond)} tensors ({size}) left out: no part of {family.models}"
        )
    must_equal = _copies(bindings, infos)
    head, embedding = (_name_of(family, megatron) for megatron in (_HEAD, _EMBEDDING))
    if arch.is_tied and head in infos:
        dropped.add(head)
        must_equal += ((head, embedding),)
        notes.append(
            f"{head} left out: tie_word_embeddings is true, so it must equal {embedding} (will be checked)"
        )
    return Model(
        architecture=arch,
        family=family,
        bindings=bindings,
        source=source,
        is_megatron=False,
        problems=compare_names(infos, bindings, is_megatron=False, ignored=dropped).problems,
        notes=tuple(notes),
        skipped_tensors=0,
        must_equal=must_equal,
        knows_vocabulary=True,
        tokenizer_places=(opened.directory,),
    )


def _name_of(family: Family, megatron: str) -> str:
    """Give the Hugging Face name of one of the language model's own tensors."""
    return next(
        (rule.hf[0] for rule in family.rules if rule.megatron.endswith(megatron) and not rule.is_copy), ""
    )


def _without_absent_mtp(arch: Architecture, source: HuggingFaceSource, notes: list[str]) -> Architecture:
    """Take a model for one without further-token layers when its weights have none.

    transformers ignores these layers when it loads and saves a model, and keeps their number.
    """
    first = f"model.layers.{arch.num_layers}."
    if not arch.mtp_layers or any(name.startswith(first) for name in source.tensors()):
        return arch
    notes.append(
        f"num_nextn_predict_layers: {arch.mtp_layers}, but the weights hold no such layer: 0 assumed"
    )
    return replace(arch, mtp_layers=0)


def _copies(bindings: Sequence[Binding], infos: Mapping[str, TensorInfo]) -> tuple[tuple[str, str], ...]:
    """Pair every copy that is there with the tensor it must equal."""
    originals = {
        binding.megatron: binding.hf[0] for binding in bindings if binding.hf and not binding.is_copy
    }
    return tuple(
        (binding.hf[0], originals[binding.megatron])
        for binding in bindings
        if binding.is_copy and binding.hf[0] in infos
    )


def fused_parts(arch: Architecture, family: Family) -> dict[str, tuple[str, ...]]:
    """Name the parts of every tensor that is fused over the experts, expert by expert."""
    if arch.experts is None:
        return {}
    return {
        fused.name.format(i=layer): tuple(
            part.format(i=layer, e=expert) for expert in range(arch.experts.count) for part in fused.parts
        )
        for fused in family.fused
        for layer in range(arch.num_layers)
        if arch.has_experts(layer)
    }


def _divided(files: HuggingFaceSource, arch: Architecture, family: Family) -> Source:
    """Take fused tensors, in either order of their axes, as the matrices that the rules name."""
    parts = fused_parts(arch, family)
    infos = files.tensors()
    shapes = {
        name: shape
        for binding in bind(family.rules, arch)
        for name, shape in zip(binding.hf, binding.part_shapes, strict=True)
    }
    found, transposed = {}, set()
    for whole, names in parts.items():
        if whole not in infos or arch.experts is None:
            continue
        rows, columns = shapes[names[0]]
        plain = (arch.experts.count, len(names) // arch.experts.count * rows, columns)
        if infos[whole].shape == (plain[0], plain[2], plain[1]) != plain:
            transposed.add(whole)
        elif infos[whole].shape != plain:
            continue  # compared with the rules, it is named as unknown and its parts as missing
        found[whole] = names
    return Divided(Transposed(files, transposed), found)


def _divide_fused(
    source: HuggingFaceSource, arch: Architecture, family: Family, bindings: Sequence[Binding]
) -> None:
    """Take fused tensors, of all experts or not, as the parts that the rules name."""
    shapes = {
        name: shape
        for binding in bindings
        for name, shape in zip(binding.hf, binding.part_shapes, strict=True)
    }
    for fused in family.fused:
        for layer in range(arch.num_layers + arch.mtp_layers):
            whole = fused.name.format(i=layer)
            is_of_experts = arch.experts is None or arch.has_experts(layer)
            if whole not in source.tensors() or whole in shapes or not is_of_experts:
                continue
            is_per_expert = any("{e}" in part for part in fused.parts)
            count = arch.experts.count if is_per_expert and arch.experts is not None else 1
            parts = [part.format(i=layer, e=expert) for expert in range(count) for part in fused.parts]
            if parts[0] in shapes and not set(parts) & set(source.tensors()):
                source.divide(whole, parts, shape=shapes[parts[0]])


def _understand_megatron(
    opened: Opened, source: MegatronSource, tokenizer: Path | None, vocab_size: int | None, asked: str | None
) -> Model:
    saved = source.common.args
    named = saved.get("tokenizer_model")
    places = (opened.root / "tokenizer", *((Path(named),) if isinstance(named, str) and named else ()))
    notes: list[str] = []
    given = vocab_size
    if given is None and not saved.get("vocab_size"):
        found = find_tokenizer(tokenizer, places)
        if found is not None and found.num_tokens is not None:
            given = found.num_tokens
            notes.append(f"vocab_size: {given}, from the tokenizer in {found.directory}")
    read = read_args(
        saved, where=str(opened.directory), vocab_size=given, family=asked, tensors=source.tensors()
    )
    arch = read.architecture
    family = FAMILIES[arch.family]
    bindings = bind(family.rules, arch, source.tensors())
    infos = source.tensors()
    twins = {
        twin
        for binding in bindings
        for twin in binding.twins
        if twin in infos and binding.megatron in infos and source.is_same(binding.megatron, twin)
    }
    problems = list(compare_names(infos, bindings, is_megatron=True, ignored=twins).problems)
    problems += [f"`{name}`: its chunks do not tile its shape" for name in source.gaps()]
    if source.optimizer_tensors:
        notes.append(f"{len(source.optimizer_tensors)} optimizer tensors skipped: only weights are converted")
    return Model(
        architecture=arch,
        family=family,
        bindings=bindings,
        source=_with_float32(source, _pinned_names(bindings, is_megatron=True)),
        is_megatron=True,
        problems=tuple(problems),
        notes=(*notes, *read.notes),
        skipped_tensors=len(source.optimizer_tensors),
        must_equal=(),
        knows_vocabulary=read.knows_vocabulary,
        tokenizer_places=places,
    )


def require_fit(model: Model, where: Path) -> None:
    """Refuse a model whose tensors do not fit its configuration.

    Raises:
        Unsupported: with every problem, the first ones in full.
    """
    if not model.problems:
        return
    shown = model.problems[:10]
    more = len(model.problems) - len(shown)
    listed = "\n  ".join((*shown, *((f"and {more} more",) if more else ())))
    raise Unsupported(
        f"{where}: {len(model.problems)} tensors do not fit the {model.family.name} family:\n  {listed}\n"
        "nothing was written: check that configuration and weights belong together"
    )
