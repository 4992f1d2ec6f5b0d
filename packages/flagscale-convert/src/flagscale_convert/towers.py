"""The families' towers and what joins them to the language model: rules and sections, data only.

Sources of the names on Megatron's side: megatron-core's `LLaVAModel`, `CLIPViTModel` and
`MultimodalProjector`; FlagScale's `Qwen2_5VLModel`, `LLaVAOneVisionModel` and its converters of Qwen2.5-VL
and Qwen3-VL (after Pai-Megatron-Patch), the names users have. Names of Megatron-Bridge are read as aliases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flagscale_convert.architecture import Architecture, Tower
from flagscale_convert.multimodal import Multimodal, Section, square_root
from flagscale_convert.rules import Copy, Gated, Rule, Size, TowerQkv
from flagscale_convert.tensors import TensorInfo

__all__ = [
    "LLAVA",
    "LLAVA_ONEVISION",
    "LLAVA_ONEVISION_TOWER",
    "LLAVA_TOWER",
    "QWEN2_5_VL",
    "QWEN2_5_VL_TOWER",
    "QWEN3_OMNI",
    "QWEN3_OMNI_TOWERS",
    "QWEN3_VL",
    "QWEN3_VL_MOE",
    "QWEN3_VL_TOWER",
    "under",
]

_LAYER = "vision_model.decoder.layers.{i}."


def under(rules: tuple[Rule, ...], hf: Callable[[str], str], megatron: str) -> tuple[Rule, ...]:
    """Give a language model's rules for one that is a part of a larger model.

    Args:
        rules: of the model alone.
        hf: tells the name of a tensor on the Hugging Face side.
        megatron: what stands before names on Megatron's.
    """

    def there(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(megatron + name for name in names)

    return tuple(
        replace(
            rule,
            hf=tuple(map(hf, rule.hf)),
            megatron=megatron + rule.megatron,
            aliases=there(rule.aliases),
            twins=there(rule.twins),
        )
        for rule in rules
    )


def _vision(arch: Architecture) -> Tower | None:
    return arch.vision


def _of_vision(size: Callable[[Tower], int]) -> Size:
    return lambda arch: 0 if arch.vision is None else size(arch.vision)


_width = _of_vision(lambda tower: tower.hidden_size)
_ffn = _of_vision(lambda tower: tower.ffn_size)
_merged = _of_vision(lambda tower: tower.hidden_size * tower.size("spatial_merge_size") ** 2)


def _text_width(arch: Architecture) -> int:
    return arch.hidden_size


def _patch(arch: Architecture) -> tuple[int, ...]:
    """Axes of a patch behind the first: channels, frames where there are any, height, width."""
    if arch.vision is None:
        return ()
    fields = arch.vision.fields
    frames = (fields["temporal_patch_size"],) if "temporal_patch_size" in fields else ()
    side = fields["patch_size"]
    return (arch.vision.size("in_channels", "num_channels"), *frames, side, side)


def _count(infos: Mapping[str, TensorInfo], head: str) -> int:
    """Count the layers whose names begin so."""
    return len({name.removeprefix(head).split(".")[0] for name in infos if name.startswith(head)})


def _both(hf: str, megatron: str, rows: Size, columns: Any = None, **options: Any) -> tuple[Rule, ...]:
    """Give the rules of a weight and its bias, of which only the weight has columns."""
    aliases = options.pop("aliases", ())
    return tuple(
        Rule(
            (f"{hf}.{kind}",),
            megatron.format(i="{i}", kind=kind),
            Copy(rows),
            columns if kind == "weight" else None,
            aliases=tuple(alias.format(i="{i}", kind=kind) for alias in aliases),
            **options,
        )
        for kind in ("weight", "bias")
    )


def _in_layers(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(replace(rule, layers="vision") for rule in rules)


_BLOCK = "visual.blocks.{i}."
_PUBLISHED_VISION = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
_IDS = {"image_token_id": 151655, "video_token_id": 151656, **_PUBLISHED_VISION}

QWEN2_5_VL_TOWER = (
    Rule(("visual.patch_embed.proj.weight",), "vision_model.patch_embed.proj.weight", Copy(_width), _patch),
    *_in_layers(
        (
            Rule(
                (_BLOCK + "norm1.weight",),
                _LAYER + "self_attention.linear_qkv.layer_norm_weight",
                Copy(_width),
                aliases=(_LAYER + "input_layernorm.weight",),
            ),
            Rule(
                (_BLOCK + "attn.qkv.weight",),
                _LAYER + "self_attention.linear_qkv.weight",
                TowerQkv(_vision, 1),
                _width,
            ),
            Rule(
                (_BLOCK + "attn.qkv.bias",), _LAYER + "self_attention.linear_qkv.bias", TowerQkv(_vision, 1)
            ),
            *_both(_BLOCK + "attn.proj", _LAYER + "self_attention.linear_proj.{kind}", _width, _width),
            Rule(
                (_BLOCK + "norm2.weight",),
                _LAYER + "mlp.linear_fc1.layer_norm_weight",
                Copy(_width),
                aliases=(_LAYER + "pre_mlp_layernorm.weight",),
            ),
            Rule(
                (_BLOCK + "mlp.gate_proj.weight", _BLOCK + "mlp.up_proj.weight"),
                _LAYER + "mlp.linear_fc1.weight",
                Gated(_ffn),
                _width,
            ),
            Rule(
                (_BLOCK + "mlp.gate_proj.bias", _BLOCK + "mlp.up_proj.bias"),
                _LAYER + "mlp.linear_fc1.bias",
                Gated(_ffn),
            ),
            *_both(_BLOCK + "mlp.down_proj", _LAYER + "mlp.linear_fc2.{kind}", _width, _ffn),
        )
    ),
    Rule(("visual.merger.ln_q.weight",), "vision_model.decoder.final_layernorm.weight", Copy(_width)),
    *_both("visual.merger.mlp.0", "vision_model.projection.encoder.linear_fc1.{kind}", _merged, _merged),
    *_both("visual.merger.mlp.2", "vision_model.projection.encoder.linear_fc2.{kind}", _text_width, _merged),
)


def _measure_qwen(infos: Mapping[str, TensorInfo], *, is_gated: bool) -> dict[str, int]:
    """Measure a tower of Qwen's, whose last merger FlagScale and Megatron-Bridge call differently."""
    patch = infos["vision_model.patch_embed.proj.weight"].shape
    first = infos["vision_model.decoder.layers.0.mlp.linear_fc1.weight"]
    names = ("vision_model.projection.encoder", "vision_model.merger")
    merger = next(
        infos[f"{name}.linear_fc2.weight"] for name in names if f"{name}.linear_fc2.weight" in infos
    ).shape
    return {
        "depth": _count(infos, "vision_model.decoder.layers."),
        "hidden_size": patch[0],
        "in_channels": patch[1],
        "temporal_patch_size": patch[2],
        "patch_size": patch[3],
        "intermediate_size": first.rows // 2 if is_gated else first.rows,
        "out_hidden_size": merger[0],
        "spatial_merge_size": square_root(merger[1], patch[0]),
    }


def _qwen_options(arch: Architecture) -> dict[str, Any]:
    """Give the options of FlagScale's scripts that train these models."""
    if arch.vision is None:
        return {}
    names = ("patch_size", "temporal_patch_size", "spatial_merge_size")
    return {name: arch.vision.fields[name] for name in names}


QWEN2_5_VL = Multimodal(
    text_type="qwen2_5_vl_text",
    vision=Section(
        model_type="qwen2_5_vl_vision",
        other_types=("qwen2_5_vl",),
        defaults={
            "depth": 32,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_act": "silu",
            "hidden_size": 3584,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 4,
            "window_size": 112,
        },
        only={"hidden_act": ("silu",)},
        published={"tokens_per_second": 2},
        measure=lambda infos: _measure_qwen(infos, is_gated=True),
    ),
    outer=_IDS,
    mark="vision_model.patch_embed.proj.weight",
    published_mrope=(16, 24, 24),
    options=_qwen_options,
)


def _norm(hf: str, fused: str, alone: str, *, is_saved_apart: bool = True) -> tuple[Rule, ...]:
    """Give the rules of a layer's norm, which plain-torch layers keep apart, and some also save apart."""

    def rule(kind: str) -> Rule:
        apart = (f"{_LAYER}{alone}.{kind}",)
        return Rule(
            (f"{hf}.{kind}",),
            f"{_LAYER}{fused}.layer_norm_{kind}",
            Copy(_width),
            twins=apart if is_saved_apart else (),
            aliases=() if is_saved_apart else apart,
            layers="vision",
        )

    return tuple(map(rule, ("weight", "bias")))


_CLIP = "vision_tower.vision_model."
_CLIP_LAYER = _CLIP + "encoder.layers.{i}."
_CLIP_LAYERS = (
    *_norm(_CLIP_LAYER + "layer_norm1", "self_attention.linear_qkv", "input_layernorm"),
    *_in_layers(
        (
            *(
                Rule(
                    tuple(f"{_CLIP_LAYER}self_attn.{part}_proj.{kind}" for part in "qkv"),
                    f"{_LAYER}self_attention.linear_qkv.{kind}",
                    TowerQkv(_vision, 3),
                    _width if kind == "weight" else None,
                )
                for kind in ("weight", "bias")
            ),
            *_both(
                _CLIP_LAYER + "self_attn.out_proj",
                _LAYER + "self_attention.linear_proj.{kind}",
                _width,
                _width,
            ),
        )
    ),
    *_norm(_CLIP_LAYER + "layer_norm2", "mlp.linear_fc1", "pre_mlp_layernorm"),
    *_in_layers(
        (
            *_both(_CLIP_LAYER + "mlp.fc1", _LAYER + "mlp.linear_fc1.{kind}", _ffn, _width),
            *_both(_CLIP_LAYER + "mlp.fc2", _LAYER + "mlp.linear_fc2.{kind}", _width, _ffn),
        )
    ),
)
_PROJECTOR = (
    *_both(
        "multi_modal_projector.linear_1", "vision_projection.encoder.linear_fc1.{kind}", _text_width, _width
    ),
    *_both(
        "multi_modal_projector.linear_2",
        "vision_projection.encoder.linear_fc2.{kind}",
        _text_width,
        _text_width,
    ),
)
_PATCHES = Rule(
    (_CLIP + "embeddings.patch_embedding.weight",), "vision_model.conv1.weight", Copy(_width), _patch
)


def _position_rule(*, has_class_token: bool) -> Rule:
    def rows(arch: Architecture) -> int:
        if arch.vision is None:
            return 0
        side = arch.vision.size("image_size") // arch.vision.size("patch_size")
        return side * side + has_class_token

    return Rule(
        (_CLIP + "embeddings.position_embedding.weight",),
        "vision_model.position_embeddings.weight",
        Copy(rows),
        _width,
    )


LLAVA_TOWER = (
    Rule(
        (_CLIP + "embeddings.class_embedding",),
        "vision_model.class_token",
        Copy(_width),
        shape=lambda arch: (1, 1, _width(arch)),
    ),
    _PATCHES,
    _position_rule(has_class_token=True),
    *_both(_CLIP + "pre_layrnorm", "vision_model.ln_pre.{kind}", _width),
    *_CLIP_LAYERS,
    *_PROJECTOR,
)
LLAVA_ONEVISION_TOWER = (
    Rule(("image_newline",), "image_newline", Copy(_text_width)),
    _PATCHES,
    Rule((_CLIP + "embeddings.patch_embedding.bias",), "vision_model.conv1.bias", Copy(_width)),
    _position_rule(has_class_token=False),
    *_CLIP_LAYERS,
    *_both(_CLIP + "post_layernorm", "vision_model.ln_post.{kind}", _width),
    *_PROJECTOR,
)


def _measure_clip(infos: Mapping[str, TensorInfo], *, image_size: int, class_tokens: int) -> dict[str, int]:
    patch = infos["vision_model.conv1.weight"].shape
    side = square_root(infos["vision_model.position_embeddings.weight"].rows - class_tokens, 1)
    # An image may have more pixels than its patches cover.
    covers = image_size // patch[2] == side
    return {
        "num_hidden_layers": _count(infos, "vision_model.decoder.layers."),
        "hidden_size": patch[0],
        "num_channels": patch[1],
        "patch_size": patch[2],
        "image_size": image_size if covers else side * patch[2],
        "intermediate_size": infos["vision_model.decoder.layers.0.mlp.linear_fc1.weight"].rows,
    }


def _clip_options(kind: str) -> Callable[[Architecture], dict[str, Any]]:
    """Give the options of Megatron's multimodal examples and of FlagScale's scripts after them."""

    def options(arch: Architecture) -> dict[str, Any]:
        if arch.vision is None:
            return {}
        size, patch = arch.vision.size("image_size"), arch.vision.size("patch_size")
        is_dropped = arch.outer["vision_feature_select_strategy"] == "default"
        return {
            "disable_vision_class_token": kind == "clip" and is_dropped,
            "img_h": size,
            "img_w": size,
            "patch_dim": patch,
            "vision_model_type": kind,
        }

    return options


_CLIP_FIELDS = {
    "attention_dropout": 0.0,
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
}
_LLAVA_OUTER = {
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
}
LLAVA = Multimodal(
    text_type="llama",
    vision=Section(
        model_type="clip_vision_model",
        defaults={
            **_CLIP_FIELDS,
            "hidden_act": "quick_gelu",
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-05,
            "patch_size": 32,
            "projection_dim": 512,
        },
        only={"hidden_act": ("quick_gelu",), "attention_dropout": (0,)},
        published={"num_attention_heads": 16, "projection_dim": 768},
        measure=lambda infos: _measure_clip(infos, image_size=336, class_tokens=1),
    ),
    outer={**_LLAVA_OUTER, "image_seq_length": 576, "image_token_index": 32000, "vision_feature_layer": -2},
    only={"projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,)},
    text={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    mark="vision_model.class_token",
    trained={"vision_feature_layer": -1},
    options=_clip_options("clip"),
)
LLAVA_ONEVISION = Multimodal(
    text_type="qwen2",
    vision=Section(
        model_type="siglip_vision_model",
        defaults={
            **_CLIP_FIELDS,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-06,
            "patch_size": 16,
            "vision_use_head": True,
        },
        only={"hidden_act": ("gelu_pytorch_tanh",), "attention_dropout": (0,), "vision_use_head": (False,)},
        published={"num_attention_heads": 16, "vision_use_head": False},
        measure=lambda infos: _measure_clip(infos, image_size=384, class_tokens=0),
    ),
    outer={
        **_LLAVA_OUTER,
        "image_grid_pinpoints": [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)],
        "image_token_index": 151646,
        "use_image_newline_parameter": True,
        "video_token_index": 151647,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    only={
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True,),
        "vision_feature_layer": (-1,),
        "vision_feature_select_strategy": ("full",),
    },
    text={
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    mark="image_newline",
    options=_clip_options("siglip"),
)
_QWEN3 = "model.visual."
_QWEN3_BLOCK = _QWEN3 + "blocks.{i}."


def _merger(
    hf: str, norm: str, rows: Size, other_norm: str, encoder: str, other: str, **options: Any
) -> tuple[Rule, ...]:
    """Give the rules of what joins features to the language model: a norm and two projections."""
    return (
        *_both(hf + ".norm", norm + ".{kind}", rows, aliases=(other_norm + ".{kind}",), **options),
        *_both(
            hf + ".linear_fc1",
            encoder + ".linear_fc1.{kind}",
            _merged,
            _merged,
            aliases=(other + ".linear_fc1.{kind}",),
            **options,
        ),
        *_both(
            hf + ".linear_fc2",
            encoder + ".linear_fc2.{kind}",
            _text_width,
            _merged,
            aliases=(other + ".linear_fc2.{kind}",),
            **options,
        ),
    )


QWEN3_VL_TOWER = (
    Rule((_QWEN3 + "patch_embed.proj.weight",), "vision_model.patch_embed.proj.weight", Copy(_width), _patch),
    Rule((_QWEN3 + "patch_embed.proj.bias",), "vision_model.patch_embed.proj.bias", Copy(_width)),
    Rule(
        (_QWEN3 + "pos_embed.weight",),
        "vision_model.pos_embed.weight",
        Copy(_of_vision(lambda tower: tower.size("num_position_embeddings"))),
        _width,
    ),
    *_norm(_QWEN3_BLOCK + "norm1", "self_attention.linear_qkv", "input_layernorm", is_saved_apart=False),
    *_in_layers(
        (
            Rule(
                (_QWEN3_BLOCK + "attn.qkv.weight",),
                _LAYER + "self_attention.linear_qkv.weight",
                TowerQkv(_vision, 1),
                _width,
            ),
            Rule(
                (_QWEN3_BLOCK + "attn.qkv.bias",),
                _LAYER + "self_attention.linear_qkv.bias",
                TowerQkv(_vision, 1),
            ),
            *_both(_QWEN3_BLOCK + "attn.proj", _LAYER + "self_attention.linear_proj.{kind}", _width, _width),
        )
    ),
    *_norm(_QWEN3_BLOCK + "norm2", "mlp.linear_fc1", "pre_mlp_layernorm", is_saved_apart=False),
    *_in_layers(
        (
            *_both(_QWEN3_BLOCK + "mlp.linear_fc1", _LAYER + "mlp.linear_fc1.{kind}", _ffn, _width),
            *_both(_QWEN3_BLOCK + "mlp.linear_fc2", _LAYER + "mlp.linear_fc2.{kind}", _width, _ffn),
        )
    ),
    *_merger(
        _QWEN3 + "deepstack_merger_list.{i}",
        "vision_model.decoder.deepstack_norm_list.{i}",
        _merged,
        "vision_model.decoder.deepstack_merger_list.{i}.patch_norm",
        "vision_model.decoder.deepstack_merger_list.{i}.encoder",
        "vision_model.decoder.deepstack_merger_list.{i}",
        layers="deepstack",
    ),
    *_merger(
        _QWEN3 + "merger",
        "vision_model.decoder.final_layernorm",
        _width,
        "vision_model.merger.patch_norm",
        "vision_model.projection.encoder",
        "vision_model.merger",
    ),
)


def _measure_qwen3(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    depth = _count(infos, "vision_model.decoder.layers.")
    deepstack = _count(infos, "vision_model.decoder.deepstack_merger_list.")
    return {
        **_measure_qwen(infos, is_gated=False),
        "num_position_embeddings": infos["vision_model.pos_embed.weight"].rows,
        # Published towers of 24 layers take features behind 5, 11 and 17, of 27 behind 8, 16 and 24.
        "deepstack_visual_indexes": [
            depth // (deepstack + 1) * (k + 1) - 1 if depth % (deepstack + 1) == 0 else 8 * (k + 1)
            for k in range(deepstack)
        ],
    }


QWEN3_VL = Multimodal(
    text_type="qwen3_vl_text",
    vision=Section(
        model_type="qwen3_vl_vision",
        other_types=("qwen3_vl", "qwen3_vl_moe"),
        defaults={
            "deepstack_visual_indexes": [8, 16, 24],
            "depth": 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4304,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 3584,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        only={"hidden_act": ("gelu_pytorch_tanh",)},
        measure=_measure_qwen3,
    ),
    outer=_IDS,
    mark="vision_model.pos_embed.weight",
    published_mrope=(24, 20, 20),
    is_mrope_interleaved=True,
    options=_qwen_options,
)

QWEN3_VL_MOE = replace(
    QWEN3_VL,
    text_type="qwen3_vl_moe_text",
    vision=replace(QWEN3_VL.vision, model_type="qwen3_vl_moe_vision"),
)


def _in_omni(rule: Rule) -> Rule:
    """Give the rule of the same tensor in Qwen3-Omni's thinker, which no other than Megatron-Bridge names."""

    def named(name: str) -> str:
        name = name.removeprefix("model.").replace("deepstack_merger_list", "merger_list")
        if "merger" not in name:
            return name
        for ours, theirs in ((".norm.", ".ln_q."), (".linear_fc1.", ".mlp.0."), (".linear_fc2.", ".mlp.2.")):
            name = name.replace(ours, theirs)
        return name

    is_merger = any("merger" in name for name in rule.hf)
    megatron = rule.aliases[0] if is_merger else rule.megatron
    return replace(
        rule,
        hf=tuple(map(named, rule.hf)),
        megatron="thinker." + megatron,
        aliases=() if is_merger else tuple("thinker." + name for name in rule.aliases),
    )


def _of_audio(size: Callable[[Tower], int]) -> Size:
    return lambda arch: 0 if arch.audio is None else size(arch.audio)


_audio_width = _of_audio(lambda tower: tower.hidden_size)
_audio_ffn = _of_audio(lambda tower: tower.ffn_size)
_channels = _of_audio(lambda tower: tower.size("downsample_hidden_size"))


def _audio_features(arch: Architecture) -> int:
    """Columns behind three convolutions, each of which halves the mel bins and rounds up."""
    if arch.audio is None:
        return 0
    bins = arch.audio.size("num_mel_bins")
    for _ in range(3):
        bins = (bins + 1) // 2
    return _channels(arch) * bins


def _same(name: str, rows: Size, columns: Any = None, *, layered: bool = False) -> tuple[Rule, ...]:
    """Give the rules of a part of the audio tower, which has the same names and bytes on both sides."""
    head = "layers.{i}." if layered else ""
    rules = _both(
        f"audio_tower.{head}{name}",
        f"thinker.audio_model.{head}{name}.{{kind}}",
        rows,
        columns,
    )
    return tuple(replace(rule, layers="audio") for rule in rules) if layered else rules


_AUDIO = (
    *_same("conv2d1", _channels, lambda _arch: (1, 3, 3)),
    *(
        rule
        for number in (2, 3)
        for rule in _same(f"conv2d{number}", _channels, lambda arch: (_channels(arch), 3, 3))
    ),
    _same("conv_out", _audio_width, _audio_features)[0],
    *(
        rule
        for part in ("q_proj", "k_proj", "v_proj", "out_proj")
        for rule in _same(f"self_attn.{part}", _audio_width, _audio_width, layered=True)
    ),
    *_same("self_attn_layer_norm", _audio_width, layered=True),
    *_same("fc1", _audio_ffn, _audio_width, layered=True),
    *_same("fc2", _audio_width, _audio_ffn, layered=True),
    *_same("final_layer_norm", _audio_width, layered=True),
    *_same("ln_post", _audio_width),
    *_same("proj1", _audio_width, _audio_width),
    *_same("proj2", _of_audio(lambda tower: tower.size("output_dim")), _audio_width),
)
QWEN3_OMNI_TOWERS = (*map(_in_omni, QWEN3_VL_TOWER), *_AUDIO)


def _measure_omni(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return _measure_qwen3({name.removeprefix("thinker."): info for name, info in infos.items()})


def _measure_audio(infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    head = "thinker.audio_model."
    columns = infos[head + "conv_out.weight"].shape[1]
    channels, width = infos[head + "conv2d1.weight"].rows, infos[head + "ln_post.weight"].rows
    return {
        "encoder_layers": _count(infos, head + "layers."),
        "d_model": width,
        "downsample_hidden_size": channels,
        "encoder_ffn_dim": infos[head + "layers.0.fc1.weight"].rows,
        "output_dim": infos[head + "proj2.weight"].rows,
        "num_mel_bins": 8 * (columns // channels),
    }


QWEN3_OMNI = Multimodal(
    text_type="qwen3_omni_moe_text",
    vision=replace(
        QWEN3_VL.vision,
        model_type="qwen3_omni_moe_vision_encoder",
        other_types=(),
        measure=_measure_omni,
    ),
    audio=Section(
        model_type="qwen3_omni_moe_audio_encoder",
        defaults={
            "activation_dropout": 0.0,
            "activation_function": "gelu",
            "attention_dropout": 0.0,
            "conv_chunksize": 500,
            "d_model": 1280,
            "downsample_hidden_size": 480,
            "dropout": 0.0,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "encoder_layers": 32,
            "initializer_range": 0.02,
            "max_source_positions": 1500,
            "n_window": 100,
            "n_window_infer": 800,
            "num_mel_bins": 128,
            "output_dim": 3584,
            "scale_embedding": False,
        },
        only={"activation_function": ("gelu",), "scale_embedding": (False,)},
        published={"n_window": 50},
        measure=_measure_audio,
    ),
    outer={
        **_IDS,
        "audio_end_token_id": None,
        "audio_start_token_id": 151647,
        "audio_token_id": 151646,
        "position_id_per_seconds": 25,
        "user_token_id": 872,
        "vision_end_token_id": None,
        "vision_start_token_id": None,
    },
    trained={
        "audio_end_token_id": 151670,
        "audio_start_token_id": 151669,
        "audio_token_id": 151675,
        "position_id_per_seconds": 13,
        **_PUBLISHED_VISION,
    },
    mark="thinker.vision_model.pos_embed.weight",
    within="thinker_config",
    published_mrope=(24, 20, 20),
    is_mrope_interleaved=True,
)
