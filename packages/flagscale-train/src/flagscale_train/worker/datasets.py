"""The dataset provider Megatron's trainer asks for: GPT datasets, or chats where `sft` is given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from flagscale_train.worker.chats import Chats, Renderer
from flagscale_train.worker.packing import PackedChats
from flagscale_train.worker.refusal import Refusal

__all__ = ["provide", "reads_data"]


def reads_data() -> bool:
    """Whether this rank needs batches: the pipeline's ends do, and all do that keep documents apart."""
    args = get_args()
    ends = mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
    apart = args.create_attention_mask_in_dataloader or args.reset_attention_mask or args.trains_on_chats
    return bool(ends or apart)


def provide(num_samples: list[int], vp_stage: int | None = None) -> Any:  # noqa: ARG001
    """Build train, validation and test datasets.

    Args:
        num_samples: samples wanted of each; None in a place means one epoch.
        vp_stage: virtual pipeline stage; the data do not depend on it.

    Returns:
        The three datasets, in that order; None for one that has no data.
    """
    args = get_args()
    built = _chats(num_samples) if args.trains_on_chats else _documents(num_samples)
    _refuse_too_few(built, num_samples)
    if built[1] is None:
        args.eval_iters = 0  # Megatron would ask the validation set that is not there for batches
    return built


def _refuse_too_few(built: Iterable[Any], num_samples: Sequence[int | None]) -> None:
    """A blend without weights is read once; where that is too little the training would end in its midst."""
    for dataset, wanted, split in zip(built, num_samples, Split, strict=True):
        there = wanted if dataset is None or isinstance(dataset, list) else len(dataset)
        if wanted is not None and there is not None and there < wanted:
            raise Refusal(
                f"data_path: without weights each dataset is read once, which gives {there} samples for "
                f"{split.name}, and {wanted} are asked for: give weights (1 for each repeats all alike), "
                "more data, or fewer steps"
            )


def _documents(num_samples: list[int]) -> Any:
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


def _chats(num_samples: Sequence[int | None]) -> list[PackedChats | None]:
    """Build datasets of chats: of the files of each split, or of shares of each file, in its order."""
    args = get_args()
    blend, per_split = get_blend_and_blend_per_split(args)
    if per_split is None:
        shares = parse_and_normalize_split(args.split)
        begins = [sum(shares[:number]) for number in range(4)]
        found = _rendered(blend[0])
        chosen = [[(chats, _share(len(chats), *begins[n : n + 2])) for chats in found] for n in range(3)]
    else:
        chosen = [
            [(chats, range(len(chats))) for chats in _rendered(paths[0] if paths else ())]
            for paths in per_split
        ]
    built = [
        PackedChats(
            files,
            split,
            length=args.seq_length,
            num_samples=wanted,
            seed=args.seed,
            masks=args.create_attention_mask_in_dataloader,
        )
        for files, split, wanted in zip(chosen, Split, num_samples, strict=True)
    ]
    _describe(built)
    if not len(built[0]) and num_samples[0]:
        raise Refusal("data_path: no chat of the training split has an answer within seq_length: raise it")
    return [each if each.num_sequences else None for each in built]


def _share(count: int, first: float, last: float) -> range:
    return range(round(first * count), round(last * count))


def _describe(built: Iterable[PackedChats]) -> None:
    for each in built:
        if each.num_sequences and torch.distributed.get_rank() == 0:
            print(  # noqa: T201 -- the log is this process's output
                f"chats for {each.index_split.name}: {each.num_chats} in {each.num_sequences} sequences, "
                f"which are {each.fill:.0%} full; {each.num_cut} cut at seq_length, {each.num_dropped} left "
                "out that had no answer before it",
                flush=True,
            )


def _rendered(paths: Iterable[str]) -> list[Chats]:
    """Render files that are not rendered yet, on one process of each host, and map them on all."""
    args = get_args()
    tokenizer = _tokenizer(args)
    folders = []
    for path in map(Path, paths):
        try:
            root = Path(args.data_cache_path or path.parent / "cache")
            folders.append((path, Chats.cache_folder(path, tokenizer, root)))
        except OSError as error:
            raise Refusal(f"data_path: {path}: {error.strerror}: a file of chats is expected") from None
    # First one process of all, then one of each host: where hosts share the folder nothing is left for these.
    for is_first in (torch.distributed.get_rank() == 0, int(os.environ.get("LOCAL_RANK", "0")) == 0):
        problem = _render_missing(folders, tokenizer) if is_first else None
        told: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, problem)
        if first := next(filter(None, told), None):
            raise Refusal(first)
    return [whole for _, folder in folders if (whole := Chats.whole(folder)) is not None]


def _render_missing(folders: Iterable[tuple[Path, Path]], tokenizer: Any) -> str | None:
    try:
        for path, folder in folders:
            if Chats.whole(folder) is None:
                Chats.render(path, Renderer(tokenizer), folder)
    except Refusal as refusal:
        return str(refusal)
    return None


def _tokenizer(args: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        args.tokenizer_model, trust_remote_code=getattr(args, "trust_remote_code", False)
    )
