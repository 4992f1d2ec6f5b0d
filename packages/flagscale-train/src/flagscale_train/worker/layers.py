"""Layers without Transformer Engine: Megatron's local ones with a norm that knows sequence parallel.

With Transformer Engine Megatron's own choice of layers is used, so nothing here is.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

__all__ = ["Norm", "local_spec"]


class Norm:
    """Builds the norm the configuration names, with its parameters marked for sequence parallel.

    Megatron's wrapper of torch's norms refuses sequence parallel, although all it takes is the mark on the
    parameters that makes Megatron sum their gradients over the tensor-parallel group.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_options: Any) -> Any:
        """Return a torch module; `config` is Megatron's TransformerConfig."""
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "layernorm_zero_centered_gamma needs Transformer Engine: remove it on this device"
            )
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def local_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Describe the decoder in plain torch layers; Megatron's model builder calls this.

    Args:
        config: Megatron's GPTModelConfig.
        vp_stage: virtual pipeline stage, None without virtual stages.

    Returns:
        The block's specification, with every torch norm replaced by `Norm`.
    """
    transformer = config.transformer
    block = get_gpt_decoder_block_spec(
        transformer, use_transformer_engine=False, normalization=transformer.normalization, vp_stage=vp_stage
    )
    _replace(block, seen=set())
    return block


def _replace(node: Any, seen: set[int]) -> None:
    """Walk the nested specification and swap the norm wherever it stands."""
    if id(node) in seen or inspect.isroutine(node) or isinstance(node, (str, type)):
        return
    seen.add(id(node))
    if isinstance(node, (list, tuple)):
        for item in node:
            _replace(item, seen)
        return
    places = node if isinstance(node, dict) else getattr(node, "__dict__", {})
    for name, value in list(places.items()):
        if value is WrappedTorchNorm:
            places[name] = Norm
        else:
            _replace(value, seen)
