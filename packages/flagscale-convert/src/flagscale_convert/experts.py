"""The mixture of experts in `config.json` and in Megatron's saved arguments, both ways.

Router settings matter as much as weights: Qwen3-MoE's `norm_topk_prob` and Megatron's
`moe_router_pre_softmax` say the same with opposite signs, and Mixtral always renormalises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_convert.architecture import Architecture, Experts
from flagscale_convert.errors import Unsupported

__all__ = [
    "CONFIG_FIELDS",
    "EXPERT_FAMILIES",
    "read_args_experts",
    "read_config_experts",
    "write_args_experts",
    "write_config_experts",
]

EXPERT_FAMILIES = ("qwen3_moe", "mixtral")
CONFIG_FIELDS: Mapping[str, frozenset[str]] = {
    "qwen3_moe": frozenset(
        {
            "decoder_sparse_step",
            "mlp_only_layers",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "num_local_experts",
            "router_aux_loss_coef",
        }
    ),
    "mixtral": frozenset({"num_experts_per_tok", "num_local_experts", "router_aux_loss_coef"}),
}
"""Fields read here, by family."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "moe_apply_probs_on_input": (False, None),
    "moe_latent_size": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_force_load_balancing": (False, None),
    "moe_router_group_topk": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_score_function": ("softmax", None),
    "moe_router_topk_scaling_factor": (None, 1),
    "moe_shared_expert_gate": (False, None),
    "moe_shared_expert_intermediate_size": (None, 0),
}
"""Arguments that change what experts compute, with the values under which Hugging Face's do the same."""
_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
"""Ways to balance the load that leave the choice of experts alone."""
_DROPS = ("moe_expert_capacity_factor", "moe_input_jitter_eps")
"""Training-time arguments under which a model sees something else in training than afterwards."""


def read_config_experts(
    config: Mapping[str, Any], family: str, *, where: str, notes: list[str]
) -> Experts | None:
    """Read the experts of a `config.json`; None for dense families.

    Raises:
        Unsupported: a count that is none, or contradicts another.
    """
    if family not in EXPERT_FAMILIES:
        return None
    count = _count(config, ("num_experts", "num_local_experts"), where)
    is_mixtral = family == "mixtral"
    layers = _count(config, ("num_hidden_layers",), where)
    experts = Experts(
        count=count,
        per_token=_count(config, ("num_experts_per_tok",), where),
        ffn_size=_count(config, ("intermediate_size" if is_mixtral else "moe_intermediate_size",), where),
        is_renormalised=is_mixtral or _switch(config, "norm_topk_prob", notes),
        dense_layers=() if is_mixtral else _dense_layers(config, layers, where),
        aux_loss=_weight(config.get("router_aux_loss_coef")),
    )
    return _checked(experts, where)


def _switch(config: Mapping[str, Any], name: str, notes: list[str]) -> bool:
    if config.get(name) is None:
        notes.append(f"{name}: absent, false assumed")
    return bool(config.get(name))


def _dense_layers(config: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    listed, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    if not isinstance(step, int) or not isinstance(listed, list):
        raise Unsupported(
            f"{where}: decoder_sparse_step ({step!r}), mlp_only_layers ({listed!r}): an integer and a list of"
            " layers are needed"
        )
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


def _count(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> int:
    """Read a positive integer that may have several names."""
    value = next((values[name] for name in names if values.get(name) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Unsupported(f"{where}: {' or '.join(names)} ({value!r}): a positive integer is needed")
    return value


def _weight(value: Any) -> float:
    """Read the weight of a loss; of several, the first."""
    first = (value[0] if value else 0) if isinstance(value, list | tuple) else value
    return float(first) if isinstance(first, int | float) else 0.0


def _checked(experts: Experts, where: str) -> Experts:
    if experts.per_token > experts.count:
        raise Unsupported(
            f"{where}: experts per token ({experts.per_token}): must be at most the number of experts"
            f" ({experts.count})"
        )
    if experts.per_token == 1 and experts.is_renormalised:
        raise Unsupported(
            f"{where}: one expert per token, renormalised: its weight is always 1, its router cannot learn,"
            " and Megatron refuses such a model"
        )
    return experts


def write_config_experts(arch: Architecture) -> dict[str, Any]:
    """Write the fields of `config.json` about experts; empty for dense models."""
    experts = arch.experts
    if experts is None:
        return {}
    shared = {
        "num_experts_per_tok": experts.per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": experts.aux_loss,
    }
    if arch.family == "mixtral":
        return {**shared, "num_local_experts": experts.count, "router_jitter_noise": 0.0}
    return {
        **shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
        "moe_intermediate_size": experts.ffn_size,
        "norm_topk_prob": experts.is_renormalised,
        "num_experts": experts.count,
    }


def read_args_experts(args: Mapping[str, Any], *, where: str, notes: list[str]) -> Experts | None:
    """Read the experts of saved arguments; None when there are none.

    Raises:
        Unsupported: a value under which no Hugging Face family computes the same.
    """
    if not args.get("num_experts"):
        return None
    for name, allowed in _NEUTRAL.items():
        if name in args and args[name] not in allowed:
            raise Unsupported(
                f"{where}: {name} ({args[name]}): only {' or '.join(map(str, allowed))} can be converted: no"
                " Hugging Face family of experts computes this"
            )
    balancing = args.get("moe_router_load_balancing_type") or "aux_loss"
    for kind in [balancing] if isinstance(balancing, str) else balancing:
        if kind not in _BALANCING:
            raise Unsupported(
                f"{where}: moe_router_load_balancing_type ({kind}): only {', '.join(_BALANCING)} can be"
                " converted: it"
                " changes which experts are chosen"
            )
    notes.extend(f"{name} ({args[name]}): training only, left out" for name in _DROPS if args.get(name))
    has_own_width = args.get("moe_ffn_hidden_size") is not None
    experts = Experts(
        count=_count(args, ("num_experts",), where),
        per_token=_count(args, ("moe_router_topk",), where),
        ffn_size=_count(args, ("moe_ffn_hidden_size" if has_own_width else "ffn_hidden_size",), where),
        is_renormalised=not args.get("moe_router_pre_softmax"),
        dense_layers=_plain_layers(args, _count(args, ("num_layers",), where), where),
        aux_loss=_weight(args.get("moe_aux_loss_coeff")),
    )
    return _checked(experts, where)


def _plain_layers(args: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """Read `moe_layer_freq`: every n-th layer from the first on, or a list of 1 (experts) and 0."""
    given = args.get("moe_layer_freq", 1)
    if isinstance(given, int) and given >= 1:
        return tuple(layer for layer in range(layers) if layer % given)
    if not isinstance(given, list | tuple) or len(given) != layers or set(given) - {0, 1} or 1 not in given:
        raise Unsupported(
            f"{where}: moe_layer_freq ({given}): a positive integer or a list of {layers} zeros and ones is"
            " needed"
        )
    return tuple(layer for layer, has_experts in enumerate(given) if not has_experts)


def write_args_experts(arch: Architecture, *, is_stacked: bool) -> dict[str, Any]:
    """Write Megatron's arguments about experts.

    Args:
        arch: the model.
        is_stacked: whether layers share one tensor, which Megatron asks for only without a list of layers.
    """
    experts = arch.experts
    if experts is None:
        return {"num_experts": None}
    pattern = [int(arch.has_experts(layer)) for layer in range(arch.num_layers)]
    return {
        **{name: allowed[0] for name, allowed in _NEUTRAL.items()},
        "moe_aux_loss_coeff": experts.aux_loss,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_layer_freq": 1 if is_stacked else pattern,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_pre_softmax": not experts.is_renormalised,
        "moe_router_topk": experts.per_token,
        "num_experts": experts.count,
    }
