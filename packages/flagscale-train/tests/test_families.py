"""Every family computes what transformers computes, from the same weights."""

import json
from importlib.metadata import version
from importlib.util import find_spec

import pytest
from trainings import logits_job

pytestmark = [pytest.mark.megatron, pytest.mark.every_megatron]

TOLERANCE = 1e-5
VOCAB = 128
MEGATRON = tuple(map(int, version("megatron-core").split(".")[:2])) if find_spec("megatron") else (0, 19)
NULL_TOKENS = VOCAB - (MEGATRON < (0, 18))
"""Of the NullTokenizer, to which older Megatrons add one."""
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,  # what transformers takes inside latent attention, whatever is given
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
RENORMALISED = {"moe_router_load_balancing_type": "none", "moe_router_pre_softmax": False}
FAMILIES = {
    # Aquila has LLaMA's architecture too; its published code is not in transformers.
    "llama2": (
        "llama",
        {"intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 4},
        {"untie_embeddings_and_output_weights": True},
    ),
    "llama3": (
        "llama",
        {"intermediate_size": 112, **GROUPED, "rope_theta": 500000.0},
        {"untie_embeddings_and_output_weights": True, "rotary_base": 500000},
    ),
    "llama3_1": (
        "llama",
        {
            "intermediate_size": 112,
            **GROUPED,
            "rope_theta": 20.0,
            "rope_scaling": {**LLAMA3, "rope_theta": 20.0},
        },
        {
            "untie_embeddings_and_output_weights": True,
            "rotary_base": 20,
            "use_rope_scaling": True,
            "rope_scaling_factor": 4.0,
        },
    ),
    "qwen2_5-tied": (
        "qwen2",
        {"intermediate_size": 112, **GROUPED, "tie_word_embeddings": True},
        {"add_qkv_bias": True},
    ),
    "qwq": (
        "qwen2",
        {"intermediate_size": 112, **GROUPED},
        {"add_qkv_bias": True, "untie_embeddings_and_output_weights": True},
    ),
    "qwen3": (
        "qwen3",
        {"intermediate_size": 112, **GROUPED, "head_dim": 24, "tie_word_embeddings": True},
        {"qk_layernorm": True, "kv_channels": 24},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "intermediate_size": 112,
            **GROUPED,
            "head_dim": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        {
            "qk_layernorm": True,
            "kv_channels": 24,
            "untie_embeddings_and_output_weights": True,
            "num_experts": 6,
            "moe_router_topk": 3,
            "moe_ffn_hidden_size": 40,
            **RENORMALISED,
        },
    ),
    "mixtral": (
        "mixtral",
        {"intermediate_size": 112, **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        {
            "untie_embeddings_and_output_weights": True,
            "num_experts": 4,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 112,
            **RENORMALISED,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "intermediate_size": 112,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 40,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 0,
        },
        {
            "untie_embeddings_and_output_weights": True,
            "multi_latent_attention": True,
            "kv_channels": 12,
            "qk_layernorm": True,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_head_dim": 16,
            "qk_pos_emb_head_dim": 8,
            "v_head_dim": 12,
            "rope_type": "rope",
            "no_rope_fusion": True,
            "num_experts": 8,
            "moe_layer_freq": "[0]*1+[1]*2",
            "moe_router_topk": 4,
            "moe_ffn_hidden_size": 40,
            "moe_shared_expert_intermediate_size": 40,
            "moe_router_score_function": "sigmoid",
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_load_balancing_type": "none",
        },
    ),
}


TRAIN = """
system: {{num_workers: 0}}
model:
  num_layers: 3
  hidden_size: 64
  ffn_hidden_size: 112
  num_attention_heads: 4
  normalization: RMSNorm
  norm_epsilon: 1.0e-6
  swiglu: true
  disable_bias_linear: true
  position_embedding_type: rope
  seq_length: 32
  max_position_embeddings: 64
  attention_dropout: 0.0
  hidden_dropout: 0.0
  train_iters: 1
  micro_batch_size: 1
  global_batch_size: 1
  optimizer: {{lr: 1.0e-3, min_lr: 0.0}}
{more}
data:
  mock_data: true
  tokenizer: {{tokenizer_type: NullTokenizer, vocab_size: {vocab}}}
"""
EXPERIMENT = """
defaults: [_self_, {{train: tiny}}]
experiment:
  exp_name: tiny
  exp_dir: {folder}/exp
  task: {{type: train, backend: megatron}}
"""


def random_model(kind, given, folder):
    """Make a random transformers model whose every part counts, and save it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tied = given.get("tie_word_embeddings", False)
    config = AutoConfig.for_model(
        kind, **COMMON, **{"rope_theta": 10000.0, **given, "tie_word_embeddings": tied}
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise / 4 if "norm" in name else noise / 12)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def logits(tmp_path_factory, run_forked):
    """Logits by Megatron and by transformers of every family, from the same weights."""
    import torch
    from safetensors.torch import load_file

    from flagscale_convert import convert, make_plan

    root = tmp_path_factory.mktemp("families")
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(9))
    theirs, jobs = {}, []
    for name, (kind, given, options) in FAMILIES.items():
        folder = root / name
        model = random_model(kind, given, folder / "hf")
        with torch.no_grad():
            theirs[name] = model(tokens).logits
        installed = ".".join(map(str, MEGATRON))
        checkpoint = folder / "megatron"
        convert(make_plan(folder / "hf", checkpoint, to="torch_dist", megatron_version=installed))
        experiment = _experiment(folder, given, options)
        jobs.append(logits_job(experiment, folder, [], checkpoint=checkpoint, tokens=tokens.tolist()))
    run_forked(root, jobs)
    return {name: (load_file(root / name / "logits")["logits"], theirs[name]) for name in FAMILIES}


def _experiment(folder, given, options):
    grouped = given["num_key_value_heads"] != given["num_attention_heads"]
    groups = {"group_query_attention": True, "num_query_groups": given["num_key_value_heads"]}
    lines = {**(groups if grouped else {}), **options}
    more = "\n".join(f"  {name}: {json.dumps(value)}" for name, value in lines.items())
    (folder / "conf" / "train").mkdir(parents=True)
    (folder / "conf" / "train" / "tiny.yaml").write_text(TRAIN.format(more=more, vocab=NULL_TOKENS))
    path = folder / "conf" / "tiny.yaml"
    path.write_text(EXPERIMENT.format(folder=folder))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, logits, record_property):
    ours, theirs = logits[name]
    worst = (ours - theirs).abs().max().item()
    record_property("worst", f"{worst:.1e}")
    assert theirs.abs().max() > 1, "large enough to tell"
    assert worst < TOLERANCE
