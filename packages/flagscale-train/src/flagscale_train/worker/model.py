"""The model's configuration from Megatron's arguments, with the layers this device has."""

from __future__ import annotations

from functools import partial
from typing import Any

from flagscale_train.worker import lora
from flagscale_train.worker.layers import local_spec

__all__ = ["configure"]


def configure(args: Any) -> Any:
    """Build Megatron's GPTModelConfig.

    Args:
        args: Megatron's validated arguments.

    Returns:
        The configuration; its layers are Megatron's own with Transformer Engine and plain torch ones without.
    """
    from megatron.training.argument_utils import gpt_config_from_args  # not before 0.18

    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 forgets it, and takes 8
    if args.transformer_impl == "local" and args.spec is None:
        config.transformer_layer_spec = local_spec
    if lora.is_asked_for(args):
        config.pre_wrap_hooks.append(partial(lora.attach, args=args))
    return config
