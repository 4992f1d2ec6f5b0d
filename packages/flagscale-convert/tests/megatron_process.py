"""A process of real megatron-core on the CPU, started by torchrun: checkpoints and logits.

Reads groups of jobs (JSON), each of one parallel layout. `save` builds a model with random weights and saves
it as the trainer does; `load` builds the model a checkpoint's own arguments describe and loads it with
Megatron's default strictness. Both write the logits of given tokens, computed by all stages of the pipeline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch


def adapt_to_cpu() -> None:
    """Point the few CUDA calls a forward pass makes at the CPU, before megatron is imported."""
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.get_rng_state = lambda *_device: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_device: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.synchronize = lambda *_device: None
    cuda.empty_cache = lambda: None
    for name in ("Stream", "Event"):
        setattr(cuda, name, lambda *_args, **_kwargs: MagicMock())
    cuda.current_stream = lambda *_device: MagicMock()
    cuda.stream = lambda _stream: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.nn.Module.cuda = lambda self, *_args: self


def adapt_megatron() -> None:
    """Mend what megatron-core assumes of a machine with a GPU or with Transformer Engine."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    tensor_parallel.random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    tensor_parallel.random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    # Megatron turns only CUDA tensors into the plain numbers a collective wants.
    keep = token_dispatcher.maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, **options: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else keep(tensor, **options)
    )
    # 0.16 takes Transformer Engine for installed where only Megatron's wrapper of it can be imported.
    multi_latent_attention.HAVE_TE = False
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def expert_options(args: argparse.Namespace) -> dict[str, Any]:
    from megatron.core import parallel_state

    if not args.num_experts:
        return {}
    return {
        "num_moe_experts": args.num_experts,
        "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
        "moe_layer_freq": args.moe_layer_freq,
        "moe_router_topk": args.moe_router_topk,
        "moe_router_pre_softmax": args.moe_router_pre_softmax,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        **{
            name: getattr(args, name)
            for name in (
                "moe_router_score_function",
                "moe_router_enable_expert_bias",
                "moe_router_topk_scaling_factor",
                "moe_router_num_groups",
                "moe_router_group_topk",
                "moe_shared_expert_intermediate_size",
            )
            if getattr(args, "moe_router_enable_expert_bias", False)
        },
    }


LATENT_OPTIONS = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "mtp_num_layers",
    "rope_type",
    "rotary_base",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


class CoreAttention(torch.nn.Module):
    """Attention whose values are narrower than its keys, which Megatron's plain-torch one does not take."""

    def __init__(self, config: Any, softmax_scale: float, **_options: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Any, key: Any, value: Any, mask: Any, **_options: Any) -> Any:
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        scores = (query @ key.transpose(-1, -2) * self.scale).masked_fill(mask, float("-inf"))
        return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def adapt_latent(spec: Any, args: argparse.Namespace) -> None:
    """Complete the plain-torch layers for latent attention."""
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    class DirectQueries(MLASelfAttention):
        """Queries projected directly, without the norm that 0.19 puts before that projection."""

        def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
            return {**vars(submodules), "linear_q_up_proj": None}

    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention
        attention.submodules.core_attention = CoreAttention
        if args.q_lora_rank is None:
            attention.module = DirectQueries
            attention.submodules.q_layernorm = IdentityOp


def build(args: argparse.Namespace, tensor_parallel: int, *, sizes: Any = (), **stage: Any) -> Any:
    """Build one model chunk; `sizes` overrides the configuration, `stage` goes to the model."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    args.tensor_model_parallel_size = tensor_parallel
    is_latent = getattr(args, "multi_latent_attention", False)
    latent = (
        {name: getattr(args, name) for name in LATENT_OPTIONS if hasattr(args, name)} if is_latent else {}
    )
    config = (MLATransformerConfig if is_latent else TransformerConfig)(
        **latent,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.layernorm_epsilon,
        qk_layernorm=args.qk_layernorm,
        add_qkv_bias=args.add_qkv_bias,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **{"tensor_model_parallel_size": tensor_parallel, **expert_options(args), **dict(sizes)},
    )
    spec = (
        get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization="RMSNorm",
            **{name: stage[name] for name in ("vp_stage", "pp_rank") if name in stage},
        )
        if args.num_experts  # as the trainer chooses
        else get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization="RMSNorm")
    )
    if is_latent:
        adapt_latent(spec, args)
    has_mtp = bool(getattr(args, "mtp_num_layers", None))
    for name, value in vars(args).items():  # as the trainer hands them to other attention than latent
        if name.startswith("yarn_") or name in ("rotary_scaling_factor", "mscale", "mscale_all_dim"):
            setattr(config, name if name.startswith("yarn_") else f"yarn_{name}", value)
    config.yarn_correction_range_round_to_int = True
    return GPTModel(
        config,
        spec,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        if has_mtp
        else None,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=getattr(args, "position_embedding_type", "rope"),
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
        **{name: value for name, value in stage.items() if name != "pp_rank"},
    ).eval()


def build_stage(args: argparse.Namespace, sizes: dict[str, Any]) -> Any:
    """Build this rank's stage; of two, the first has one layer, so that stages are uneven."""
    from megatron.core import parallel_state

    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), sizes["pipeline_model_parallel_size"]
    options = dict(sizes)
    if stages > 1:
        options |= {"pipeline_dtype": torch.float32, "num_layers_in_first_pipeline_stage": 1}
    return build(
        args,
        sizes["tensor_model_parallel_size"],
        sizes=options,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
    )


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Run all stages; the last one gives the logits, of the next token and of further ones."""
    from megatron.core import parallel_state

    batch, length = tokens.shape
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    positions = torch.arange(length).repeat(batch, 1)
    hidden_states: list[torch.Tensor] = []
    layers = model.mtp.layers if getattr(model, "mtp", None) is not None else ()
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: hidden_states.append(out[0])) for layer in layers
    ]
    if layers:
        # 0.16 runs layers for further tokens only with labels, and then gives losses back.
        hooks.append(model.decoder.register_forward_hook(lambda _m, _i, out: hidden_states.append(out)))
    with torch.no_grad():
        if not model.pre_process:
            hidden = torch.empty(length, batch, model.config.hidden_size)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(tokens, positions, mask, labels=tokens if layers else None)
        if not model.post_process:
            torch.distributed.send(
                output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank()
            )
            return None
        tied = model.share_embeddings_and_output_weights
        head = model.shared_embedding_or_output_weight() if tied else None
        found = [model.output_layer(hidden, weight=head)[0].transpose(0, 1) for hidden in hidden_states]
    for hook in hooks:
        hook.remove()
    return torch.stack(found or [output]).float()


def fill(models: list[Any]) -> None:
    """Random values, alike on the ranks that hold the same tensor.

    Norms and biases are away from their neutral values, or swapping them would go unnoticed.
    """
    from megatron.core import parallel_state

    for model in models:
        tied = model.share_embeddings_and_output_weights
        tensors = [
            *model.named_parameters(),
            *((n, b) for n, b in model.named_buffers() if "expert_bias" in n),
        ]
        for name, tensor in tensors:
            seed = "embedding.word_embeddings.weight" if tied and name == "output_layer.weight" else name
            if name.startswith("decoder.layers."):
                layer = int(name.split(".")[2])
                rest = name.split(".", 3)[3]
                seed = f"{rest} of layer {model.decoder.layers[layer].layer_number}"
            if getattr(tensor, "tensor_model_parallel", False):
                seed += f" tensor {parallel_state.get_tensor_model_parallel_rank()}"
            if ".local_experts." in name:
                seed += f" expert {parallel_state.get_expert_model_parallel_rank()}"
                seed += f" slice {parallel_state.get_expert_tensor_parallel_rank()}"
            noise = torch.randn(
                tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode()))
            )
            tensor.data.copy_(1 + noise / 4 if "norm" in name else noise / 8)


def sharded(model: Any) -> Any:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group, "singleton_local_shards": False})


def save(job: dict[str, Any], sizes: dict[str, Any]) -> Any:
    from megatron.core import dist_checkpointing

    args = argparse.Namespace(**job["args"])
    model = build_stage(argparse.Namespace(**job["args"]), sizes)
    fill([model])
    state = {
        "args": args,
        "iteration": 7,
        "checkpoint_version": 3.0,
        "content_metadata": {"singleton_local_shards": False},
        "model": sharded(model),
    }
    folder = Path(job["path"]) / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))
    return model


def load(job: dict[str, Any], sizes: dict[str, Any]) -> Any:
    from megatron.core import dist_checkpointing

    tracker = (Path(job["path"]) / "latest_checkpointed_iteration.txt").read_text()
    folder = str(Path(job["path"]) / tracker)
    common = dist_checkpointing.load_common_state_dict(folder)
    model = build_stage(common["args"], sizes)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # what is not loaded shows
    for name, buffer in model.named_buffers():
        if "expert_bias" in name:
            buffer.fill_(float("nan"))
    loaded = dist_checkpointing.load({"model": sharded(model)}, folder)
    model.load_state_dict(loaded["model"], strict=True)
    return model


def main(path: str) -> None:
    adapt_to_cpu()
    adapt_megatron()
    from megatron.core import parallel_state, tensor_parallel
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(path).read_text())
    torch.distributed.init_process_group("gloo")
    tokens = load_file(request["tokens"])["tokens"]
    for group in request["groups"]:
        sizes = group["sizes"]
        used = sizes["pipeline_model_parallel_size"] * sizes["expert_tensor_parallel_size"]
        parallel_state.initialize_model_parallel(
            **sizes, expert_model_parallel_size=torch.distributed.get_world_size() // used
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        for job in group["jobs"]:
            model = (save if job["do"] == "save" else load)(job, sizes)
            result = logits(model, tokens)
            is_first = (
                parallel_state.get_data_parallel_rank()
                == parallel_state.get_tensor_model_parallel_rank()
                == 0
            )
            if result is not None and is_first:
                save_file({"logits": result.contiguous()}, job["logits"])
            torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # the checkpoint writer starts a process that imports this file again
    main(sys.argv[1])
