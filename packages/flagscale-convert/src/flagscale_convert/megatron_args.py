"""Megatron's saved arguments of the families, both ways.

A checkpoint carries all of some hundred arguments of the run. Those that shape the model are mapped; those
that would make it another model must have their neutral value; the rest is about training and says nothing
about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale_convert.architecture import Architecture, Experts, LatentAttention
from flagscale_convert.description import Description
from flagscale_convert.errors import Unsupported
from flagscale_convert.experts import read_args_experts, write_args_experts
from flagscale_convert.families import FAMILIES
from flagscale_convert.latent import read_args_latent, read_args_mtp_layers, write_args_latent
from flagscale_convert.multimodal import read_args_mrope, read_args_sections, write_args_sections
from flagscale_convert.rope import read_args_rope, write_args_rope
from flagscale_convert.tensors import TensorInfo

__all__ = ["ReadArgs", "read_args", "write_args"]

_FAMILY = "flagscale_convert_family"
"""Argument under which a conversion notes a family that Megatron's own arguments cannot tell from another."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "add_bias_linear": (False, None),
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "attention_output_gate": (False, None),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (0, None),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "layernorm_zero_centered_gamma": (False, None),
    "linear_attention_freq": (None,),
    "no_rope_freq": (None,),
    "normalization": ("RMSNorm",),
    "openai_gelu": (False, None),
    "position_embedding_type": ("rope", "yarn", "mrope"),
    "qk_l2_norm": (False, None),
    "quick_geglu": (False, None),
    "rotary_interleaved": (False, None),
    "rotary_percent": (1.0, None),
    "softmax_type": ("vanilla", None),
    "squared_relu": (False, None),
    "swiglu": (True,),
    "use_mup": (False, None),
    "window_size": (None,),
}
"""Arguments that change what is computed, with the values under which it is a model of the families."""


@dataclass(frozen=True, slots=True)
class ReadArgs:
    """Saved arguments understood."""

    architecture: Architecture
    notes: tuple[str, ...]
    """What was defaulted, one sentence each."""
    knows_vocabulary: bool
    """False when padding could not be told from the vocabulary, and all rows were taken for it."""


def read_args(
    args: Mapping[str, Any],
    *,
    where: str,
    vocab_size: int | None = None,
    family: str | None = None,
    tensors: Mapping[str, TensorInfo] | None = None,
) -> ReadArgs:
    """Understand saved arguments.

    Args:
        args: name to value.
        where: names the checkpoint in messages.
        vocab_size: the true vocabulary if known from elsewhere (a tokenizer, the command line).
        family: which of the families with this configuration it is; by default what a conversion noted, else
            the built-in one.
        tensors: of the checkpoint, by which a tower is noticed and measured where no argument tells of it.

    Raises:
        Unsupported: no arguments, another architecture, or a value that contradicts another.
    """
    if not args:
        raise Unsupported(
            f"{where}: the checkpoint carries no arguments: the model cannot be told from its tensors alone:"
            " save it"
            " again with Megatron's trainer"
        )
    described = _described(family or args.get(_FAMILY), tensors or {})
    if described is not None:
        return _read_described(args, described, tensors or {}, where, vocab_size)
    for name, allowed in _NEUTRAL.items():
        if name in args and args[name] not in allowed:
            raise Unsupported(
                f"{where}: {name} ({args[name]}): only {' or '.join(str(item) for item in allowed)} can be"
                " converted:"
                " none of the Hugging Face families computes this"
            )
    notes: list[str] = []
    heads = _positive(args, "num_attention_heads", where)
    hidden = _positive(args, "hidden_size", where)
    kv_heads = _positive(args, "num_query_groups", where) if args.get("group_query_attention") else heads
    if heads % kv_heads:
        raise Unsupported(
            f"{where}: num_query_groups ({kv_heads}): must divide num_attention_heads ({heads})"
        )
    padded = _positive(args, "padded_vocab_size", where)
    latent = read_args_latent(args, where=where)
    has_bias, has_norm = bool(args.get("add_qkv_bias")), latent is None and bool(args.get("qk_layernorm"))
    experts = read_args_experts(args, where=where, notes=notes)
    base = (
        _latent_family(experts, where=where)
        if latent is not None
        else _family(has_bias=has_bias, has_norm=has_norm, where=where)
        if experts is None
        else _expert_family(experts, has_bias=has_bias, has_norm=has_norm, where=where)
    )
    ffn_size = _positive(args, "ffn_hidden_size", where)
    chosen = _chosen(base, family or args.get(_FAMILY) or _noticed(base, args, tensors or {}), where)
    towers = FAMILIES[chosen].multimodal
    head_size = _head_size(args, latent, where)
    vision, audio, outer = (
        (None, None, {})
        if towers is None
        else read_args_sections(args, towers, tensors or {}, where=where, notes=notes)
    )
    return ReadArgs(
        Architecture(
            family=chosen,
            num_layers=_positive(args, "num_layers", where),
            hidden_size=hidden,
            ffn_size=experts.ffn_size if experts is not None and base == "mixtral" else ffn_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            vocab_size=_true_vocabulary(args, vocab_size, padded, where, notes),
            padded_vocab_size=padded,
            norm_epsilon=_number(args, "layernorm_epsilon", 1e-5, notes),
            rope_theta=_number(args, "rotary_base", 10000, notes),
            rope_scaling=read_args_rope(args, where=where),
            max_positions=_positive(args, "max_position_embeddings", where),
            is_tied=not args.get("untie_embeddings_and_output_weights", False),
            has_qkv_bias=has_bias,
            has_qk_norm=has_norm,
            init_std=_number(args, "init_method_std", 0.02, notes),
            experts=experts,
            latent=latent,
            mtp_layers=read_args_mtp_layers(args, latent, where=where),
            mrope_section=read_args_mrope(args, towers, head_size, where=where, notes=notes),
            vision=vision,
            audio=audio,
            outer=outer,
        ),
        tuple(notes),
        knows_vocabulary=bool(vocab_size or args.get("vocab_size")),
    )


def _described(named: str | None, tensors: Mapping[str, TensorInfo]) -> Description | None:
    """Find the description of a family that has its own: one that is named, else one with its mark there."""
    for name, family in FAMILIES.items():
        own = family.description
        if own is not None and (named == name or (named is None and own.mark in tensors)):
            return own
    return None


def _read_described(
    args: Mapping[str, Any],
    description: Description,
    tensors: Mapping[str, TensorInfo],
    where: str,
    vocab_size: int | None,
) -> ReadArgs:
    """Understand the arguments of a family that has a configuration of its own."""
    notes: list[str] = []
    padded = _positive(args, "padded_vocab_size", where)
    arch = description.read_args(
        args,
        tensors,
        vocab_size=_true_vocabulary(args, vocab_size, padded, where, notes),
        padded_vocab_size=padded,
        where=where,
        notes=notes,
    )
    return ReadArgs(arch, tuple(notes), knows_vocabulary=bool(vocab_size or args.get("vocab_size")))


def _chosen(base: str, family: str | None, where: str) -> str:
    """Take the family asked for, if it has this configuration."""
    if family is None or family == base:
        return base
    if family not in FAMILIES or FAMILIES[family].base != base:
        fitting = [name for name, known in FAMILIES.items() if known.base == base]
        raise Unsupported(
            f"{where}: family ({family}): the configuration is that of {', '.join(fitting)}: choose one of"
            " these, or install the package that brings the family"
        )
    return family


def _noticed(base: str, args: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Tell a family with towers by a tensor that no other has, or by positions of three axes."""
    for name, family in FAMILIES.items():
        towers = family.multimodal
        if towers is None or family.base != base:
            continue
        if towers.mark in tensors or (
            not tensors and towers.has_mrope and args.get("position_embedding_type") == "mrope"
        ):
            return name
    return None


def _head_size(args: Mapping[str, Any], latent: LatentAttention | None, where: str) -> int:
    if latent is not None:
        return latent.plain_size + latent.rotary_size
    if args.get("kv_channels") is not None:
        return _positive(args, "kv_channels", where)
    return _positive(args, "hidden_size", where) // _positive(args, "num_attention_heads", where)


def _latent_family(experts: Experts | None, *, where: str) -> str:
    if experts is None or experts.scoring != "sigmoid":
        what = "num_experts (None)" if experts is None else f"moe_router_score_function ({experts.scoring})"
        raise Unsupported(
            f"{where}: {what} with multi_latent_attention: only DeepSeek-V3's form can be converted, which"
            " has experts chosen by sigmoid"
        )
    if experts.dense_layers != tuple(range(len(experts.dense_layers))):
        raise Unsupported(
            f"{where}: moe_layer_freq: layers without experts ({', '.join(map(str, experts.dense_layers))}):"
            " must be the first ones: DeepSeek-V3 has only first_k_dense_replace"
        )
    return "deepseek_v3"


def _family(*, has_bias: bool, has_norm: bool, where: str) -> str:
    if has_bias and has_norm:
        raise Unsupported(
            f"{where}: add_qkv_bias and qk_layernorm (both true): one of them: no Hugging Face family of this"
            " shape has"
            " both without a bias on the output projection"
        )
    return "qwen3" if has_norm else "qwen2" if has_bias else "llama"


def _expert_family(experts: Experts, *, has_bias: bool, has_norm: bool, where: str) -> str:
    if has_bias:
        raise Unsupported(
            f"{where}: add_qkv_bias (True) with num_experts ({experts.count}): no family that can be"
            " converted has both"
        )
    if has_norm:
        return "qwen3_moe"
    if experts.dense_layers or not experts.is_renormalised:
        what = "layers without experts" if experts.dense_layers else "moe_router_pre_softmax (True)"
        raise Unsupported(
            f"{where}: {what} without qk_layernorm: only Qwen3-MoE has that, and it has qk_layernorm; Mixtral"
            " has"
            " experts in every layer and renormalises their weights"
        )
    return "mixtral"


def _true_vocabulary(
    args: Mapping[str, Any], given: int | None, padded: int, where: str, notes: list[str]
) -> int:
    """Tell how many rows mean something: as told, else as the run was told, else all."""
    saved = args.get("vocab_size")
    size = given or (saved if isinstance(saved, int) and saved > 0 else None)
    if size is None:
        notes.append(
            f"vocab_size: neither the checkpoint nor a tokenizer tells it, all {padded} padded rows are kept"
        )
        return padded
    if size > padded:
        raise Unsupported(
            f"{where}: vocabulary ({size}): the checkpoint has {padded} rows: give the tokenizer it was"
            " trained with"
        )
    return size


def _positive(args: Mapping[str, Any], name: str, where: str) -> int:
    value = args.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Unsupported(f"{where}: saved argument {name} ({value!r}): a positive integer is needed")
    return value


def _number(args: Mapping[str, Any], name: str, default: float, notes: list[str]) -> float:
    value = args.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        notes.append(f"{name}: not among the saved arguments, {default} assumed")
        return float(default)
    return float(value)


def write_args(
    arch: Architecture, *, tokenizer: str | None, vocab_divisor: int, is_stacked: bool = True
) -> dict[str, Any]:
    """Write the arguments with which Megatron builds this model, dtype excepted.

    Args:
        arch: the model.
        tokenizer: directory of its tokenizer, if one is carried along.
        vocab_divisor: what the vocabulary was padded to a multiple of.
        is_stacked: whether layers share one tensor.
    """
    family = FAMILIES[arch.family]
    common = {
        "add_position_embedding": True,
        "attention_dropout": 0.0,
        "ckpt_format": "torch_dist",
        "disable_bias_linear": True,
        "expert_model_parallel_size": 1,
        "ffn_hidden_size": arch.ffn_size,
        "hidden_dropout": 0.0,
        "hidden_size": arch.hidden_size,
        "init_method_std": arch.init_std,
        "layernorm_epsilon": arch.norm_epsilon,
        "make_vocab_size_divisible_by": vocab_divisor,
        "max_position_embeddings": arch.max_positions,
        # Megatron then asks for neither, so its default options load this checkpoint.
        "no_save_optim": True,
        "no_save_rng": True,
        "num_attention_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "padded_vocab_size": arch.padded_vocab_size,
        "pipeline_model_parallel_size": 1,
        "seq_length": arch.max_positions,
        "tensor_model_parallel_size": 1,
        "tokenizer_model": tokenizer,
        "tokenizer_type": None if tokenizer is None else "HuggingFaceTokenizer",
        "untie_embeddings_and_output_weights": not arch.is_tied,
        "virtual_pipeline_model_parallel_size": None,
        "vocab_size": arch.vocab_size,
    }
    if family.description is not None:
        return {_FAMILY: arch.family, **common, **family.description.write_args(arch)}
    is_grouped = arch.num_kv_heads != arch.num_heads
    return {
        **({_FAMILY: arch.family} if family.like else {}),
        **{name: allowed[0] for name, allowed in _NEUTRAL.items()},
        **write_args_experts(arch, is_stacked=is_stacked),
        **common,
        "add_qkv_bias": arch.has_qkv_bias,
        "group_query_attention": is_grouped,
        "kv_channels": arch.head_size if arch.latent is None else arch.latent.value_size,
        "num_query_groups": arch.num_kv_heads if is_grouped else 1,
        "qk_layernorm": arch.has_qk_norm,
        **write_args_rope(arch),
        **write_args_latent(arch),
        **write_args_sections(arch, family.multimodal),
    }
