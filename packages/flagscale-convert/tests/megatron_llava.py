"""A process of real megatron-core on the CPU: its `LLaVAModel` loads what was converted and computes.

Reads one request (JSON): a `torch_dist` checkpoint, a per-rank one, inputs and where the answers go. The
model is the one the checkpoint's own arguments describe.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron_process import adapt_megatron, adapt_to_cpu, sharded


def build(args: argparse.Namespace) -> Any:
    from megatron.core.activations import quick_gelu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal import llava_model
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    tower = args.flagscale_convert_towers["vision"]
    plain = {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
    }
    language = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.layernorm_epsilon,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        **plain,
    )
    vision = TransformerConfig(
        num_layers=tower["num_hidden_layers"],
        hidden_size=tower["hidden_size"],
        ffn_hidden_size=tower["intermediate_size"],
        num_attention_heads=tower["num_attention_heads"],
        layernorm_epsilon=tower["layer_norm_eps"],
        add_bias_linear=True,
        add_qkv_bias=True,
        normalization="LayerNorm",
        activation_func=quick_gelu,
        **plain,
    )
    vision.vision_model_type = args.vision_model_type
    projection = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.hidden_size,
        num_attention_heads=1,
        add_bias_linear=True,
        activation_func=torch.nn.functional.gelu,
        **plain,
    )
    # Without Transformer Engine the class takes torch's own norm, which does not take a configuration.
    llava_model.CLIPViTModel = functools.partial(
        llava_model.CLIPViTModel, ln_pre_impl=WrappedTorchNorm, ln_post_impl=WrappedTorchNorm
    )
    return llava_model.LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=args.max_position_embeddings,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=args.disable_vision_class_token,
        vision_projection_config=projection,
        vision_projection_layer_spec=MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
        ),
        parallel_output=False,
        language_position_embedding_type=args.position_embedding_type,
        language_rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        img_h=args.img_h,
        img_w=args.img_w,
        patch_dim=args.patch_dim,
        image_token_index=args.flagscale_convert_towers["outer"]["image_token_index"],
    ).eval()


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run the whole model: an image's one token becomes as many as it has features."""
    length = int(inputs["length"])
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    tokens = inputs["tokens"]
    with torch.no_grad():
        return model(
            images=inputs["image"],
            input_ids=tokens,
            position_ids=torch.arange(tokens.shape[1])[None],
            attention_mask=mask,
            num_image_tiles=torch.ones(1, dtype=torch.int),
        )[0]


def main(path: str) -> None:
    adapt_to_cpu()
    adapt_megatron()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(path).read_text())
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}.store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    folder = f"{request['dist']}/release"
    model = build(dist_checkpointing.load_common_state_dict(folder)["args"])
    inputs = load_file(request["inputs"])
    answers = {}
    for kind in ("dist", "ranks"):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))  # what is not loaded shows
        if kind == "dist":
            state = dist_checkpointing.load({"model": sharded(model)}, folder)["model"]
        else:
            state = torch.load(request["ranks"], weights_only=False)["model"]
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or [name for name in missing if "_extra_state" not in name]:
            raise SystemExit(f"{kind}: missing {missing}, unexpected {unexpected}")
        answers[kind] = logits(model, inputs).contiguous()
    save_file(answers, request["answers"])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # the checkpoint reader starts a process that imports this file again
    main(sys.argv[1])
