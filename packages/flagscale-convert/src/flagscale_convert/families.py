"""The families: one table of rules each, data only.

Names on the Megatron side are those its checkpoints carry with Transformer Engine and, for models whose
layers are alike, without it too; the live names of the plain-torch layers are accepted as aliases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flagscale_convert.architecture import Architecture
from flagscale_convert.rules import Copy, Gated, Qkv, Rule, Vocab

__all__ = ["FAMILIES", "Family"]

_HF = "model.layers.{i}."
_MC = "decoder.layers.{i}."


def _hidden(arch: Architecture) -> int:
    return arch.hidden_size


def _query(arch: Architecture) -> int:
    return arch.query_size


def _ffn(arch: Architecture) -> int:
    return arch.ffn_size


def _head(arch: Architecture) -> int:
    return arch.head_size


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"{_HF}self_attn.{part}_proj.{kind}" for part in "qkv")


_EMBEDDING = Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", Vocab(), _hidden)
_LAYER = (
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
    Rule(
        (_HF + "post_attention_layernorm.weight",),
        _MC + "mlp.linear_fc1.layer_norm_weight",
        Copy(_hidden),
        aliases=(_MC + "pre_mlp_layernorm.weight",),
    ),
    Rule(
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        _MC + "mlp.linear_fc1.weight",
        Gated(),
        _hidden,
    ),
    Rule((_HF + "mlp.down_proj.weight",), _MC + "mlp.linear_fc2.weight", Copy(_hidden), _ffn),
)
_NORM = Rule(("model.norm.weight",), "decoder.final_layernorm.weight", Copy(_hidden))
_HEAD = Rule(("lm_head.weight",), "output_layer.weight", Vocab(), _hidden, when=lambda arch: not arch.is_tied)
_DENSE = (_EMBEDDING, *_LAYER, _NORM, _HEAD)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: its rules and the names Hugging Face has for it."""

    name: str
    architecture: str
    """The class in `config.json`'s `architectures`."""
    model_type: str
    models: str
    """Published models it covers, for people."""
    rules: tuple[Rule, ...] = _DENSE
    dropped: tuple[str, ...] = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
    """Hugging Face tensors that carry nothing: they follow from the configuration."""


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama", "Llama 2, 3, 3.1 and models of the same shape"),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5, QwQ (dense)"),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", "Qwen3 (dense)"),
    )
}
