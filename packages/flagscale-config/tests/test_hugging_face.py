"""A Hugging Face `config.json` becomes the facts that the catalogue holds, and counts as its class does."""

from dataclasses import replace
from typing import Any

import pytest

from flagscale_config import ConfigError
from flagscale_config.models import ModelFacts, published

# Files of published models, cut to what decides their size and meaning.
_LLAMA: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_QWEN: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
_DEEPSEEK: dict[str, Any] = {
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
}
_QWEN3_VISION: dict[str, Any] = {
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [8, 16, 24],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "qwen2.5-7b": {
        **_QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "qwen3-30b-a3b": {
        **_QWEN,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
    "llama2-7b": {
        **_LLAMA,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "llama3.1-8b": {
        **_LLAMA,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {  # as transformers 5 writes it
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "vocab_size": 128256,
    },
    "mixtral-8x7b": {
        **_LLAMA,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "vocab_size": 32000,
    },
    "deepseek-v3-671b": {
        **_DEEPSEEK,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "aux_loss_alpha": 0.0001,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "vocab_size": 129280,
    },
    "moonlight-16b-a3b": {
        **_DEEPSEEK,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
        "vocab_size": 163840,
    },
    "qwen2.5-vl-7b": {  # text at the top, as the file was published
        **_QWEN,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "vocab_size": 152064,
    },
    "qwen3-vl-32b": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {
            **_QWEN,
            "model_type": "qwen3_vl_text",
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "max_position_embeddings": 262144,
            "num_attention_heads": 64,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
        "vision_config": {**_QWEN3_VISION, "out_hidden_size": 5120},
    },
    "qwen3-omni-30b-a3b": {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "thinker_config": {
            "model_type": "qwen3_omni_moe_thinker",
            "audio_config": {
                "d_model": 1280,
                "downsample_hidden_size": 480,
                "encoder_attention_heads": 20,
                "encoder_ffn_dim": 5120,
                "encoder_layers": 32,
                "num_mel_bins": 128,
                "output_dim": 2048,
            },
            "text_config": {
                **_QWEN,
                "model_type": "qwen3_omni_moe_text",
                "decoder_sparse_step": 1,
                "head_dim": 128,
                "hidden_size": 2048,
                "intermediate_size": 768,
                "max_position_embeddings": 65536,
                "mlp_only_layers": [],
                "moe_intermediate_size": 768,
                "num_attention_heads": 32,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 48,
                "num_key_value_heads": 4,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20],
                    "rope_type": "default",
                    "type": "default",
                },
                "router_aux_loss_coef": 0.001,
                "shared_expert_intermediate_size": 0,
                "tie_word_embeddings": False,
                "vocab_size": 152064,
            },
            "vision_config": {**_QWEN3_VISION, "out_hidden_size": 2048},
        },
    },
    "llava1.5-7b": {  # leaves the language model's numbers to the class
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
    },
    "llava-onevision-0.5b": {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "text_config": {
            **_QWEN,
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "vocab_size": 152000,
        },
        "tie_word_embeddings": True,
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "qwen3-next-80b-a3b": {
        **_QWEN,
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 151936,
    },
    "ernie4.5-300b-a47b": {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "hidden_act": "silu",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 3584,
        "moe_k": 8,
        "moe_layer_end_index": 53,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 3,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 0,
        "num_attention_heads": 64,
        "num_hidden_layers": 54,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "use_bias": False,
        "vocab_size": 103424,
    },
    "grok2-270b": {
        "architectures": ["Grok1ForCausalLM"],
        "head_dim": 128,
        "hidden_act": "gelu",
        "hidden_size": 8192,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 16384,
        "num_attention_heads": 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "residual_moe": True,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "rope_type": "original",
            "original_max_position_embeddings": 8192,
            "scaling_factor": 16.0,
            "extrapolation_factor": 1.0,
            "attn_factor": 1.0,
        },
        "rope_theta": 208533496,
        "vocab_size": 131072,
    },
    "rwkv7-1.5b": {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "a_low_rank_dim": 96,
        "decay_low_rank_dim": 96,
        "gate_low_rank_dim": 256,
        "head_dim": 64,
        "hidden_act": "sqrelu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "num_hidden_layers": 24,
        "tie_word_embeddings": False,
        "v_low_rank_dim": 64,
        "vocab_size": 65536,
    },
    "aquila2-7b": {
        **_LLAMA,
        "architectures": ["AquilaModel"],
        "model_type": "aquila",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "vocab_size": 100008,
    },
}

_ABOUT = ("name", "family", "architecture", "hf_repo", "license", "published_size", "source", "notes")


def bare(facts):
    """Leave what no `config.json` says out."""
    return replace(facts, **dict.fromkeys(_ABOUT[:-1], ""), notes=(), other_parameters={})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_file_is_read(name):
    read = ModelFacts.from_hugging_face(CONFIGS[name])
    expected = published(name)
    assert read.architecture == CONFIGS[name]["architectures"][0]
    assert read.num_parameters == expected.num_parameters
    assert read.kv_cache_bytes_per_token() == expected.kv_cache_bytes_per_token()
    # Qwen3-Next's file does not tell of the module that its checkpoint has.
    hidden = {"num_mtp_layers": 0} if name.startswith("qwen3-next") else {}
    assert bare(read) == bare(replace(expected, **hidden))


def test_kimi_is_read_as_deepseek():
    config = {**CONFIGS["deepseek-v3-671b"], "model_type": "kimi_k2", "architectures": None}
    assert ModelFacts.from_hugging_face(config).num_mtp_layers == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertModel"]}, "architecture BertModel is not known; known: AquilaForCausalLM, "),
        ({"architectures": ["BertModel"], "model_type": "llama"}, "BertModel is not known"),
        ({"model_type": "bert"}, "architecture bert is not known"),
        ({}, "architecture none given is not known"),
        ({"model_type": "llama"}, "hidden_size is missing"),
        ({"model_type": "deepseek_v3", "hidden_size": 8, "num_hidden_layers": 2}, "vocab_size is missing"),
    ],
)
def test_what_cannot_be_read_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        ModelFacts.from_hugging_face(config)


@pytest.mark.transformers
@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if not name.startswith(("grok", "rwkv", "aquila"))]
)
def test_counts_are_those_of_transformers(name):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        content = CONFIGS[name].get("thinker_config", CONFIGS[name])
        config = transformers.AutoConfig.for_model(**content)
        architecture = CONFIGS[name]["architectures"][0]
        if "thinker_config" in CONFIGS[name]:
            architecture = "Qwen3OmniMoeThinkerForConditionalGeneration"
        with torch.device("meta"):
            model = getattr(transformers, architecture)(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    # transformers makes a parameter of ERNIE's bias that balances the experts.
    balance = 51 * 64 if name.startswith("ernie") else 0
    assert counted == published(name).num_parameters + balance
