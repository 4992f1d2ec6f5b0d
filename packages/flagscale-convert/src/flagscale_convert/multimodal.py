"""Towers of images and sound in `config.json` and in Megatron's arguments, both ways.

Megatron's command line has next to no options for towers: the scripts that train such models have their
numbers built in. So a tower's section of `config.json` goes along complete, in an argument of our own; where
a checkpoint does not have it, sizes are measured on its tensors and the rest is what is published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flagscale_convert.architecture import Architecture, Tower
from flagscale_convert.errors import Unsupported
from flagscale_convert.tensors import TensorInfo

__all__ = [
    "Multimodal",
    "Section",
    "Sections",
    "read_args_mrope",
    "read_args_sections",
    "read_config_mrope",
    "read_sections",
    "square_root",
    "write_args_sections",
    "write_config_mrope",
    "write_sections",
]

TOWERS = "flagscale_convert_towers"
"""Argument that carries the sections of `config.json` Megatron has no options for."""
_HARMLESS = frozenset(
    {
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "in_chans",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "rope_parameters",
        "spatial_patch_size",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)
"""Fields of a section that change nothing."""
_AXES = 3
_AXIAL_THETA = 10000
"""Base of the towers' rotary frequencies, built in on both sides."""

Measure = Callable[[Mapping[str, TensorInfo]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What a family's tower has in `config.json`."""

    model_type: str
    other_types: tuple[str, ...] = ()
    defaults: Mapping[str, Any]
    """Every field, with transformers' default."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields with the only values under which Megatron's tower computes the same."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Published values that are not transformers' defaults, for checkpoints that say nothing."""
    measure: Measure = lambda _infos: {}
    """Tells sizes from the shapes of Megatron's tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Multimodal:
    """What a family with towers has beyond its language model."""

    text_type: str
    """`model_type` of the language model's section."""
    vision: Section
    audio: Section | None = None
    outer: Mapping[str, Any]
    """Fields outside the sections, with transformers' defaults."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Outer fields with the only values under which Megatron computes the same."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the language model that published files leave out, with transformers' defaults."""
    mark: str
    """A Megatron tensor by which a checkpoint of this family is told from one of its language model."""
    within: str = ""
    """Section that holds the others in files of a larger model that this one is a part of."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """Outer fields as Megatron's classes compute, for checkpoints that say nothing."""
    published_mrope: tuple[int, ...] = ()
    """Sections of rotary frequencies in published models; empty where positions have one axis."""
    is_mrope_interleaved: bool = False
    options: Callable[[Architecture], dict[str, Any]] = lambda _arch: {}
    """Options of the scripts that train such models."""

    @property
    def has_mrope(self) -> bool:
        """Tell whether positions have three axes."""
        return bool(self.published_mrope)


@dataclass(frozen=True, slots=True)
class Sections:
    """A configuration taken apart."""

    text: Mapping[str, Any]
    """The language model's fields."""
    vision: Tower
    audio: Tower | None
    outer: Mapping[str, Any]
    is_tied: bool | None


def read_sections(config: Mapping[str, Any], family: Multimodal, *, where: str, notes: list[str]) -> Sections:
    """Take a `config.json` apart.

    Args:
        config: the parsed file.
        family: what its family has.
        where: names the file in messages.
        notes: gains what was defaulted or left out.

    Raises:
        Unsupported: a section is missing or of another type, or a field has a value that Megatron's tower has
            no equal for.
    """
    held = config
    if family.within in config:
        held = config[family.within]
        if not isinstance(held, Mapping):
            raise Unsupported(
                f"{where}: {family.within} ({held!r}): a section is needed: copy config.json again"
            )
        others = sorted(set(config) - {family.within, *_HARMLESS, "model_type"})
        notes.extend(f"{name}: not a part of {family.within}, left out" for name in others)
    sections = {"text_config", "vision_config", "audio_config"}
    known = {*sections, *family.outer, *_HARMLESS, "model_type", "initializer_range"}
    text = held.get("text_config")
    outer = {**family.outer, **{name: held[name] for name in family.outer if name in held}}
    _require(outer, family.only, where)
    if isinstance(text, Mapping):
        left_out = sorted(set(held) - known)
        notes.extend(f"{name}: unknown field, left out" for name in left_out if held[name] is not None)
    else:
        # Files of transformers up to 4.51 have the language model's fields at the top.
        text = {name: value for name, value in held.items() if name not in sections | set(family.outer)}
    absent = sorted(set(family.text) - set(text))
    if absent:
        notes.append(f"text_config: {', '.join(absent)}: absent, transformers' defaults assumed")
    tied = [
        part["tie_word_embeddings"] for part in (held, text) if part.get("tie_word_embeddings") is not None
    ]
    vision = _tower(held.get("vision_config"), family.vision, f"{where}: vision_config", notes)
    _check_features(outer, vision, where, notes)
    return Sections(
        {**family.text, **{name: value for name, value in text.items() if name != "model_type"}},
        vision,
        None
        if family.audio is None
        else _tower(held.get("audio_config"), family.audio, f"{where}: audio_config", notes),
        outer,
        any(tied) if tied else None,
    )


def _check_features(outer: Mapping[str, Any], tower: Tower, where: str, notes: list[str]) -> None:
    """Tell about features taken from between a tower's layers, which Megatron's towers do not have."""
    layer = outer.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise Unsupported(
            f"{where}: vision_feature_layer ({layer}): only one layer's features can be converted"
        )
    used = layer % (tower.depth + 1)
    if used != tower.depth:
        notes.append(
            f"vision_feature_layer ({layer}): Megatron's tower gives the features behind its last layer:"
            f" build it with {used} of its {tower.depth} layers to train the same function"
        )


def _require(given: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, allowed in only.items():
        if given[name] not in allowed:
            raise Unsupported(
                f"{where}: {name} ({given[name]}): only {' or '.join(map(str, allowed))} has an equal in"
                " Megatron's model: this one cannot be converted faithfully"
            )


def _tower(given: Any, section: Section, where: str, notes: list[str]) -> Tower:
    if not isinstance(given, Mapping):
        raise Unsupported(f"{where}: the section is missing: copy config.json again")
    kind = given.get("model_type", section.model_type)
    if kind not in (section.model_type, *section.other_types):
        raise Unsupported(f"{where}: model_type ({kind}): only {section.model_type} can be converted")
    _require({**section.defaults, **given}, section.only, where)
    rope = given.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_theta", _AXIAL_THETA) != _AXIAL_THETA:
        raise Unsupported(f"{where}: rope_theta ({rope['rope_theta']}): only {_AXIAL_THETA} can be converted")
    known = {*section.defaults, *_HARMLESS, "model_type"}
    notes.extend(
        f"{where.rpartition(': ')[2]} {name} ({given[name]}): unknown field, left out"
        for name in sorted(set(given) - known)
        if given[name] is not None
    )
    fields = {**section.defaults, **{name: given[name] for name in section.defaults if name in given}}
    tower = Tower(fields)
    _check(tower, where)
    return tower


def _check(tower: Tower, where: str) -> None:
    for name in ("depth", "hidden_size", "ffn_size", "num_heads"):
        value = getattr(tower, name)
        if value < 1:
            raise Unsupported(f"{where}: {name} ({value}): must be at least 1")
    if tower.hidden_size % tower.num_heads:
        raise Unsupported(f"{where}: heads ({tower.num_heads}): must divide the width ({tower.hidden_size})")


def write_sections(arch: Architecture, text: Mapping[str, Any], family: Multimodal) -> dict[str, Any]:
    """Put a `config.json` together, its class and general fields excepted.

    Args:
        arch: the model.
        text: the language model's fields.
        family: what its family has.
    """
    towers = {"vision_config": (arch.vision, family.vision), "audio_config": (arch.audio, family.audio)}
    return {
        **{name: value for name, value in arch.outer.items() if value is not None},
        "tie_word_embeddings": arch.is_tied,
        "text_config": {**text, "model_type": family.text_type},
        **{
            name: {**tower.fields, "model_type": section.model_type}
            for name, (tower, section) in towers.items()
            if tower is not None and section is not None
        },
    }


def write_args_sections(arch: Architecture, family: Multimodal | None) -> dict[str, Any]:
    """Write Megatron's arguments about towers, and the one that carries what it has none for."""
    if family is None or arch.vision is None:
        return {}
    carried = {
        "vision": _plain(arch.vision.fields),
        "audio": None if arch.audio is None else _plain(arch.audio.fields),
        "outer": _plain(arch.outer),
    }
    written = {TOWERS: carried, **family.options(arch)}
    if arch.mrope_section is None:
        return written
    return written | {
        "mrope_section": list(arch.mrope_section),
        "position_embedding_type": "mrope",
        "use_rotary_position_embeddings": False,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_args_sections(
    args: Mapping[str, Any],
    family: Multimodal,
    tensors: Mapping[str, TensorInfo],
    *,
    where: str,
    notes: list[str],
) -> tuple[Tower, Tower | None, Mapping[str, Any]]:
    """Read towers and outer fields: as carried, else as measured and as published.

    Raises:
        Unsupported: what is carried is no section, or sizes contradict each other.
    """
    carried = args.get(TOWERS)
    given = carried if isinstance(carried, Mapping) else {}
    towers = [
        None if section is None else _read_tower(given.get(name), section, tensors, f"{where}: {name}", notes)
        for name, section in (("vision", family.vision), ("audio", family.audio))
    ]
    outer = given.get("outer")
    if not isinstance(outer, Mapping):
        outer = {**family.outer, **family.trained}
    assert towers[0] is not None  # noqa: S101 - every family has a vision section
    return towers[0], towers[1], {name: outer.get(name, value) for name, value in family.outer.items()}


def _read_tower(
    given: Any, section: Section, tensors: Mapping[str, TensorInfo], where: str, notes: list[str]
) -> Tower:
    if isinstance(given, Mapping):
        return _tower(given, section, where, notes)
    measured = section.measure(tensors)
    notes.append(
        f"{where.rpartition(': ')[2]} tower: not among the arguments:"
        f" {', '.join(f'{name} {value}' for name, value in measured.items()) or 'nothing'} measured on its"
        " tensors, the rest taken as published"
    )
    tower = Tower({**section.defaults, **section.published, **measured})
    _check(tower, where)
    return tower


def read_config_mrope(
    config: Mapping[str, Any], family: Multimodal | None, head_size: int, *, where: str
) -> tuple[int, ...] | None:
    """Read which rotary frequencies turn with time, height and width; None for families without.

    Raises:
        Unsupported: no three counts that make up half a head, or frequencies interleaved otherwise than
            the family's.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    section = rope.get("mrope_section")
    if family is None or not family.has_mrope:
        if section is None:
            return None
        raise Unsupported(f"{where}: mrope_section ({section}): this family's positions have one axis")
    is_interleaved = bool(rope.get("mrope_interleaved", family.is_mrope_interleaved))
    if is_interleaved is not family.is_mrope_interleaved:
        raise Unsupported(f"{where}: mrope_interleaved ({is_interleaved}): this family has the opposite")
    return _checked_mrope(section, head_size, where)


def write_config_mrope(arch: Architecture, family: Multimodal) -> dict[str, Any]:
    """Write `rope_scaling` with the sections of frequencies; empty for families without."""
    if arch.mrope_section is None:
        return {}
    kind = {"mrope_interleaved": True} if family.is_mrope_interleaved else {"type": "mrope"}
    return {"rope_scaling": {**kind, "rope_type": "default", "mrope_section": list(arch.mrope_section)}}


def read_args_mrope(
    args: Mapping[str, Any], family: Multimodal | None, head_size: int, *, where: str, notes: list[str]
) -> tuple[int, ...] | None:
    """Read the same from saved arguments.

    Raises:
        Unsupported: there in a family that has not, or no three counts that make up half a head.
    """
    if family is None or not family.has_mrope:
        if args.get("position_embedding_type") == "mrope":
            raise Unsupported(
                f"{where}: position_embedding_type (mrope): positions of three axes come with a vision tower,"
                " and the checkpoint has none that is known: name its family with --family"
            )
        return None
    section = args.get("mrope_section")
    if section is None:
        # FlagScale's converters leave it out of the arguments they save.
        notes.append(f"mrope_section: not among the saved arguments, {family.published_mrope} assumed")
        section = family.published_mrope
    return _checked_mrope(section, head_size, where)


def _checked_mrope(section: Any, head_size: int, where: str) -> tuple[int, ...]:
    is_three = isinstance(section, list | tuple) and len(section) == _AXES
    if not is_three or not all(isinstance(count, int) for count in section):
        raise Unsupported(f"{where}: mrope_section ({section}): three counts are needed: time, height, width")
    if 2 * sum(section) != head_size:
        raise Unsupported(
            f"{where}: mrope_section ({', '.join(map(str, section))}): must make up half a head ({head_size})"
        )
    return tuple(section)


def square_root(whole: int, part: int) -> int:
    """Give the side of a square of so many parts."""
    return math.isqrt(max(1, whole // max(1, part)))
