"""The families: one table of rules each, data only.

Names on the Megatron side are those its checkpoints carry with Transformer Engine and, for models whose
layers are alike, without it too; the live names of the plain-torch layers are accepted as aliases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from types import MappingProxyType

from flagscale_convert.architecture import Architecture, LatentAttention
from flagscale_convert.description import Description
from flagscale_convert.errors import Unsupported
from flagscale_convert.multimodal import Multimodal
from flagscale_convert.rules import Copy, Gated, Qkv, Rule, Size, Vocab
from flagscale_convert.rwkv import RWKV7, RWKV7_RULES, RWKV7_UNUSED
from flagscale_convert.towers import (
    LLAVA,
    LLAVA_ONEVISION,
    LLAVA_ONEVISION_TOWER,
    LLAVA_TOWER,
    QWEN2_5_VL,
    QWEN2_5_VL_TOWER,
    QWEN3_OMNI,
    QWEN3_OMNI_TOWERS,
    QWEN3_VL,
    QWEN3_VL_MOE,
    QWEN3_VL_TOWER,
    under,
)

__all__ = ["ENTRY_POINTS", "FAMILIES", "Family", "Fused"]

ENTRY_POINTS = "flagscale_convert.families"
"""Group under which another package registers a `Family` of its own."""
_HF = "model.layers.{i}."
_MC = "decoder.layers.{i}."


def _hidden(arch: Architecture) -> int:
    return arch.hidden_size


def _query(arch: Architecture) -> int:
    return arch.query_size


def _context(arch: Architecture) -> int:
    return arch.context_size


def _latent(size: Callable[[LatentAttention], int]) -> Size:
    """Take a size from the latent attention."""
    return lambda arch: 0 if arch.latent is None else size(arch.latent)


_query_rank = _latent(lambda latent: latent.query_rank or 0)
_kv_rank = _latent(lambda latent: latent.kv_rank)
_kv_down = _latent(lambda latent: latent.kv_rank + latent.rotary_size)


def _kv_up(arch: Architecture) -> int:
    return 0 if arch.latent is None else arch.num_heads * (arch.latent.plain_size + arch.latent.value_size)


def _shared_ffn(arch: Architecture) -> int:
    return arch.experts.shared_size if arch.experts is not None else 0


def _has_query_rank(arch: Architecture) -> bool:
    return arch.latent is not None and arch.latent.query_rank is not None


def _has_no_query_rank(arch: Architecture) -> bool:
    return not _has_query_rank(arch)


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


_LATENT_ATTENTION = (
    Rule((_HF + "input_layernorm.weight",), _MC + "input_layernorm.weight", Copy(_hidden)),
    Rule(
        (_HF + "self_attn.q_proj.weight",),
        _MC + "self_attention.linear_q_proj.weight",
        Copy(_query),
        _hidden,
        when=_has_no_query_rank,
    ),
    Rule(
        (_HF + "self_attn.q_a_proj.weight",),
        _MC + "self_attention.linear_q_down_proj.weight",
        Copy(_query_rank),
        _hidden,
        when=_has_query_rank,
    ),
    # Transformer Engine fuses the norms of the latents into what follows, plain-torch layers keep them apart.
    Rule(
        (_HF + "self_attn.q_a_layernorm.weight",),
        _MC + "self_attention.linear_q_up_proj.layer_norm_weight",
        Copy(_query_rank),
        twins=(_MC + "self_attention.q_layernorm.weight",),
        when=_has_query_rank,
    ),
    Rule(
        (_HF + "self_attn.q_b_proj.weight",),
        _MC + "self_attention.linear_q_up_proj.weight",
        Copy(_query),
        _query_rank,
        when=_has_query_rank,
    ),
    Rule(
        (_HF + "self_attn.kv_a_proj_with_mqa.weight",),
        _MC + "self_attention.linear_kv_down_proj.weight",
        Copy(_kv_down),
        _hidden,
    ),
    Rule(
        (_HF + "self_attn.kv_a_layernorm.weight",),
        _MC + "self_attention.linear_kv_up_proj.layer_norm_weight",
        Copy(_kv_rank),
        twins=(_MC + "self_attention.kv_layernorm.weight",),
    ),
    Rule(
        (_HF + "self_attn.kv_b_proj.weight",),
        _MC + "self_attention.linear_kv_up_proj.weight",
        Copy(_kv_up),
        _kv_rank,
    ),
    Rule(
        (_HF + "self_attn.o_proj.weight",),
        _MC + "self_attention.linear_proj.weight",
        Copy(_hidden),
        _context,
    ),
)
_SHARED_EXPERTS = (
    Rule(
        (_HF + "mlp.gate.e_score_correction_bias",),
        _MC + "mlp.router.expert_bias",
        Copy(_num_experts),
        layers="experts",
        is_float32=True,
    ),
    Rule(
        (_HF + "mlp.shared_experts.gate_proj.weight", _HF + "mlp.shared_experts.up_proj.weight"),
        _MC + "mlp.shared_experts.linear_fc1.weight",
        Gated(_shared_ffn),
        _hidden,
        layers="experts",
    ),
    Rule(
        (_HF + "mlp.shared_experts.down_proj.weight",),
        _MC + "mlp.shared_experts.linear_fc2.weight",
        Copy(_hidden),
        _shared_ffn,
        layers="experts",
    ),
)
_MTP = "mtp.layers.{k}."


def _in_mtp(rule: Rule) -> Rule:
    """Give the rule of a layer that predicts a further token, which holds a layer like the last one."""

    def inner(name: str, block: str = "transformer_layer.") -> str:
        return name.replace(_MC, _MTP + block)

    return replace(
        rule,
        megatron=inner(rule.megatron),
        # The live name since megatron-core 0.17; checkpoints keep the old one.
        aliases=(*map(inner, rule.aliases), inner(rule.megatron, "mtp_model_layer.")),
        twins=tuple(map(inner, rule.twins)),
        layers="mtp",
    )


def _mtp(layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Give the rules of the layers that predict further tokens (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Embedding and output layer are the model's own; published weights carry copies of them.
    """
    return (
        Rule(
            (_HF + "embed_tokens.weight",),
            "embedding.word_embeddings.weight",
            Vocab(),
            _hidden,
            layers="mtp",
            is_copy=True,
        ),
        Rule((_HF + "enorm.weight",), _MTP + "enorm.weight", Copy(_hidden), layers="mtp"),
        Rule((_HF + "hnorm.weight",), _MTP + "hnorm.weight", Copy(_hidden), layers="mtp"),
        Rule(
            (_HF + "eh_proj.weight",),
            _MTP + "eh_proj.weight",
            Copy(_hidden),
            lambda arch: 2 * arch.hidden_size,
            layers="mtp",
        ),
        *(_in_mtp(rule) for rule in layer if rule.layers != "dense"),
        Rule(
            (_HF + "shared_head.norm.weight",),
            _MTP + "final_layernorm.weight",
            Copy(_hidden),
            layers="mtp",
        ),
        Rule(
            (_HF + "shared_head.head.weight",),
            "output_layer.weight",
            Vocab(),
            _hidden,
            layers="mtp",
            when=lambda arch: not arch.is_tied,
            is_copy=True,
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
# Without Transformer Engine, layers with latent attention call the norm of a plain network by its live name.
_LATENT_FFN = tuple(replace(rule, aliases=(), twins=rule.aliases) if rule.aliases else rule for rule in _FFN)
_DEEPSEEK_LAYER = (
    *_LATENT_ATTENTION,
    *_LATENT_FFN,
    *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
    *_SHARED_EXPERTS,
)
_DEEPSEEK = (_EMBEDDING, *_DEEPSEEK_LAYER, *_mtp(_DEEPSEEK_LAYER), _NORM, _HEAD)
_MIXTRAL = (_EMBEDDING, *_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2"), _NORM, _HEAD)


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor kept in one, by transformers for all experts for example, and what its parts are called."""

    name: str
    parts: tuple[str, ...]
    """Equal parts one behind the other; with `{e}` in the names, once per expert."""


def _fused(block: str, gate: str, up: str, down: str) -> tuple[Fused, ...]:
    one = _HF + block + ".experts.{e}."
    return (
        Fused(_HF + "mlp.experts.gate_up_proj", (f"{one}{gate}.weight", f"{one}{up}.weight")),
        Fused(_HF + "mlp.experts.down_proj", (f"{one}{down}.weight",)),
    )


def _in_qwen3_vl(name: str) -> str:
    return re.sub(r"^model\.", "model.language_model.", name)


# What transformers calls these tensors in memory, since 4.52 and since 5; files have the names of the hub.
_LLAVA_PREFIXES = (
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
# The numbers from 0 on, which old files have.
_POSITION_IDS = "vision_tower.vision_model.embeddings.position_ids"
_LOGITS = "logits of Megatron 0.16.1 and 0.19.2 and transformers 5.24, both directions"
_PARTS = (
    "bits there and back, TP 2 and PP 2 included, and what transformers 5.24 computes from an image"
    " before and after"
)
_NO_MEGATRON = "; unproven against Megatron, whose classes for it are in no wheel"
_DENSE_LAYOUTS = "1 rank and TP2 x PP2"
_EXPERT_LAYOUTS = "1 rank, TP2 x PP2 and PP2 x EP2"


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
    like: str = ""
    """The built-in family whose configuration it has on both sides; others' families need one."""
    is_fused_in_files: bool = False
    """True when published files have its experts fused, as (experts, inputs, outputs)."""
    own_code: tuple[str, ...] = ()
    """Modules beside published weights (`auto_map`) known to compute what the transformers class does."""
    dropped: tuple[str, ...] = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
    """Hugging Face tensors that carry nothing: they follow from the configuration."""
    unused: tuple[str, ...] = ()
    """Hugging Face tensors that no output depends on, and that Megatron's model has no place for."""
    beyond: tuple[str, ...] = ()
    """What stands before the names of tensors of a larger model that are no part of this one."""
    multimodal: Multimodal | None = None
    """What it has beyond a language model; None for most."""
    description: Description | None = None
    """Its configuration, where that has nothing in common with the others'; None for most."""
    prefixes: tuple[tuple[str, str], ...] = ()
    """Patterns of names other versions of transformers gave its tensors, and what stands for them here."""

    @property
    def base(self) -> str:
        """Name of the family whose configuration this one has."""
        return self.like or self.name


_BUILT_IN = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            "llama",
            "Llama 2, 3, 3.1, Aquila2 and models of the same shape",
            f"{_LOGITS}, {_DENSE_LAYOUTS} (Aquila2 by its configuration only)",
            other_architectures=("AquilaForCausalLM", "AquilaModel"),
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            "qwen2",
            "Qwen2, Qwen2.5, QwQ (dense)",
            f"{_LOGITS}, {_DENSE_LAYOUTS}",
        ),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", "Qwen3 (dense)", f"{_LOGITS}, {_DENSE_LAYOUTS}"),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            "Qwen3-30B-A3B, Qwen3-235B-A22B",
            f"{_LOGITS}, {_EXPERT_LAYOUTS}",
            rules=_QWEN3_MOE,
            fused=_fused("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            "mixtral",
            "Mixtral 8x7B, 8x22B",
            f"{_LOGITS}, {_EXPERT_LAYOUTS}",
            rules=_MIXTRAL,
            fused=(
                Fused(_HF + "mlp.gate.weight", (_HF + "block_sparse_moe.gate.weight",)),
                *_fused("block_sparse_moe", "w1", "w3", "w2"),
            ),
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            "DeepSeek-V3, R1, Moonlight, Kimi-K2",
            f"{_LOGITS}, {_EXPERT_LAYOUTS}, further-token layers included",
            rules=_DEEPSEEK,
            fused=_fused("mlp", "gate_proj", "up_proj", "down_proj"),
            own_code=("configuration_deepseek", "modeling_deepseek"),
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            "qwen2_5_vl",
            "Qwen2.5-VL",
            _PARTS + _NO_MEGATRON,
            rules=(*under(_DENSE, str, "language_model."), *QWEN2_5_VL_TOWER),
            like="qwen2",
            multimodal=QWEN2_5_VL,
            prefixes=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
        ),
        Family(
            "llava",
            "LlavaForConditionalGeneration",
            "llava",
            "LLaVA-1.5",
            f"{_PARTS}; Megatron 0.19.2's own LLaVAModel loads it and computes the same, one rank",
            rules=(*under(_DENSE, "language_model.".__add__, "language_model."), *LLAVA_TOWER),
            like="llama",
            multimodal=LLAVA,
            prefixes=_LLAVA_PREFIXES,
            # Features are taken from a layer before the last; the norm behind the last one serves nothing.
            unused=(
                *(f"vision_tower.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")),
                _POSITION_IDS,
            ),
            dropped=("language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq",),
        ),
        Family(
            "llava_onevision",
            "LlavaOnevisionForConditionalGeneration",
            "llava_onevision",
            "LLaVA-OneVision",
            _PARTS + _NO_MEGATRON,
            rules=(*under(_DENSE, "language_model.".__add__, "language_model."), *LLAVA_ONEVISION_TOWER),
            like="qwen2",
            multimodal=LLAVA_ONEVISION,
            prefixes=_LLAVA_PREFIXES,
            unused=(_POSITION_IDS,),
        ),
        Family(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            "qwen3_vl",
            "Qwen3-VL (dense)",
            _PARTS + _NO_MEGATRON,
            rules=(*under(_DENSE, _in_qwen3_vl, "language_model."), *QWEN3_VL_TOWER),
            like="qwen3",
            multimodal=QWEN3_VL,
        ),
        Family(
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
            "qwen3_vl_moe",
            "Qwen3-VL-30B-A3B, 235B-A22B",
            _PARTS + _NO_MEGATRON,
            rules=(*under(_QWEN3_MOE, _in_qwen3_vl, "language_model."), *QWEN3_VL_TOWER),
            fused=tuple(
                Fused(_in_qwen3_vl(one.name), tuple(map(_in_qwen3_vl, one.parts)))
                for one in _fused("mlp", "gate_proj", "up_proj", "down_proj")
            ),
            is_fused_in_files=True,
            like="qwen3_moe",
            multimodal=QWEN3_VL_MOE,
        ),
        Family(
            "qwen3_omni_thinker",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            "qwen3_omni_moe_thinker",
            "Qwen3-Omni's thinker",
            _PARTS + _NO_MEGATRON,
            rules=(*under(_QWEN3_MOE, str, "thinker.language_model."), *QWEN3_OMNI_TOWERS),
            other_architectures=("Qwen3OmniMoeForConditionalGeneration",),
            fused=_fused("mlp", "gate_proj", "up_proj", "down_proj"),
            like="qwen3_moe",
            multimodal=QWEN3_OMNI,
            prefixes=((r"^thinker\.", ""),),
            beyond=("talker.", "code2wav."),
        ),
        Family(
            "rwkv7",
            "RWKV7ForCausalLM",
            "rwkv7",
            "RWKV-7 (Goose, x070)",
            "bits there and back, and both sides' formulas token by token; flash-linear-attention 0.6's class"
            " and FlagScale's load it and compute the same on the CPU, their GPU kernels replaced",
            rules=RWKV7_RULES,
            # One tensor in the first version of the class, which its loader still takes apart.
            fused=(Fused(_HF + "attn.x_x", tuple(f"{_HF}attn.x_{letter}" for letter in "rwkvag")),),
            own_code=("modeling_rwkv7",),
            dropped=(),
            unused=RWKV7_UNUSED,
            description=RWKV7,
        ),
    )
}


def _with_installed(built_in: Mapping[str, Family]) -> Mapping[str, Family]:
    """Add the families that other installed packages register.

    Raises:
        Unsupported: an entry point that is no family, or takes a name that is there.
    """
    known = dict(built_in)
    for entry in entry_points(group=ENTRY_POINTS):
        family = entry.load()
        where = f"entry point {entry.name} of {ENTRY_POINTS} ({entry.value})"
        if not isinstance(family, Family):
            raise Unsupported(f"{where}: is a {type(family).__name__}: a flagscale_convert.Family is needed")
        alone = [name for name, one in built_in.items() if not one.like and one.description is None]
        if family.name in known or family.like not in alone:
            raise Unsupported(
                f"{where}: family {family.name} like {family.like or None}: its name must be new"
                f" and it must be like one of {', '.join(alone)}: uninstall or mend the package"
            )
        known[family.name] = family
    return MappingProxyType(known)


FAMILIES: Mapping[str, Family] = _with_installed(_BUILT_IN)
"""Every family by name: those here, then those of other installed packages."""
