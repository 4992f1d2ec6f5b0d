"""A process of real megatron-core on the CPU, started by torchrun: checkpoints and logits.

Reads a list of jobs (JSON): `save` builds a model with random weights and saves it as the trainer does;
`load` builds the model a checkpoint's own arguments describe and loads it with Megatron's default strictness.
Both write the logits of given tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
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


def expert_options(args: argparse.Namespace) -> dict[str, Any]:
    if not args.num_experts:
        return {}
    return {
        "num_moe_experts": args.num_experts,
        "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
        "moe_layer_freq": args.moe_layer_freq,
        "moe_router_topk": args.moe_router_topk,
        "moe_router_pre_softmax": args.moe_router_pre_softmax,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": torch.distributed.get_world_size(),
    }


def build(args: argparse.Namespace, tensor_parallel: int, *, sizes: Any = (), **stage: Any) -> Any:
    """Build one model chunk; `sizes` overrides the configuration, `stage` goes to the model."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
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
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
        **{name: value for name, value in stage.items() if name != "pp_rank"},
    ).eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    positions = torch.arange(length).repeat(len(tokens), 1)
    with torch.no_grad():
        return model(tokens, positions, mask).float()


def save(job: dict[str, Any], tensor_parallel: int) -> Any:
    from megatron.core import dist_checkpointing

    args = argparse.Namespace(**job["args"])
    model = build(args, tensor_parallel)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        # Norms and biases away from their neutral values, or swapping them would go unnoticed.
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + noise / 4) if "norm" in name else noise / 8
    state = {
        "args": args,
        "iteration": 7,
        "checkpoint_version": 3.0,
        "content_metadata": {"singleton_local_shards": False},
        "model": model.sharded_state_dict(),
    }
    folder = Path(job["path"]) / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))
    return model


def load(job: dict[str, Any], tensor_parallel: int) -> Any:
    from megatron.core import dist_checkpointing

    tracker = (Path(job["path"]) / "latest_checkpointed_iteration.txt").read_text()
    folder = str(Path(job["path"]) / tracker)
    common = dist_checkpointing.load_common_state_dict(folder)
    model = build(common["args"], tensor_parallel)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # what is not loaded shows
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
    model.load_state_dict(loaded["model"], strict=True)
    return model


def main(path: str) -> None:
    adapt_to_cpu()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe import token_dispatcher
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(path).read_text())
    torch.distributed.init_process_group("gloo")
    size = torch.distributed.get_world_size()
    has_experts = request["has_experts"]
    tensor_size = 1 if has_experts else size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_size, expert_model_parallel_size=size if has_experts else 1
    )
    tensor_parallel.random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    tensor_parallel.random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    # Megatron turns only CUDA tensors into the plain numbers a collective wants.
    keep = token_dispatcher.maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, **options: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else keep(tensor, **options)
    )
    tokens = load_file(request["tokens"])["tokens"]
    for job in request["jobs"]:
        model = (save if job["do"] == "save" else load)(job, tensor_size)
        result = logits(model, tokens)
        if torch.distributed.get_rank() == 0:
            save_file({"logits": result.contiguous()}, job["logits"])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # the checkpoint writer starts a process that imports this file again
    main(sys.argv[1])
