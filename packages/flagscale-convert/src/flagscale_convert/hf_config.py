"""`config.json` of the families, both ways.

Every field is mapped, must have the one value under which the model is what Megatron computes, or is known to
change nothing; what is left is reported by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from flagscale_convert.architecture import Architecture, LatentAttention
from flagscale_convert.description import Description
from flagscale_convert.errors import Unsupported
from flagscale_convert.experts import CONFIG_FIELDS, read_config_experts, write_config_experts
from flagscale_convert.families import FAMILIES, Family
from flagscale_convert.latent import LATENT_FIELDS, read_config_latent, read_mtp_layers, write_config_latent
from flagscale_convert.multimodal import (
    Sections,
    read_config_mrope,
    read_sections,
    write_config_mrope,
    write_sections,
)
from flagscale_convert.rope import read_config_rope, write_config_rope
from flagscale_convert.tensors import TORCH_NAMES

__all__ = ["ReadConfig", "read_config", "write_config"]

_MAPPED = frozenset(
    {
        "architectures",
        "head_dim",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "auto_map",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "sliding_window_pattern": (None,),
    "use_sliding_window": (False, None),
    "router_jitter_noise": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleave": (True, None),
    "layer_types": (None,),
}
"""Fields with the only values under which Megatron's model computes the same."""
_HARMLESS = frozenset(
    {
        "_name_or_path",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "keys_to_ignore_at_inference",
        "max_window_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "sliding_window",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_OWN_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"mlp_bias": False},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "qwen3_moe": {"use_sliding_window": False},
    "mixtral": {"sliding_window": None},
}
"""Neutral fields that only some families have."""


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """A `config.json` understood."""

    architecture: Architecture
    notes: tuple[str, ...]
    """What was defaulted or left out, one sentence each."""


def read_config(config: Mapping[str, Any], *, where: str, vocab_divisor: int = 128) -> ReadConfig:
    """Understand a `config.json`.

    Args:
        config: the parsed file.
        where: names the file in messages.
        vocab_divisor: Megatron pads the vocabulary to a multiple of this.

    Raises:
        Unsupported: another architecture, or a field Megatron's dense model has no equal for.
    """
    family = _family(config, where)
    notes: list[str] = []
    if family.description is not None:
        return _read_described(config, family, family.description, where, vocab_divisor)
    sections = None
    if family.multimodal is not None:
        sections = read_sections(config, family.multimodal, where=where, notes=notes)
        config = sections.text
    _check_fields(config, family, where, notes)
    theta, scaling = read_config_rope(config, where=where, notes=notes)
    heads = _positive(config, "num_attention_heads", where)
    hidden = _positive(config, "hidden_size", where)
    kv_heads = _defaulted(config, "num_key_value_heads", heads, where, notes)
    if heads % kv_heads:
        raise Unsupported(
            f"{where}: num_key_value_heads ({kv_heads}): must divide num_attention_heads ({heads})"
        )
    latent = read_config_latent(config, family.base, where=where, notes=notes)
    head_size = _head_size(config, family, latent, where, notes)
    vocab = _positive(config, "vocab_size", where)
    is_tied = config.get("tie_word_embeddings") if sections is None else sections.is_tied
    if is_tied is None:
        notes.append("tie_word_embeddings: absent, false assumed")
    return ReadConfig(
        Architecture(
            family=family.name,
            num_layers=_positive(config, "num_hidden_layers", where),
            hidden_size=hidden,
            ffn_size=_positive(config, "intermediate_size", where),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            vocab_size=vocab,
            padded_vocab_size=-(-vocab // vocab_divisor) * vocab_divisor,
            norm_epsilon=_number(config, "rms_norm_eps", 1e-6, where, notes),
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=_positive(config, "max_position_embeddings", where),
            is_tied=bool(is_tied),
            has_qkv_bias=family.base == "qwen2",
            has_qk_norm=family.base in ("qwen3", "qwen3_moe"),
            init_std=_number(config, "initializer_range", 0.02, where, notes),
            experts=read_config_experts(config, family.base, where=where, notes=notes),
            latent=latent,
            mtp_layers=0 if latent is None else read_mtp_layers(config, where=where),
            mrope_section=read_config_mrope(config, family.multimodal, head_size, where=where),
            **_towers(sections),
        ),
        tuple(notes),
    )


def _read_described(
    config: Mapping[str, Any], family: Family, description: Description, where: str, vocab_divisor: int
) -> ReadConfig:
    """Understand the configuration of a family that has one of its own."""
    notes: list[str] = []
    _check_code(config, family, where, notes)
    _check_values(config, description.only, where, f"in {description.trainer}")
    general = {"architectures", "auto_map", "model_type"} | _HARMLESS
    _note_unknown(config, general | description.fields | set(description.only) | description.harmless, notes)
    arch = description.read_config(config, vocab_divisor=vocab_divisor, where=where, notes=notes)
    return ReadConfig(arch, tuple(notes))


def _towers(sections: Sections | None) -> dict[str, Any]:
    if sections is None:
        return {}
    return {"vision": sections.vision, "audio": sections.audio, "outer": sections.outer}


def _head_size(
    config: Mapping[str, Any], family: Family, latent: LatentAttention | None, where: str, notes: list[str]
) -> int:
    if latent is not None:
        return latent.plain_size + latent.rotary_size
    # Qwen3 has its own default for a missing head_dim, the other families divide.
    divided = _positive(config, "hidden_size", where) // _positive(config, "num_attention_heads", where)
    return _defaulted(config, "head_dim", 128 if family.base == "qwen3" else divided, where, notes)


def _family(config: Mapping[str, Any], where: str) -> Family:
    named = config.get("architectures") or []
    for family in FAMILIES.values():
        architectures = {family.architecture, *family.other_architectures}
        if architectures & set(named) or (not named and family.model_type == config.get("model_type")):
            return family
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise Unsupported(
        f"{where}: architectures ({named or config.get('model_type')}): can be converted are {known}"
    )


def _is_own_code(auto_map: Any, family: Family) -> bool:
    """Tell whether the code beside a model is what its family is known to come with."""
    names = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    return all(str(name).split(".")[0] in family.own_code for name in names)


def _check_code(config: Mapping[str, Any], family: Family, where: str, notes: list[str]) -> None:
    named = config.get("architectures") or []
    if set(named) & set(family.other_architectures):
        notes.append(f"architectures ({named}): taken for {family.architecture}, which has the same tensors")
    elif config.get("auto_map") is not None and not _is_own_code(config["auto_map"], family):
        raise Unsupported(
            f"{where}: auto_map ({config['auto_map']}): the model comes with code of its own, which may"
            f" compute something else than {family.architecture}: take auto_map out if it does not"
        )


def _check_fields(config: Mapping[str, Any], family: Family, where: str, notes: list[str]) -> None:
    _check_code(config, family, where, notes)
    window, length = config.get("sliding_window"), config.get("max_position_embeddings")
    if family.base == "mixtral" and window is not None and window < (length or 0):
        raise Unsupported(
            f"{where}: sliding_window ({window}): only none, or at least max_position_embeddings"
            f" ({length}), has an equal in Megatron's model"
        )
    _check_values(config, _ONLY, where, "in Megatron's dense model")
    own = CONFIG_FIELDS.get(family.base, frozenset()) | LATENT_FIELDS.get(family.base, frozenset())
    _note_unknown(config, _MAPPED | set(_ONLY) | _HARMLESS | own, notes)


def _check_values(
    config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], where: str, there: str
) -> None:
    for name, allowed in only.items():
        value = config.get(name)
        if name == "layer_types" and value and set(value) == {"full_attention"}:
            continue
        if name in config and value not in allowed:
            raise Unsupported(
                f"{where}: {name} ({value}): only {' or '.join(str(item) for item in allowed)} has an equal"
                f" {there}: this model cannot be converted faithfully"
            )


def _note_unknown(config: Mapping[str, Any], known: Set[str], notes: list[str]) -> None:
    unknown = sorted(set(config) - known)
    notes.extend(
        f"{name} ({config[name]}): unknown field, left out" for name in unknown if config[name] is not None
    )


def _positive(config: Mapping[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Unsupported(f"{where}: {name} ({value!r}): a positive integer is needed")
    return value


def _defaulted(config: Mapping[str, Any], name: str, default: int, where: str, notes: list[str]) -> int:
    if config.get(name) is None:
        notes.append(f"{name}: absent, {default} assumed")
        return default
    return _positive(config, name, where)


def _number(config: Mapping[str, Any], name: str, default: float, where: str, notes: list[str]) -> float:
    value = config.get(name)
    if value is None:
        notes.append(f"{name}: absent, {default} assumed")
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise Unsupported(f"{where}: {name} ({value!r}): a positive number is needed")
    return float(value)


def write_config(arch: Architecture, *, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Write a `config.json`.

    Args:
        arch: the model.
        dtype: safetensors code of most weights.
        tokens: `bos_token_id`, `eos_token_id`, `pad_token_id` as far as known.
    """
    family = FAMILIES[arch.family]
    if family.description is None:
        text = _write_text(arch, family, dtype, tokens)
    else:
        text = {**family.description.write_config(arch), "torch_dtype": TORCH_NAMES[dtype], **tokens}
    config = {**text, "architectures": [family.architecture], "model_type": family.model_type}
    return dict(sorted(config.items()))


def _write_text(arch: Architecture, family: Family, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": arch.head_size,
        "hidden_act": "silu",
        "hidden_size": arch.hidden_size,
        "initializer_range": arch.init_std,
        "intermediate_size": arch.ffn_size,
        "max_position_embeddings": arch.max_positions,
        "num_attention_heads": arch.num_heads,
        "num_hidden_layers": arch.num_layers,
        "num_key_value_heads": arch.num_kv_heads,
        "rms_norm_eps": arch.norm_epsilon,
        "tie_word_embeddings": arch.is_tied,
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
        "vocab_size": arch.vocab_size,
        **write_config_rope(arch),
        **_OWN_FIELDS.get(family.base, {}),
        **write_config_experts(arch, family.base),
        **write_config_latent(arch),
        **tokens,
    }
    if arch.latent is not None:
        del text["head_dim"]  # transformers takes it for the rotary part's
    if family.multimodal is not None:
        text |= write_config_mrope(arch, family.multimodal)
        # The class decides by its own types; what every family has stands outside as well, as published.
        text = {
            **write_sections(arch, dict(sorted(text.items())), family.multimodal),
            **tokens,
            "torch_dtype": TORCH_NAMES[dtype],
        }
    return text
