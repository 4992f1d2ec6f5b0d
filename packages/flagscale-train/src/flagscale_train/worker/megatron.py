"""The seam to the Megatron that is installed: megatron-core 0.19 or 0.17, which are called differently.

What a version lacks decides, not its number, so that a fork goes the way of the version it was made from. All
other modules of the worker call what every Megatron has; what one of them gets wrong is mended here too.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import multi_token_prediction
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import argument_utils, dist_signal_handler, initialize, pretrain

from flagscale_train.worker import lora
from flagscale_train.worker.bounds import of_samples
from flagscale_train.worker.model import configure
from flagscale_train.worker.refusal import Refusal

__all__ = ["adopt", "build_model", "mend", "slice_for_context", "train"]

_HAS_CONTAINER = hasattr(argument_utils, "gpt_config_from_args")
"""Newer ones take a container of configurations; older ones read arguments and ask for a model."""

_SLICING = inspect.signature(get_batch_on_this_cp_rank).parameters


def adopt(args: Any) -> None:
    """Let Megatron take arguments that were parsed and checked already, where it would parse them again."""
    if _HAS_CONTAINER:
        return
    initialize.parse_args = lambda *_arguments, **_named: args
    initialize.validate_args = lambda *_arguments, **_named: args
    initialize.set_global_variables = lambda *_arguments, **_named: None


def train(
    args: Any, datasets_provider: Callable[..., Any], forward: Callable[..., Any], num_roll_backs: int = 0
) -> None:
    """Call Megatron's trainer.

    Args:
        args: Megatron's validated arguments.
        datasets_provider: builds the datasets.
        forward: one forward step.
        num_roll_backs: how often the processes of this run started again; they meet in a room of their own.
    """
    store = _store(num_roll_backs) if num_roll_backs else None
    if _HAS_CONTAINER:
        container = argument_utils.pretrain_cfg_container_from_args(args, configure(args))
        pretrain(container, datasets_provider, ModelType.encoder_or_decoder, forward, store=store)
    else:
        pretrain(datasets_provider, _provide_model, ModelType.encoder_or_decoder, forward, store=store)


def _store(num_roll_backs: int) -> torch.distributed.Store:
    """Return a part of torchrun's store that the processes before did not write to."""
    whole = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    return torch.distributed.PrefixStore(f"roll-back-{num_roll_backs}", whole)


def build_model(args: Any, groups: Any) -> Any:
    """Build the whole model in this process, without data parallelism around it.

    Args:
        args: Megatron's validated arguments.
        groups: Megatron's process groups.
    """
    if not _HAS_CONTAINER:
        return _provide_model(args=args)
    config = configure(args)
    model = config.get_builder_cls()(config).build_model(groups)
    for hook in config.pre_wrap_hooks:
        hook([model])
    return model


def _provide_model(
    pre_process: bool = True,  # noqa: FBT001, FBT002 -- Megatron's signature
    post_process: bool = True,  # noqa: FBT001, FBT002
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
    args: Any = None,
) -> Any:
    """Build one pipeline stage, as Megatron's own scripts did before it had builders."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    from flagscale_train.worker.layers import local_spec

    args = args or get_args()
    if lora.is_asked_for(args) and vp_stage is not None:
        raise Refusal(
            "num_layers_per_virtual_pipeline_stage: with peft_type lora it needs megatron-core 0.18 or "
            "newer: pip install -U megatron-core, or remove it"
        )
    config = config or core_transformer_config_from_args(args)
    has_engine = args.transformer_impl != "local"
    if has_engine:
        block = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=True,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
    else:
        block = local_spec(SimpleNamespace(transformer=config), vp_stage)
    ahead = None
    if args.mtp_num_layers is not None:
        ahead = get_gpt_mtp_block_spec(config, block, use_transformer_engine=has_engine, vp_stage=vp_stage)
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=ahead,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    if lora.is_asked_for(args):
        lora.attach([model], args)
    return model


def slice_for_context(batch: dict[str, Any], group: Any) -> dict[str, Any]:
    """Return a rank's part of whole sequences under context parallelism."""
    choice = {} if "is_hybrid_cp" not in _SLICING else {"is_hybrid_cp": False}
    sliced: dict[str, Any] = get_batch_on_this_cp_rank(batch, cp_group=group, **choice)
    return sliced


def mend() -> None:
    """Correct what Megatron computes wrongly or refuses without need; call once, before training."""
    _predict_ahead_alike()
    _know_any_backend()


def _predict_ahead_alike() -> None:
    """Let multi-token prediction count and see the same tokens in every layout and with all layers.

    Told of the bounds of documents Megatron leaves out what is predicted across them, but only with
    Transformer Engine, for plain layers have masks instead. Here it is left out at the end of a sequence
    alone.

    Megatron divides their loss by the number of tokens of its own rank. Under context parallelism the rank
    that has the end of the sequence has fewer, the end being cut off, so that its tokens weigh more than the
    others'. The mean number over the ranks makes all weigh the same.
    """
    real = multi_token_prediction.roll_tensor

    def roll_tensor(tensor: Any, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        packed = named.get("packed_seq_params")
        if packed is not None and tensor is not None:
            named["packed_seq_params"] = of_samples(packed, tensor.shape[-1])
        rolled, count = real(tensor, *arguments, **named)
        group = named.get("cp_group")
        if group is not None and group.size() > 1:
            count = count.clone().float()
            torch.distributed.all_reduce(count, group=group)
            count /= group.size()
        return rolled, count

    multi_token_prediction.roll_tensor = roll_tensor


def _know_any_backend() -> None:
    """Let signals be agreed on by the collectives of any chip: Megatron knows nccl and gloo, and raises."""
    real = dist_signal_handler.get_device

    def get_device(local_rank: int | None = None) -> torch.device:
        if torch.distributed.get_backend() in ("nccl", "gloo"):
            return real(local_rank)
        return torch.device("cuda" if local_rank is None else f"cuda:{local_rank}")

    dist_signal_handler.get_device = get_device
