"""Rotary embeddings, base and stretching, in `config.json` and in Megatron's saved arguments, both ways.

Latent attention has rotary settings of its own in Megatron (`rope_type`), other attention takes them from
`position_embedding_type`. YaRN's strength is `mscale` over `mscale_all_dim` in Megatron; transformers takes
these two only together and else what 1 over 0 gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_convert.architecture import Architecture, RopeScaling, Yarn
from flagscale_convert.errors import Unsupported

__all__ = ["read_args_rope", "read_config_rope", "write_args_rope", "write_config_rope"]

_LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_KNOWN = frozenset({"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"})
_YARN_FIELDS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    }
)


def read_config_rope(
    config: Mapping[str, Any], *, where: str, notes: list[str]
) -> tuple[float, RopeScaling | None]:
    """Read base and scaling from transformers 5's `rope_parameters` or the classic two fields.

    Args:
        config: the parsed file.
        where: names it in messages.
        notes: gains what was defaulted or left out.

    Raises:
        Unsupported: a scaling Megatron does not have.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        theta = 10000.0
        notes.append("rope_theta: absent, 10000 assumed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise Unsupported(
            f"{where}: partial_rotary_factor ({rope['partial_rotary_factor']}): only 1 has an equal in"
            " Megatron's models of these families"
        )
    # Which frequencies turn with which axis is told elsewhere; how fast they turn is the same.
    if kind in ("default", "mrope"):
        return float(theta), None
    own = {"linear": frozenset(), "llama3": frozenset(_LLAMA3_BANDS), "yarn": _YARN_FIELDS}.get(kind)
    if own is None:
        raise Unsupported(
            f"{where}: rope_type ({kind}): Megatron has default, linear, llama3 and yarn: if the scaling only"
            " serves longer contexts at inference, take it out of config.json and put it back after training"
        )
    unknown = sorted(set(rope) - _KNOWN - own)
    notes.extend(f"rope {name} ({rope[name]}): unknown field, left out" for name in unknown)
    factor = _factor(rope.get("factor"), "rope factor", where)
    if kind == "llama3":
        for name, only in _LLAMA3_BANDS.items():
            if rope.get(name, only) != only:
                raise Unsupported(
                    f"{where}: rope {name} ({rope[name]}): Megatron's llama3 scaling has {only} built in"
                )
    return float(theta), RopeScaling(kind, factor, _read_yarn(rope, where) if kind == "yarn" else None)


def _read_yarn(rope: Mapping[str, Any], where: str) -> Yarn:
    for name, allowed in (("attention_factor", (None,)), ("truncate", (True, None))):
        if rope.get(name) not in allowed:
            raise Unsupported(
                f"{where}: rope {name} ({rope[name]}): Megatron's YaRN has no such setting: leave it out"
            )
    original = rope.get("original_max_position_embeddings")
    if not isinstance(original, int) or original < 1:
        raise Unsupported(
            f"{where}: rope original_max_position_embeddings ({original}): YaRN needs the length the model"
            " was trained with, a positive integer"
        )
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (mscale and all_dim):
        if all_dim or mscale not in (None, 0, 1):
            raise Unsupported(
                f"{where}: rope mscale ({mscale}) and mscale_all_dim ({all_dim}): transformers and DeepSeek's"
                " own code compute different things with one of them: give both or neither"
            )
        mscale, all_dim = 1.0, 0.0
    return Yarn(
        original_positions=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(mscale),
        mscale_all_dim=float(all_dim),
    )


def _factor(value: Any, name: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 1:
        raise Unsupported(f"{where}: {name} ({value}): a number of at least 1 is needed")
    return float(value)


def write_config_rope(arch: Architecture) -> dict[str, Any]:
    """Write `rope_theta` and `rope_scaling`: transformers 4 and 5, vLLM and SGLang all read these."""
    scaling = arch.rope_scaling
    if scaling is None:
        return {"rope_theta": arch.rope_theta, "rope_scaling": None}
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= _LLAMA3_BANDS
    if scaling.yarn is not None:
        yarn = scaling.yarn
        written |= {
            # The old name too: published configurations and engines' older versions have only that.
            "type": "yarn",
            "original_max_position_embeddings": yarn.original_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
        if yarn.mscale_all_dim:
            written |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    return {"rope_theta": arch.rope_theta, "rope_scaling": written}


def read_args_rope(args: Mapping[str, Any], *, where: str) -> RopeScaling | None:
    """Read the scaling of saved arguments.

    Raises:
        Unsupported: a combination transformers does not have.
    """
    factor = args.get("rotary_seq_len_interpolation_factor")
    kind = args.get("position_embedding_type", "rope")
    if args.get("multi_latent_attention"):
        _require(
            args, {"use_rope_scaling": (False, None), "rotary_seq_len_interpolation_factor": (None, 1)}, where
        )
        return _read_latent(args, where)
    if args.get("use_rope_scaling"):
        if factor not in (None, 1) or kind != "rope":
            raise Unsupported(
                f"{where}: use_rope_scaling with rotary_seq_len_interpolation_factor ({factor}) or"
                f" position_embedding_type ({kind}): no Hugging Face rope does both"
            )
        return RopeScaling("llama3", float(args.get("rope_scaling_factor") or 8.0))
    if kind == "yarn":
        _require(
            args,
            {
                "rotary_seq_len_interpolation_factor": (None, 1),
                "yarn_correction_range_round_to_int": (True, None),
            },
            where,
        )
        return _yarn(args, "yarn_", "yarn_original_max_position_embeddings", where)
    return None if factor in (None, 1) else RopeScaling("linear", float(factor))


def _read_latent(args: Mapping[str, Any], where: str) -> RopeScaling | None:
    factor = args.get("rotary_scaling_factor")
    factor = 1.0 if factor is None else factor
    kind = args.get("rope_type") or "yarn"
    if kind == "yarn" and factor != 1:
        return _yarn(args, "", "original_max_position_embeddings", where)
    if factor != 1 and args.get("mscale_all_dim"):
        raise Unsupported(
            f"{where}: rotary_scaling_factor ({factor}) and mscale_all_dim ({args['mscale_all_dim']}) with"
            f" rope_type ({kind}): Megatron then scales attention but not positions, which no Hugging Face"
            " rope does: set rotary_scaling_factor to 1"
        )
    return None


def _require(args: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, values in allowed.items():
        if args.get(name, values[0]) not in values:
            raise Unsupported(
                f"{where}: {name} ({args[name]}): only {' or '.join(map(str, values))} can be converted with"
                " these rotary embeddings"
            )


def _yarn(args: Mapping[str, Any], prefix: str, original: str, where: str) -> RopeScaling:
    def number(name: str, default: float) -> float:
        value = args.get(name)
        return default if value is None else float(value)

    all_dim = number("mscale_all_dim", 0.0)
    mscale = number("mscale", 1.0)
    if mscale != 1 and not all_dim:
        raise Unsupported(
            f"{where}: mscale ({mscale}) without mscale_all_dim: transformers takes the two together only"
        )
    return RopeScaling(
        "yarn",
        _factor(args.get("rotary_scaling_factor", 1.0), "rotary_scaling_factor", where),
        Yarn(
            original_positions=int(number(original, 4096)),
            beta_fast=number(f"{prefix}beta_fast", 32.0),
            beta_slow=number(f"{prefix}beta_slow", 1.0),
            mscale=mscale,
            mscale_all_dim=all_dim,
        ),
    )


def write_args_rope(arch: Architecture) -> dict[str, Any]:
    """Write Megatron's arguments about rotary embeddings."""
    scaling = arch.rope_scaling
    kind = "default" if scaling is None else scaling.kind
    factor = 1.0 if scaling is None else scaling.factor
    theta = int(arch.rope_theta) if arch.rope_theta.is_integer() else arch.rope_theta
    written = {
        "position_embedding_type": "yarn" if kind == "yarn" and arch.latent is None else "rope",
        "rope_scaling_factor": factor if kind == "llama3" else 8.0,
        "rotary_base": theta,
        "rotary_seq_len_interpolation_factor": factor if kind == "linear" else None,
        "use_rope_scaling": kind == "llama3",
        "use_rotary_position_embeddings": True,
    }
    if arch.latent is not None:
        written |= {"rope_type": "yarn" if kind == "yarn" else "rope", "rotary_scaling_factor": 1.0}
    if scaling is None or scaling.yarn is None:
        return written
    yarn, prefix = scaling.yarn, "" if arch.latent is not None else "yarn_"
    return written | {
        "rotary_scaling_factor": factor,
        f"{prefix}original_max_position_embeddings": yarn.original_positions,
        f"{prefix}beta_fast": yarn.beta_fast,
        f"{prefix}beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
