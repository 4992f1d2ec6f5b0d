"""Checks across Megatron options: twins of assertions Megatron makes once the cluster has been started.

The twins are proven against Megatron's own code by `tests/test_megatron_twins.py`, which also lists the
assertions that have none, and why. Every message has the numbers and the nearest values that would work.

One module per subject: `layout` (processes, heads, widths, batches), `pipeline`, `experts`, `attention`,
`precision`, `memory`, `sharding`, `training`, `fine_tuning`; `options` is what they look at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flagscale_config.arithmetic import (
    attention,
    experts,
    fine_tuning,
    layout,
    memory,
    pipeline,
    precision,
    sharding,
    training,
)
from flagscale_config.arithmetic.options import Options, divisors, nearest_multiples
from flagscale_config.arithmetic.pipeline import stages_of_layout, virtual_stages
from flagscale_config.findings import Findings
from flagscale_config.runner import Runner

__all__ = [
    "check_train",
    "divisors",
    "nearest_multiples",
    "padded_vocab_size",
    "stages_of_layout",
    "virtual_stages",
]

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "seq_length")
_POSITIVE = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "seq_length",
    "max_position_embeddings",
    "micro_batch_size",
    "global_batch_size",
    "eval_global_batch_size",
    "eval_micro_batch_size",
    "save_interval",
    "log_interval",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_virtual_stages_per_pipeline_rank",
)
_SUBJECTS = (layout, pipeline, experts, attention, precision, memory, sharding, training, fine_tuning)


def check_train(given: Mapping[str, Any], runner: Runner | None, findings: Findings) -> None:
    """Report every contradiction between the options of a training task, and with the number of processes."""
    options = Options(given, findings, runner.world_size if runner is not None else None)
    if not _check_sizes(options):
        return
    for subject in _SUBJECTS:
        for check in subject.CHECKS:
            check(options)


def _check_sizes(options: Options) -> bool:
    """Report sizes that are missing or not positive; nothing else can be computed with them."""
    before = len(options.findings.problems)
    for name in _POSITIVE:
        value = options.given.get(name)
        if isinstance(value, int) and value < 1:
            options.error(name, f"must be at least 1 ({value} given)")
    if not options["use_checkpoint_args"]:
        for name in _REQUIRED:
            twin = {"num_layers": "encoder_num_layers", "seq_length": "encoder_seq_length"}.get(name, name)
            is_derived = name == "num_layers" and options.has("hybrid_layer_pattern")
            is_excused = is_derived or name in options.findings.excused
            if not options.has(name) and not options.has(twin) and not is_excused:
                message = f"{name} is required; set it in train.model"
                options.findings.error("config/required", ("train",), message)
    return len(options.findings.problems) == before


def padded_vocab_size(vocab_size: int, divisible_by: int = 128, tensor_parallel: int = 1) -> int:
    """Return the rows of Megatron's embedding: a vocabulary filled up to a multiple of both sizes.

    The formula is that of Megatron's `calculate_padded_vocab_size`.

    Args:
        vocab_size: tokens of the tokenizer, at least 1.
        divisible_by: `make_vocab_size_divisible_by`, at least 1.
        tensor_parallel: `tensor_model_parallel_size`, at least 1.
    """
    multiple = divisible_by * tensor_parallel
    return math.ceil(vocab_size / multiple) * multiple
