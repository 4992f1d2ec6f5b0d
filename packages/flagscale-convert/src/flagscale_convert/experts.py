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

EXPERT_FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
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
    "deepseek_v3": frozenset(
        {
            "aux_loss_alpha",
            "ep_size",
            "first_k_dense_replace",
            "moe_intermediate_size",
            "moe_layer_freq",
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "norm_topk_prob",
            "num_experts_per_tok",
            "num_local_experts",
            "router_aux_loss_coef",
            "routed_scaling_factor",
            "scoring_func",
            "seq_aux",
            "topk_group",
            "topk_method",
        }
    ),
}
"""Fields read here, by family."""
_DEEPSEEK_ONLY: Mapping[str, tuple[Any, ...]] = {
    "moe_layer_freq": (1, None),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
}
"""Fields of DeepSeek-V3 with the only values under which transformers itself computes what they say."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "moe_apply_probs_on_input": (False, None),
    "moe_latent_size": (None,),
    "moe_router_force_load_balancing": (False, None),
    "moe_router_topk_limited_devices": (None,),
    "moe_shared_expert_gate": (False, None),
}
"""Arguments that change what experts compute, with the values under which Hugging Face's do the same."""
_SOFTMAX_ONLY: Mapping[str, tuple[Any, ...]] = {
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_group_topk": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_score_function": ("softmax", None),
    "moe_router_topk_scaling_factor": (None, 1),
    "moe_shared_expert_intermediate_size": (None, 0),
}
"""The same for the families whose router is a softmax."""
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
    if family == "deepseek_v3":
        return _read_deepseek(config, where=where, notes=notes)
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


def _read_deepseek(config: Mapping[str, Any], *, where: str, notes: list[str]) -> Experts:
    """Read DeepSeek-V3's experts: sigmoid scores, groups, a shared expert, plain layers first."""
    for name, allowed in _DEEPSEEK_ONLY.items():
        if config.get(name) not in allowed:
            raise Unsupported(
                f"{where}: {name} ({config[name]}): only {allowed[0]} can be converted in this family"
            )
    layers, plain = _count(config, ("num_hidden_layers",), where), config.get("first_k_dense_replace", 3)
    if not isinstance(plain, int) or not 0 <= plain < layers:
        raise Unsupported(
            f"{where}: first_k_dense_replace ({plain}): must leave at least one of {layers} layers with"
            " experts"
        )
    width = _count(config, ("moe_intermediate_size",), where)
    per_token = _count(config, ("num_experts_per_tok",), where)
    is_renormalised = config.get("norm_topk_prob", True)
    if bool(is_renormalised) is not (per_token > 1):
        raise Unsupported(
            f"{where}: norm_topk_prob ({is_renormalised}) with num_experts_per_tok ({per_token}): Megatron"
            " renormalises sigmoid scores exactly when a token has several experts"
        )
    if config.get("routed_scaling_factor") is None:
        notes.append("routed_scaling_factor: absent, 2.5 assumed")
    experts = Experts(
        count=_count(config, ("n_routed_experts", "num_local_experts"), where),
        per_token=per_token,
        ffn_size=width,
        is_renormalised=per_token > 1,
        dense_layers=tuple(range(plain)),
        scoring="sigmoid",
        scaling=_scale(config.get("routed_scaling_factor", 2.5), "routed_scaling_factor", where),
        groups=_count({"n_group": 1, **_given(config)}, ("n_group",), where),
        groups_per_token=_count({"topk_group": 1, **_given(config)}, ("topk_group",), where),
        shared_size=width * _count({"n_shared_experts": 1, **_given(config)}, ("n_shared_experts",), where),
        has_bias=True,
        aux_loss=_weight(config.get("aux_loss_alpha", config.get("router_aux_loss_coef"))),
    )
    return _checked(experts, where)


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}


def _scale(value: Any, name: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise Unsupported(f"{where}: {name} ({value!r}): a positive number is needed")
    return float(value)


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
    _check_groups(experts, where)
    if experts.per_token == 1 and experts.is_renormalised:
        raise Unsupported(
            f"{where}: one expert per token, renormalised: its weight is always 1, its router cannot learn,"
            " and Megatron refuses such a model"
        )
    return experts


def _check_groups(experts: Experts, where: str) -> None:
    """Refuse groups that the two sides score differently.

    transformers scores a group by its best two experts, Megatron by its best `per_token / groups_per_token`.
    """
    groups, chosen = experts.groups, experts.groups_per_token
    if chosen > groups or experts.count % groups or experts.per_token > experts.count // groups * chosen:
        raise Unsupported(
            f"{where}: {experts.count} experts in groups ({groups}), of which a token takes {chosen}: groups"
            f" must be of equal size, and those taken must hold the {experts.per_token} experts of a token"
        )
    if chosen < groups and experts.per_token != 2 * chosen:
        raise Unsupported(
            f"{where}: {experts.per_token} experts per token from {chosen} of {groups} groups: Megatron"
            f" scores a group by its best {experts.per_token // chosen} experts and transformers by its"
            " best 2: only twice as many experts as groups can be converted"
        )


def write_config_experts(arch: Architecture, family: str) -> dict[str, Any]:
    """Write the fields of `config.json` about experts, as a family names them; empty for dense models."""
    experts = arch.experts
    if experts is None:
        return {}
    if family == "deepseek_v3":
        return _write_deepseek(experts)
    shared = {
        "num_experts_per_tok": experts.per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": experts.aux_loss,
    }
    if family == "mixtral":
        return {**shared, "num_local_experts": experts.count, "router_jitter_noise": 0.0}
    return {
        **shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
        "moe_intermediate_size": experts.ffn_size,
        "norm_topk_prob": experts.is_renormalised,
        "num_experts": experts.count,
    }


def _write_deepseek(experts: Experts) -> dict[str, Any]:
    return {
        "aux_loss_alpha": experts.aux_loss,
        "first_k_dense_replace": len(experts.dense_layers),
        "moe_intermediate_size": experts.ffn_size,
        "moe_layer_freq": 1,
        "n_group": experts.groups,
        "n_routed_experts": experts.count,
        "n_shared_experts": experts.shared_size // experts.ffn_size,
        "norm_topk_prob": experts.is_renormalised,
        "num_experts_per_tok": experts.per_token,
        "routed_scaling_factor": experts.scaling,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_group": experts.groups_per_token,
        "topk_method": "noaux_tc",
    }


def read_args_experts(args: Mapping[str, Any], *, where: str, notes: list[str]) -> Experts | None:
    """Read the experts of saved arguments; None when there are none.

    Raises:
        Unsupported: a value under which no Hugging Face family computes the same.
    """
    if not args.get("num_experts"):
        return None
    is_latent = bool(args.get("multi_latent_attention"))
    for name, allowed in (_NEUTRAL if is_latent else {**_NEUTRAL, **_SOFTMAX_ONLY}).items():
        if name in args and args[name] not in allowed:
            raise Unsupported(
                f"{where}: {name} ({args[name]}): only {' or '.join(map(str, allowed))} can be converted: no"
                f" Hugging Face family with {'latent' if is_latent else 'such'} attention computes this"
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
    per_token = _count(args, ("moe_router_topk",), where)
    is_sigmoid = args.get("moe_router_score_function") == "sigmoid"
    experts = Experts(
        count=_count(args, ("num_experts",), where),
        per_token=per_token,
        ffn_size=_count(args, ("moe_ffn_hidden_size" if has_own_width else "ffn_hidden_size",), where),
        is_renormalised=per_token > 1 if is_sigmoid else not args.get("moe_router_pre_softmax"),
        dense_layers=_plain_layers(args, _count(args, ("num_layers",), where), where),
        scoring=args.get("moe_router_score_function") or "softmax",
        **(_read_args_deepseek(args, where) if is_latent and is_sigmoid else {}),
        aux_loss=_weight(args.get("moe_aux_loss_coeff")),
    )
    return _checked(experts, where)


def _read_args_deepseek(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not args.get("moe_router_enable_expert_bias"):
        raise Unsupported(
            f"{where}: moe_router_enable_expert_bias ({args.get('moe_router_enable_expert_bias')}): only True"
            " can be converted: DeepSeek-V3's router always has a bias per expert"
        )
    width = args.get("moe_ffn_hidden_size") or args.get("ffn_hidden_size")
    shared = _count(args, ("moe_shared_expert_intermediate_size",), where)
    if not isinstance(width, int) or shared % width:
        raise Unsupported(
            f"{where}: moe_shared_expert_intermediate_size ({shared}): must be a multiple of"
            f" moe_ffn_hidden_size ({width}): DeepSeek-V3 counts shared experts of that width"
        )
    has_groups = bool(args.get("moe_router_group_topk"))
    return {
        "scaling": _scale(
            args.get("moe_router_topk_scaling_factor") or 1.0, "moe_router_topk_scaling_factor", where
        ),
        "groups": _count(args, ("moe_router_num_groups",), where) if has_groups else 1,
        "groups_per_token": _count(args, ("moe_router_group_topk",), where) if has_groups else 1,
        "shared_size": shared,
        "has_bias": True,
    }


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
        **{name: allowed[0] for name, allowed in {**_NEUTRAL, **_SOFTMAX_ONLY}.items()},
        "moe_aux_loss_coeff": experts.aux_loss,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_layer_freq": 1 if is_stacked else pattern,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_pre_softmax": not experts.is_renormalised,
        "moe_router_topk": experts.per_token,
        "num_experts": experts.count,
        **(_write_args_deepseek(experts) if experts.scoring == "sigmoid" else {}),
    }


def _write_args_deepseek(experts: Experts) -> dict[str, Any]:
    has_groups = experts.groups > 1
    return {
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "moe_router_group_topk": experts.groups_per_token if has_groups else None,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_router_num_groups": experts.groups if has_groups else None,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": experts.scaling,
        "moe_shared_expert_intermediate_size": experts.shared_size,
    }
