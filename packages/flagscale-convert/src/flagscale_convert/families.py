"""The families: one table of rules each, data only.

Names on the Megatron side are those its checkpoints carry with Transformer Engine and, for models whose
layers are alike, without it too; the live names of the plain-torch layers are accepted as aliases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flagscale_convert.architecture import Architecture
from flagscale_convert.rules import Copy, Gated, Qkv, Rule, Vocab

__all__ = ["FAMILIES", "Family", "Fused"]

_HF = "model.layers.{i}."
_MC = "decoder.layers.{i}."


def _hidden(arch: Architecture) -> int:
    return arch.hidden_size


def _query(arch: Architecture) -> int:
    return arch.query_size


def _ffn(arch: Architecture) -> int:
    return arch.ffn_size


def _expert_ffn(arch: Architecture) -> int:
    return arch.experts.ffn_size if arch.experts is not None else 0


def _num_experts(arch: Architecture) -> int:
    return arch.experts.count if arch.experts is not None else 0


def _head(arch: Architecture) -> int:
    return arch.head_size


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"{_HF}self_attn.{part}_proj.{kind}" for part in "qkv")


_EMBEDDING = Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", Vocab(), _hidden)
_ATTENTION = (
    Rule(
        (_HF + "input_layernorm.weight",),
        _MC + "self_attention.linear_qkv.layer_norm_weight",
        Copy(_hidden),
        aliases=(_MC + "input_layernorm.weight",),
    ),
    Rule(_projections("weight"), _MC + "self_attention.linear_qkv.weight", Qkv(), _hidden),
    Rule(
        _projections("bias"),
        _MC + "self_attention.linear_qkv.bias",
        Qkv(),
        when=lambda arch: arch.has_qkv_bias,
    ),
    *(
        Rule(
            (f"{_HF}self_attn.{part}_norm.weight",),
            f"{_MC}self_attention.{part}_layernorm.weight",
            Copy(_head),
            when=lambda arch: arch.has_qk_norm,
        )
        for part in "qk"
    ),
    Rule(
        (_HF + "self_attn.o_proj.weight",), _MC + "self_attention.linear_proj.weight", Copy(_hidden), _query
    ),
)
_FFN = (
    Rule(
        (_HF + "post_attention_layernorm.weight",),
        _MC + "mlp.linear_fc1.layer_norm_weight",
        Copy(_hidden),
        aliases=(_MC + "pre_mlp_layernorm.weight",),
        layers="dense",
    ),
    Rule(
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        _MC + "mlp.linear_fc1.weight",
        Gated(_ffn),
        _hidden,
        layers="dense",
    ),
    Rule(
        (_HF + "mlp.down_proj.weight",),
        _MC + "mlp.linear_fc2.weight",
        Copy(_hidden),
        _ffn,
        layers="dense",
    ),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Give the rules of a layer of experts, by the names Hugging Face has for its parts.

    The norm before the experts has two names: Transformer Engine's layers keep it apart, the plain-torch ones
    save it as if it were fused into a first projection that no such layer has.
    """
    one, other = _HF + block + ".experts.{e}.", _MC + "mlp.experts.experts.{e}."
    return (
        Rule(
            (_HF + "post_attention_layernorm.weight",),
            _MC + "pre_mlp_layernorm.weight",
            Copy(_hidden),
            twins=(_MC + "mlp.linear_fc1.layer_norm_weight",),
            layers="experts",
        ),
        Rule(
            (_HF + block + ".gate.weight",),
            _MC + "mlp.router.weight",
            Copy(_num_experts),
            _hidden,
            layers="experts",
        ),
        Rule(
            (f"{one}{gate}.weight", f"{one}{up}.weight"),
            other + "linear_fc1.weight",
            Gated(_expert_ffn),
            _hidden,
            layers="experts",
        ),
        Rule(
            (f"{one}{down}.weight",),
            other + "linear_fc2.weight",
            Copy(_hidden),
            _expert_ffn,
            layers="experts",
        ),
    )


_NORM = Rule(("model.norm.weight",), "decoder.final_layernorm.weight", Copy(_hidden))
_HEAD = Rule(("lm_head.weight",), "output_layer.weight", Vocab(), _hidden, when=lambda arch: not arch.is_tied)
_DENSE = (_EMBEDDING, *_ATTENTION, *_FFN, _NORM, _HEAD)
_QWEN3_MOE = (
    _EMBEDDING,
    *_ATTENTION,
    *_FFN,
    *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
    _NORM,
    _HEAD,
)
_MIXTRAL = (_EMBEDDING, *_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2"), _NORM, _HEAD)


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor transformers keeps in memory for all experts, and what its parts are called in files."""

    name: str
    parts: tuple[str, ...]
    """Equal parts one behind the other; with `{e}` in the names, once per expert."""


def _fused(block: str, gate: str, up: str, down: str) -> tuple[Fused, ...]:
    one = _HF + block + ".experts.{e}."
    return (
        Fused(_HF + "mlp.experts.gate_up_proj", (f"{one}{gate}.weight", f"{one}{up}.weight")),
        Fused(_HF + "mlp.experts.down_proj", (f"{one}{down}.weight",)),
    )


_LOGITS = "logits of Megatron 0.19.2 and transformers 5.23, both directions"


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: its rules and the names Hugging Face has for it."""

    name: str
    architecture: str
    """The class in `config.json`'s `architectures`."""
    model_type: str
    models: str
    """Published models it covers, for people."""
    proven_by: str
    """What was run against what, for people."""
    rules: tuple[Rule, ...] = _DENSE
    other_architectures: tuple[str, ...] = ()
    """Classes of the same tensors and the same function; read, never written."""
    fused: tuple[Fused, ...] = ()
    dropped: tuple[str, ...] = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
    """Hugging Face tensors that carry nothing: they follow from the configuration."""


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            "llama",
            "Llama 2, 3, 3.1, Aquila2 and models of the same shape",
            f"{_LOGITS}, TP 1 and 2 (Aquila2 by its configuration only)",
            other_architectures=("AquilaForCausalLM", "AquilaModel"),
        ),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5, QwQ (dense)", f"{_LOGITS}, TP 1 and 2"),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", "Qwen3 (dense)", f"{_LOGITS}, TP 1 and 2"),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            "Qwen3-30B-A3B, Qwen3-235B-A22B",
            f"{_LOGITS}, EP 1 and 2",
            rules=_QWEN3_MOE,
            fused=_fused("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            "mixtral",
            "Mixtral 8x7B, 8x22B",
            f"{_LOGITS}, EP 1 and 2",
            rules=_MIXTRAL,
            fused=(
                Fused(_HF + "mlp.gate.weight", (_HF + "block_sparse_moe.gate.weight",)),
                *_fused("block_sparse_moe", "w1", "w3", "w2"),
            ),
        ),
    )
}
