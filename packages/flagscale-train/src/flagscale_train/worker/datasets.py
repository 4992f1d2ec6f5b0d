"""The dataset provider Megatron's trainer asks for: GPT datasets from Megatron's options."""

from __future__ import annotations

from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

__all__ = ["provide", "reads_data"]


def reads_data() -> bool:
    """Whether this rank needs batches: the pipeline's ends do, and all do if masks come from the data."""
    ends = mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
    return bool(ends or get_args().create_attention_mask_in_dataloader)


def provide(num_samples: list[int], vp_stage: int | None = None) -> Any:  # noqa: ARG001
    """Build train, validation and test datasets.

    Args:
        num_samples: samples wanted of each; None in a place means one epoch.
        vp_stage: virtual pipeline stage; the data do not depend on it.

    Returns:
        The three datasets, in that order; None for one that has no data.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        data_parallel_size=args.data_parallel_size,
    )
    kind = MockGPTDataset if config.mock else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads_data, config).build()


# Every rank builds and reads its own share, so that no batch is sent between ranks.
provide.is_distributed = True  # type: ignore[attr-defined]
