"""How tensors of the two worlds correspond: declared once, read in both directions.

A rule names the Hugging Face tensors that make up one Megatron tensor and an operation that says which rows
of which part are which rows of the whole. An operation is only that list of row spans, so its inverse is the
same list read the other way, and no tensor is needed to plan with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from flagscale_convert.architecture import Architecture, Tower
from flagscale_convert.tensors import TensorInfo

__all__ = ["Binding", "Copy", "Gated", "Op", "Qkv", "Rule", "Span", "TowerQkv", "Vocab", "Zeros", "bind"]


@dataclass(frozen=True, slots=True)
class Span:
    """Rows that go together: `rows` of part number `part` from `part_row` are the whole's from `row`."""

    part: int
    part_row: int
    row: int
    rows: int


Size = Callable[[Architecture], int]
Columns = Callable[[Architecture], int | tuple[int, ...]]
Layers = Literal["all", "later", "dense", "experts", "mtp", "vision", "deepstack", "audio"]


@dataclass(frozen=True, slots=True)
class Op:
    """Which rows of the parts are which rows of the whole."""

    def part_rows(self, arch: Architecture) -> tuple[int, ...]:
        """Rows of each part."""
        raise NotImplementedError

    def whole_rows(self, arch: Architecture) -> int:
        """Rows of the whole; rows no span reaches are padding."""
        return sum(self.part_rows(arch))

    def spans(self, arch: Architecture) -> tuple[Span, ...]:
        """Parts one behind the other, unless an operation says otherwise."""
        spans, row = [], 0
        for part, rows in enumerate(self.part_rows(arch)):
            spans.append(Span(part, 0, row, rows))
            row += rows
        return tuple(spans)


@dataclass(frozen=True, slots=True)
class Copy(Op):
    """The tensor as it is."""

    rows: Size

    def part_rows(self, arch: Architecture) -> tuple[int, ...]:
        """One part."""
        return (self.rows(arch),)


@dataclass(frozen=True, slots=True)
class Zeros(Op):
    """A tensor that no output depends on: it has no parts, and may be absent where it is read."""

    rows: Size

    def part_rows(self, arch: Architecture) -> tuple[int, ...]:  # noqa: ARG002 - the same call as the others
        """No part."""
        return ()

    def whole_rows(self, arch: Architecture) -> int:
        """All of them padding."""
        return self.rows(arch)


@dataclass(frozen=True, slots=True)
class Gated(Op):
    """SwiGLU's first projection: all gate rows, then all up rows."""

    rows: Size

    def part_rows(self, arch: Architecture) -> tuple[int, ...]:
        """Gate and up."""
        return (self.rows(arch), self.rows(arch))


@dataclass(frozen=True, slots=True)
class Vocab(Op):
    """Rows per token; the whole is padded to Megatron's divisor."""

    def part_rows(self, arch: Architecture) -> tuple[int, ...]:
        """The true vocabulary."""
        return (arch.vocab_size,)

    def whole_rows(self, arch: Architecture) -> int:
        """The padded vocabulary."""
        return arch.padded_vocab_size


@dataclass(frozen=True, slots=True)
class Qkv(Op):
    """Megatron's fused projection: for each key/value head its query heads, its key, its value."""

    def part_rows(self, arch: Architecture) -> tuple[int, ...]:
        """Query, key and value."""
        return (arch.query_size, arch.kv_size, arch.kv_size)

    def spans(self, arch: Architecture) -> tuple[Span, ...]:
        """Interleave by key/value head."""
        head = arch.head_size
        queries = arch.num_heads // arch.num_kv_heads * head
        group = queries + 2 * head
        return tuple(
            span
            for index in range(arch.num_kv_heads)
            for span in (
                Span(0, index * queries, index * group, queries),
                Span(1, index * head, index * group + queries, head),
                Span(2, index * head, index * group + queries + head, head),
            )
        )


@dataclass(frozen=True, slots=True)
class TowerQkv(Op):
    """A tower's fused projection: for each head its query, its key, its value.

    On the other side they are three tensors, or one with all queries first.
    """

    tower: Callable[[Architecture], Tower | None]
    parts: Literal[1, 3]

    def part_rows(self, arch: Architecture) -> tuple[int, ...]:
        """Query, key and value, or all of them."""
        tower = self.tower(arch)
        return () if tower is None else (tower.hidden_size * 3 // self.parts,) * self.parts

    def spans(self, arch: Architecture) -> tuple[Span, ...]:
        """Interleave by head."""
        tower = self.tower(arch)
        if tower is None:
            return ()
        heads, size = tower.num_heads, tower.hidden_size // tower.num_heads
        return tuple(
            Span(
                kind if self.parts != 1 else 0,
                (head if self.parts != 1 else kind * heads + head) * size,
                (head * 3 + kind) * size,
                size,
            )
            for head in range(heads)
            for kind in range(3)
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """One correspondence; `{i}` in the names is the layer, `{e}` the expert.

    Layers that predict further tokens (`mtp`) follow the last one in Hugging Face's count; `{k}` counts them
    alone, from 0.
    """

    hf: tuple[str, ...]
    """The parts, in the operation's order."""
    megatron: str
    op: Op
    columns: Columns | None = None
    """Second axis of every part and of the whole, or all behind the first; None for vectors."""
    aliases: tuple[str, ...] = ()
    """Other names of the whole seen in checkpoints; read, never written."""
    twins: tuple[str, ...] = ()
    """Other names some layer flavour asks for; read, and written as a second name of the same bytes."""
    layers: Layers = "all"
    """In which layers it holds: of the language model (`all` leaves out `mtp`, `later` the first) or of a
    tower; `deepstack` are the mergers that take features from between a tower's layers."""
    when: Callable[[Architecture], bool] = lambda _arch: True
    is_copy: bool = False
    """True for a second Hugging Face name of what another rule maps: written, on reading only compared."""
    is_float32: bool = False
    """True for values that are float32 whatever the rest of the model is cast to."""
    shape: Callable[[Architecture], tuple[int, ...]] | None = None
    """Shape of the whole where it has its one part's elements in another shape; for small tensors only."""
    is_transposed: bool = False
    """True when the whole is its one part, a matrix, with its axes exchanged; for small tensors only."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A rule for one layer of one model, with every shape known."""

    hf: tuple[str, ...]
    megatron: str
    twins: tuple[str, ...]
    spans: tuple[Span, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    whole_shape: tuple[int, ...]
    is_copy: bool = False
    is_float32: bool = False
    is_reshaped: bool = False
    """True when part and whole have the same bytes in different shapes."""
    is_transposed: bool = False
    """True when part and whole are matrices with their axes exchanged."""

    @property
    def has_own_rows(self) -> bool:
        """True when the whole has rows that are no rows of a part."""
        return self.is_reshaped or self.is_transposed or not self.hf


def bind(
    rules: Iterable[Rule], arch: Architecture, present: Mapping[str, TensorInfo] | Sequence[str] = ()
) -> tuple[Binding, ...]:
    """Apply a family's rules to one model, in the order of the model: before, through and behind the layers.

    Args:
        rules: the family's table.
        arch: the model.
        present: names in the Megatron checkpoint to read, by which a rule chooses among its aliases.
    """
    applicable = [rule for rule in rules if rule.when(arch) and (rule.layers != "mtp" or arch.mtp_layers)]
    return tuple(
        _bind(rule, arch, present, layer, expert)
        for stack, together in groupby(applicable, _stack)
        for rules_of_stack in [tuple(together)]
        for layer in range(_depth(stack, arch))
        for rule in rules_of_stack
        if stack != "decoder" or _holds(rule, arch, layer)
        for expert in _experts(rule, arch)
    )


def _stack(rule: Rule) -> str:
    """Name the layers a rule is repeated over; empty when it holds once."""
    if not _is_layered(rule):
        return ""
    return rule.layers if rule.layers in ("vision", "deepstack", "audio") else "decoder"


def _depth(stack: str, arch: Architecture) -> int:
    if stack == "decoder":
        return arch.num_layers + arch.mtp_layers
    if stack == "audio":
        return 0 if arch.audio is None else arch.audio.depth
    if stack and arch.vision is None:
        return 0
    if stack == "deepstack" and arch.vision is not None:
        return len(arch.vision.fields["deepstack_visual_indexes"])
    return arch.vision.depth if stack and arch.vision is not None else 1


def _is_layered(rule: Rule) -> bool:
    return any("{i}" in name or "{k}" in name for name in (rule.megatron, *rule.hf))


def _holds(rule: Rule, arch: Architecture, layer: int) -> bool:
    if layer >= arch.num_layers or rule.layers == "mtp":
        return layer >= arch.num_layers and rule.layers == "mtp"
    if rule.layers in ("all", "later"):
        return rule.layers == "all" or layer > 0
    return (rule.layers == "experts") is arch.has_experts(layer)


def _experts(rule: Rule, arch: Architecture) -> range:
    is_per_expert = "{e}" in rule.megatron and arch.experts is not None
    return range(arch.experts.count if is_per_expert and arch.experts is not None else 1)


def _bind(
    rule: Rule,
    arch: Architecture,
    present: Mapping[str, TensorInfo] | Sequence[str],
    layer: int = 0,
    expert: int = 0,
) -> Binding:
    def named(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name.format(i=layer, k=layer - arch.num_layers, e=expert) for name in names)

    trailing = () if rule.columns is None else rule.columns(arch)
    columns = trailing if isinstance(trailing, tuple) else (trailing,)
    twins = named(rule.twins)
    names = (*named((rule.megatron, *rule.aliases)), *twins)
    whole = (rule.op.whole_rows(arch), *columns) if rule.shape is None else rule.shape(arch)
    return Binding(
        hf=named(rule.hf),
        megatron=next((name for name in names if name in present), names[0]),
        twins=twins,
        spans=rule.op.spans(arch),
        part_shapes=tuple((rows, *columns) for rows in rule.op.part_rows(arch)),
        whole_shape=whole[::-1] if rule.is_transposed else whole,
        is_copy=rule.is_copy,
        is_float32=rule.is_float32,
        is_reshaped=rule.shape is not None,
        is_transposed=rule.is_transposed,
    )
