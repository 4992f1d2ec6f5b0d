"""Megatron's saved arguments of the families, both ways.

A checkpoint carries all of some hundred arguments of the run. Those that shape the model are mapped; those
that would make it another model must have their neutral value; the rest is about training and says nothing
about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale_convert.architecture import Architecture, Experts, RopeScaling
from flagscale_convert.errors import Unsupported
from flagscale_convert.experts import read_args_experts, write_args_experts

__all__ = ["ReadArgs", "read_args", "write_args"]

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
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False, None),
    "no_rope_freq": (None,),
    "normalization": ("RMSNorm",),
    "openai_gelu": (False, None),
    "position_embedding_type": ("rope",),
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


def read_args(args: Mapping[str, Any], *, where: str, vocab_size: int | None = None) -> ReadArgs:
    """Understand saved arguments.

    Args:
        args: name to value.
        where: names the checkpoint in messages.
        vocab_size: the true vocabulary if known from elsewhere (a tokenizer, the command line).

    Raises:
        Unsupported: no arguments, another architecture, or a value that contradicts another.
    """
    if not args:
        raise Unsupported(
            f"{where}: the checkpoint carries no arguments: the model cannot be told from its tensors alone:"
            " save it"
            " again with Megatron's trainer"
        )
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
    has_bias, has_norm = bool(args.get("add_qkv_bias")), bool(args.get("qk_layernorm"))
    experts = read_args_experts(args, where=where, notes=notes)
    family = (
        _family(has_bias=has_bias, has_norm=has_norm, where=where)
        if experts is None
        else _expert_family(experts, has_bias=has_bias, has_norm=has_norm, where=where)
    )
    ffn_size = _positive(args, "ffn_hidden_size", where)
    return ReadArgs(
        Architecture(
            family=family,
            num_layers=_positive(args, "num_layers", where),
            hidden_size=hidden,
            ffn_size=experts.ffn_size if experts is not None and family == "mixtral" else ffn_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=hidden // heads
            if args.get("kv_channels") is None
            else _positive(args, "kv_channels", where),
            vocab_size=_true_vocabulary(args, vocab_size, padded, where, notes),
            padded_vocab_size=padded,
            norm_epsilon=_number(args, "layernorm_epsilon", 1e-5, notes),
            rope_theta=_number(args, "rotary_base", 10000, notes),
            rope_scaling=_scaling(args, where),
            max_positions=_positive(args, "max_position_embeddings", where),
            is_tied=not args.get("untie_embeddings_and_output_weights", False),
            has_qkv_bias=has_bias,
            has_qk_norm=has_norm,
            init_std=_number(args, "init_method_std", 0.02, notes),
            experts=experts,
        ),
        tuple(notes),
        knows_vocabulary=bool(vocab_size or args.get("vocab_size")),
    )


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


def _scaling(args: Mapping[str, Any], where: str) -> RopeScaling | None:
    factor = args.get("rotary_seq_len_interpolation_factor")
    if args.get("use_rope_scaling"):
        if factor not in (None, 1):
            raise Unsupported(
                f"{where}: use_rope_scaling with rotary_seq_len_interpolation_factor ({factor}): no Hugging"
                " Face rope"
                " does both"
            )
        return RopeScaling("llama3", float(args.get("rope_scaling_factor") or 8.0))
    return None if factor in (None, 1) else RopeScaling("linear", float(factor))


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
    scaling = arch.rope_scaling
    is_grouped = arch.num_kv_heads != arch.num_heads
    theta = int(arch.rope_theta) if arch.rope_theta.is_integer() else arch.rope_theta
    return {
        **{name: allowed[0] for name, allowed in _NEUTRAL.items()},
        **write_args_experts(arch, is_stacked=is_stacked),
        "add_position_embedding": True,
        "add_qkv_bias": arch.has_qkv_bias,
        "attention_dropout": 0.0,
        "ckpt_format": "torch_dist",
        "disable_bias_linear": True,
        "expert_model_parallel_size": 1,
        "ffn_hidden_size": arch.ffn_size,
        "group_query_attention": is_grouped,
        "hidden_dropout": 0.0,
        "hidden_size": arch.hidden_size,
        "init_method_std": arch.init_std,
        "kv_channels": arch.head_size,
        "layernorm_epsilon": arch.norm_epsilon,
        "make_vocab_size_divisible_by": vocab_divisor,
        "max_position_embeddings": arch.max_positions,
        # Megatron then asks for neither, so its default options load this checkpoint.
        "no_save_optim": True,
        "no_save_rng": True,
        "num_attention_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "num_query_groups": arch.num_kv_heads if is_grouped else 1,
        "padded_vocab_size": arch.padded_vocab_size,
        "pipeline_model_parallel_size": 1,
        "qk_layernorm": arch.has_qk_norm,
        "rope_scaling_factor": scaling.factor if scaling is not None and scaling.kind == "llama3" else 8.0,
        "rotary_base": theta,
        "rotary_seq_len_interpolation_factor": (
            scaling.factor if scaling is not None and scaling.kind == "linear" else None
        ),
        "seq_length": arch.max_positions,
        "tensor_model_parallel_size": 1,
        "tokenizer_model": tokenizer,
        "tokenizer_type": None if tokenizer is None else "HuggingFaceTokenizer",
        "untie_embeddings_and_output_weights": not arch.is_tied,
        "use_rope_scaling": scaling is not None and scaling.kind == "llama3",
        "use_rotary_position_embeddings": True,
        "virtual_pipeline_model_parallel_size": None,
        "vocab_size": arch.vocab_size,
    }
