"""A model read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.models.facts import ModelFacts
from flagscale_config.models.parts import (
    Attention,
    Audio,
    DeltaNet,
    Experts,
    GroupedAttention,
    LatentAttention,
    Rwkv7,
    Vision,
)

__all__ = ["ARCHITECTURES", "read"]

ARCHITECTURES: Mapping[str, str] = {
    "AquilaForCausalLM": "aquila",
    "AquilaModel": "aquila",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "Grok1ForCausalLM": "grok",
    "Grok1ModelForCausalLM": "grok",
    "LlamaForCausalLM": "llama",
    "LlavaForConditionalGeneration": "llava",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3OmniMoeForConditionalGeneration": "qwen3_omni_moe",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "RWKV7ForCausalLM": "rwkv7",
}
"""The architectures that can be read, and the kind each is of."""

_KIND_OF_TYPE = {"kimi_k2": "deepseek_v3", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"} | {
    "qwen3_omni_moe_text": "qwen3_moe",
    **{kind: kind for kind in ARCHITECTURES.values()},
}
_WITH_QKV_BIAS = frozenset({"qwen2", "qwen2_5_vl"})
_WITH_QK_NORM = frozenset({"qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl"})
_TEXT_OF = {
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_omni_moe": "qwen3_moe",
    "llava_onevision": "qwen2",
}
_LLAMA = {  # what LlamaConfig assumes; the conversions of LLaVA rely on it
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


class _Config:
    """A `config.json`, or a section of it, whose missing numbers are all reported by name."""

    def __init__(self, content: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.content = {**(defaults or {}), **content}

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the first of several spellings that is there."""
        return next((self.content[key] for key in keys if self.content.get(key) is not None), default)

    def need(self, *keys: str) -> Any:
        """Return the first of several spellings that is there; one must be.

        Raises:
            ConfigError: none is.
        """
        value = self.get(*keys)
        if value is None:
            raise _problem(f"config.json: {keys[0]} is missing")
        return value


def read(config: Mapping[str, Any]) -> ModelFacts:
    """Return the facts of a model; see `ModelFacts.from_hugging_face`."""
    name, kind = _kind(config)
    outer = config.get("thinker_config", config)
    content = outer.get("text_config", outer)
    text_kind = _text_kind(kind, content)
    # Older files of a vision-language model hold the numbers of its text at the top.
    text = _Config(
        {"tie_word_embeddings": outer.get("tie_word_embeddings", False), **content},
        _LLAMA if kind == "llava" and text_kind == "llama" else None,
    )
    hidden = text.need("hidden_size")
    layers = text.need("num_hidden_layers")
    return ModelFacts(
        architecture=name,
        hidden_size=hidden,
        num_layers=layers,
        vocab_size=text.need("vocab_size"),
        ffn_size=text.get("intermediate_size", default=4 * hidden),
        attention=_attention(text, text_kind),
        linear_attention=_delta_net(text) if text_kind == "qwen3_next" else None,
        experts=_EXPERTS[text_kind](text, layers) if text_kind in _EXPERTS else None,
        num_mtp_layers=text.get("num_nextn_predict_layers", default=0),
        is_gated=text_kind != "rwkv7",
        activation=text.get("hidden_act", default="sqrelu" if text_kind == "rwkv7" else "silu"),
        has_ffn_bias=bool(text.get("mlp_bias", "use_bias", default=False)),
        normalization="LayerNorm" if text_kind == "rwkv7" else "RMSNorm",
        norm_eps=text.get("rms_norm_eps", "norm_eps", "layer_norm_eps", default=1e-6),
        norms_per_layer=4 if text_kind == "grok" else 2,
        is_tied=bool(text.get("tie_word_embeddings", default=False)),
        max_positions=text.get("max_position_embeddings"),
        **_positions(text, text_kind),
        vision=_vision(_Config(outer.get("vision_config") or {}), kind, hidden),
        audio=_audio(_Config(outer["audio_config"])) if outer.get("audio_config") else None,
    )


def _kind(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return class name and kind of a model.

    Raises:
        ConfigError: neither architecture nor model type is known.
    """
    given = config.get("architectures") or ()
    for name in given:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    kind = _KIND_OF_TYPE.get(str(config.get("model_type")))
    if kind is not None and not given:
        return next((name for name, known in ARCHITECTURES.items() if known == kind), ""), kind
    shown = ", ".join(given) or config.get("model_type") or "none given"
    known = ", ".join(sorted(ARCHITECTURES))
    raise _problem(f"config.json: architecture {shown} is not known; known: {known}")


def _text_kind(kind: str, text: Mapping[str, Any]) -> str:
    if kind == "llava" or kind in _TEXT_OF:
        named = _KIND_OF_TYPE.get(str(text.get("model_type")), "")
        return _TEXT_OF.get(named, named) or _TEXT_OF.get(kind, "llama")
    return kind


def _attention(text: _Config, kind: str) -> Attention:
    if kind == "rwkv7":
        return _rwkv(text)
    heads = text.need("num_attention_heads")
    if kind == "deepseek_v3":
        return LatentAttention(
            num_heads=heads,
            q_rank=text.get("q_lora_rank"),
            kv_rank=text.need("kv_lora_rank"),
            nope_dim=text.need("qk_nope_head_dim"),
            rope_dim=text.need("qk_rope_head_dim"),
            v_dim=text.need("v_head_dim"),
        )
    has_bias = bool(text.get("attention_bias", "use_bias", default=False))
    return GroupedAttention(
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads", default=heads),
        head_dim=text.get("head_dim", default=_head_dim(text, kind, heads)),
        has_qkv_bias=has_bias or kind in _WITH_QKV_BIAS,
        has_out_bias=has_bias and kind not in _WITH_QKV_BIAS,
        has_qk_norm=kind in _WITH_QK_NORM,
        has_gate=kind == "qwen3_next",
    )


def _head_dim(text: _Config, kind: str, heads: int) -> int:
    """Return the width of a head where the file leaves it to the class."""
    special = {"qwen3": 128, "qwen3_moe": 128, "qwen3_next": 256}
    return special.get(kind) or int(text.need("hidden_size") // heads)


def _rwkv(text: _Config) -> Rwkv7:
    head_dim = text.get("head_dim", default=64)
    return Rwkv7(
        num_heads=text.need("hidden_size") // head_dim,
        head_dim=head_dim,
        decay_rank=text.need("decay_low_rank_dim"),
        a_rank=text.need("a_low_rank_dim"),
        v_rank=text.need("v_low_rank_dim"),
        gate_rank=text.need("gate_low_rank_dim"),
    )


def _delta_net(text: _Config) -> DeltaNet:
    return DeltaNet(
        num_key_heads=text.need("linear_num_key_heads"),
        num_value_heads=text.need("linear_num_value_heads"),
        key_dim=text.need("linear_key_head_dim"),
        value_dim=text.need("linear_value_head_dim"),
        conv_kernel=text.need("linear_conv_kernel_dim"),
        full_attention_interval=text.get("full_attention_interval", default=4),
    )


def _deepseek_experts(text: _Config, layers: int) -> Experts:
    dense = text.get("first_k_dense_replace", default=0)
    every = text.get("moe_layer_freq", default=1)
    width = text.need("moe_intermediate_size")
    return Experts(
        num_experts=text.need("n_routed_experts"),
        experts_per_token=text.need("num_experts_per_tok"),
        ffn_size=width,
        shared_size=width * text.get("n_shared_experts", default=0),
        dense_layers=tuple(layer for layer in range(layers) if layer < dense or layer % every),
        score_function=text.get("scoring_func", default="sigmoid"),
        scaling_factor=text.get("routed_scaling_factor", default=1.0),
        num_groups=text.get("n_group", default=1),
        groups_per_token=text.get("topk_group", default=1),
        has_expert_bias=text.get("topk_method", default="noaux_tc") == "noaux_tc",
        aux_loss_coeff=text.get("aux_loss_alpha", default=0.0),
    )


def _qwen_experts(text: _Config, layers: int) -> Experts:
    step = text.get("decoder_sparse_step", default=1)
    dense = set(text.get("mlp_only_layers", default=()))
    shared = text.get("shared_expert_intermediate_size", default=0)
    return Experts(
        num_experts=text.need("num_experts", "num_local_experts"),
        experts_per_token=text.need("num_experts_per_tok"),
        ffn_size=text.need("moe_intermediate_size"),
        shared_size=shared,
        has_shared_gate=bool(shared),
        dense_layers=tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % step),
        aux_loss_coeff=text.get("router_aux_loss_coef", default=0.0),
    )


def _mixtral_experts(text: _Config, layers: int) -> Experts:  # noqa: ARG001 - the same call as the others
    return Experts(
        num_experts=text.need("num_local_experts"),
        experts_per_token=text.need("num_experts_per_tok"),
        ffn_size=text.need("intermediate_size"),
        aux_loss_coeff=text.get("router_aux_loss_coef", default=0.0),
    )


def _grok_experts(text: _Config, layers: int) -> Experts:  # noqa: ARG001 - the same call as the others
    return Experts(
        num_experts=text.need("num_local_experts", "num_experts"),
        experts_per_token=text.need("num_experts_per_tok"),
        ffn_size=text.get("moe_intermediate_size", default=text.need("intermediate_size")),
        shared_size=text.need("intermediate_size") if text.get("residual_moe") else 0,
    )


def _ernie_experts(text: _Config, layers: int) -> Experts:
    first, last = text.get("moe_layer_start_index", default=0), text.get("moe_layer_end_index", default=-1)
    last = layers - 1 if last < 0 else last
    every = text.get("moe_layer_interval", default=1)
    width = text.need("moe_intermediate_size")
    return Experts(
        num_experts=text.need("moe_num_experts"),
        experts_per_token=text.need("moe_k"),
        ffn_size=width,
        shared_size=width * text.get("moe_num_shared_experts", default=0),
        dense_layers=tuple(
            layer for layer in range(layers) if not first <= layer <= last or (layer + 1) % every
        ),
        has_expert_bias=True,
    )


_EXPERTS: Mapping[str, Callable[[_Config, int], Experts]] = {
    "deepseek_v3": _deepseek_experts,
    "ernie4_5_moe": _ernie_experts,
    "grok": _grok_experts,
    "mixtral": _mixtral_experts,
    "qwen3_moe": _qwen_experts,
    "qwen3_next": _qwen_experts,
}


def _positions(text: _Config, kind: str) -> dict[str, Any]:
    """Return the fields of `ModelFacts` about positions."""
    if kind == "rwkv7":
        return {}
    rope = text.get("rope_parameters", "rope_scaling", default={})
    theta = rope.get("rope_theta") or text.get("rope_theta", default=10000.0)
    scaling = {key: value for key, value in rope.items() if key not in {"rope_theta", "type", "rope_type"}}
    name = "mrope" if "mrope_section" in scaling else rope.get("rope_type", rope.get("type", "default"))
    percent = scaling.pop("partial_rotary_factor", None) or text.get("partial_rotary_factor", default=1.0)
    return {
        "rope_theta": float(theta),
        "rope_scaling": None if name == "default" else {"rope_type": name, **scaling},
        "rope_percent": percent,
    }


def _vision(vision: _Config, kind: str, hidden: int) -> Vision | None:
    if kind in {"llava", "llava_onevision"}:
        return _image_tower(vision, kind, hidden)
    if kind not in {"qwen2_5_vl", "qwen3_vl", "qwen3_omni_moe"}:
        return None
    is_first = kind == "qwen2_5_vl"
    return Vision(
        kind="qwen2_5_vl" if is_first else "qwen3_vl",
        depth=vision.get("depth", default=32 if is_first else 27),
        hidden_size=vision.need("hidden_size"),
        ffn_size=vision.get("intermediate_size", default=3420 if is_first else None)
        or vision.need("intermediate_size"),
        num_heads=vision.get("num_heads", default=16),
        patch_size=vision.get("patch_size", "spatial_patch_size", default=14 if is_first else 16),
        out_size=vision.get("out_hidden_size", default=hidden),
        num_positions=0 if is_first else vision.get("num_position_embeddings", default=2304),
        temporal_patch_size=vision.get("temporal_patch_size", default=2),
        merge_size=vision.get("spatial_merge_size", default=2),
        deepstack_layers=() if is_first else tuple(vision.get("deepstack_visual_indexes", default=())),
    )


def _image_tower(vision: _Config, kind: str, hidden: int) -> Vision:
    is_clip = vision.get("model_type", default="clip_vision_model").startswith("clip")
    size, patch = vision.get("image_size", default=336), vision.get("patch_size", default=14)
    return Vision(
        kind="clip" if is_clip else "siglip",
        depth=vision.need("num_hidden_layers"),
        hidden_size=vision.need("hidden_size"),
        ffn_size=vision.need("intermediate_size"),
        num_heads=vision.need("num_attention_heads"),
        patch_size=patch,
        out_size=hidden,
        image_size=size,
        num_positions=(size // patch) ** 2 + is_clip,
        has_newline=kind == "llava_onevision",
    )


def _audio(audio: _Config) -> Audio:
    return Audio(
        hidden_size=audio.need("d_model"),
        depth=audio.need("encoder_layers"),
        ffn_size=audio.need("encoder_ffn_dim"),
        num_heads=audio.need("encoder_attention_heads"),
        num_mel_bins=audio.need("num_mel_bins"),
        conv_channels=audio.need("downsample_hidden_size"),
        out_size=audio.need("output_dim"),
    )


def _problem(message: str) -> ConfigError:
    return ConfigError([Problem(code="config/model", message=message)])
