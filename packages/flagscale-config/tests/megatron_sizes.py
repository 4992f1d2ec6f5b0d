"""A process of real megatron-core that builds models on the meta device and counts their parameters.

Reads a list of Megatron options (JSON) from standard input; writes, for each, the number of parameters and
Megatron's own count of floating-point operations for a batch of 8 sequences.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from typing import Any

import torch


class NoAttention(torch.nn.Module):
    """Stands where attention itself would: without parameters, while the local one knows no MLA."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        super().__init__()


def prepare() -> None:
    """Build on the CPU's meta device, alone."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.cuda.current_device = lambda: torch.device("meta")
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def parsed(options: dict[str, Any]) -> argparse.Namespace:
    from megatron.training.arguments import add_megatron_arguments

    from flagscale_config import render_megatron

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    args = parser.parse_args(render_megatron({"micro_batch_size": 1, **options}))
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    return args


def config_of(args: argparse.Namespace) -> Any:
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    known = {name: value for name, value in vars(args).items() if name in kind.__dataclass_fields__}
    renamed = {
        "num_moe_experts": args.num_experts,
        "gated_linear_unit": args.swiglu,
        "activation_func": torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "params_dtype": torch.bfloat16,
        "init_model_with_meta_device": True,
        "use_cpu_initialization": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "moe_token_dispatcher_type": "allgather",
        "transformer_impl": "local",
        "init_method": None,
        "output_layer_init_method": None,
        "embedding_init_method": None,
    }
    return kind(**{**known, **renamed})


def build(args: argparse.Namespace) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.identity_op import IdentityOp

    config = config_of(args)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = NoAttention
        if args.multi_latent_attention and args.q_lora_rank is None:
            attention.q_layernorm = IdentityOp  # the local layers refuse the pair
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False) if args.mtp_num_layers else None
    with torch.device("meta"):
        return GPTModel(
            config,
            block,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings or 1024,
            position_embedding_type=args.position_embedding_type,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            mtp_block_spec=mtp,
        )


def main() -> None:
    warnings.simplefilter("ignore")
    jobs = json.load(sys.stdin)
    found = []
    with contextlib.redirect_stdout(io.StringIO()):
        prepare()
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
        from megatron.training.training import num_floating_point_operations

        parallel_state.initialize_model_parallel()
        # Where queries are not compressed, 0.19.2 wants to normalise the input of their projection once
        # more, which no published model does and only Transformer Engine can.
        QKNormConfigResolver._mla_fused_linear_or_default = lambda self, *_args: self.linear_impl
        CudaRNGStatesTracker.fork = lambda *_args: contextlib.nullcontext()
        for options in jobs:
            args = parsed(options)
            count = sum(parameter.numel() for parameter in build(args).parameters())
            found.append({"parameters": count, "flops": num_floating_point_operations(args, 8)})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
