"""How a model is spread over processes: world, heads, widths, sequence, batches.

Twins of Megatron's `validate_args`, `ModelParallelConfig`, `TransformerConfig` and
`parallel_state.initialize_model_parallel`.
"""

from __future__ import annotations

import math

from flagscale_config.arithmetic.options import (
    Check,
    Options,
    Rule,
    divisors,
    listed,
    nearest_multiples,
    needs,
)

__all__ = ["CHECKS"]


def _check_shards(options: Options) -> None:
    """Check that weights are cut at least as fine as tensors, and evenly so."""
    for name, size in (
        ("tensor_parallel_num_weight_shards", options.tp),
        ("expert_tensor_parallel_num_weight_shards", options.etp),
    ):
        shards = options[name]
        if shards is not None and (shards < size or shards % size):
            near = nearest_multiples(shards, size)
            options.error(name, f"{shards} is not a multiple of the tensor-parallel size {size}; use {near}")


def _check_world(options: Options) -> None:
    world, size = options.world_size, options.model_size
    if world is None:
        return
    if world % size:
        sizes = f"tensor {options.tp} x pipeline {options.pp} x context {options.cp} = {size}"
        near = nearest_multiples(world, size)
        options.error(
            options.blame(
                "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
            ),
            f"{world} processes are not a multiple of {sizes}; use {near} processes",
        )
    own_size = options.ep > 1 or options.has("expert_tensor_parallel_size")
    size = options.expert_size
    if own_size and world % size:
        sizes = f"expert tensor {options.etp} x expert {options.ep} x pipeline {options.pp} = {size}"
        near = nearest_multiples(world, size)
        options.error(
            options.blame("expert_model_parallel_size", "expert_tensor_parallel_size"),
            f"{world} processes are not a multiple of {sizes}; use {near} processes",
        )


def _check_instances(options: Options) -> None:
    """Check that the copies of the model can be divided among several distributed optimizers."""
    count, dp, world = (
        options["num_distributed_optimizer_instances"],
        options.data_parallel_size,
        options.world_size,
    )
    if count == 1 or dp is None or world is None or world % options.expert_size:
        return
    for copies in (dp * options.cp, world // options.expert_size):
        if count < 1 or copies % count:
            allowed = listed(divisors(math.gcd(dp * options.cp, world // options.expert_size)))
            message = f"{copies} copies cannot be divided among {count}; use one of {allowed}"
            options.error("num_distributed_optimizer_instances", message)
            return


def _check_heads(options: Options) -> None:
    if not options.has("num_attention_heads", "hidden_size"):
        return
    heads, hidden, tp = options["num_attention_heads"], options["hidden_size"], options.tp
    if heads % tp:
        message = f"{heads} attention heads cannot be shared by {tp}; use one of {listed(divisors(heads))}"
        options.error(options.blame("tensor_model_parallel_size", "num_attention_heads"), message)
    if not options.has("kv_channels") and hidden % heads:
        near = nearest_multiples(hidden, heads)
        message = f"{hidden} is not a multiple of {heads} heads; use {near}, or set kv_channels"
        options.error("hidden_size", message)


def _check_groups(options: Options) -> None:
    if not options["group_query_attention"]:
        if options.given.get("num_query_groups", 1) != 1:
            message = "has no effect without group_query_attention: true; every head then has its own keys"
            options.note("num_query_groups", message)
        return
    if not options.has("num_attention_heads"):
        return
    heads, groups, tp = options["num_attention_heads"], options["num_query_groups"], options.tp
    if heads % groups:
        allowed = listed(divisors(heads))
        message = f"{heads} attention heads cannot form {groups} groups; use one of {allowed}"
        options.error("num_query_groups", message)
    if groups % tp and tp % groups:
        size = f"tensor_model_parallel_size {tp}"
        near = f"use {nearest_multiples(groups, tp)}, or tensor parallelism {listed(divisors(groups))}"
        message = f"{groups} query groups are neither multiple nor divisor of {size}; {near}"
        options.error("num_query_groups", message)


def _check_widths(options: Options) -> None:
    """Check that every matrix can be cut; Megatron finds out while it builds the layers."""
    for name, size, axis in (
        ("ffn_hidden_size", options.tp, "tensor_model_parallel_size"),
        ("moe_ffn_hidden_size", options.etp, "expert_tensor_parallel_size"),
        ("moe_shared_expert_intermediate_size", options.tp, "tensor_model_parallel_size"),
        ("padded_vocab_size", options.tp, "tensor_model_parallel_size"),
    ):
        width = options.given.get(name)
        if width is not None and width % size:
            near = nearest_multiples(width, size)
            options.error(name, f"{width} is not a multiple of {axis} {size}; use {near}")


def _check_lengths(options: Options) -> None:
    limit, cp = options["max_position_embeddings"], options.cp
    for name in ("seq_length", "decoder_seq_length"):
        length = options[name]
        if length is not None and limit is not None and length > limit:
            message = f"{length} is more than max_position_embeddings {limit}; shorten it or raise that"
            options.error(name, message)
    length = options["seq_length"]
    if length is not None and cp > 1 and length % (2 * cp):
        near = nearest_multiples(length, 2 * cp)
        message = f"{length} is not a multiple of 2 x context_parallel_size {cp}; use {near}"
        options.error("seq_length", message)
    if options["sequence_parallel"] and options.tp == 1:
        message = "has no effect with tensor_model_parallel_size 1; Megatron switches it off"
        options.note("sequence_parallel", message)


def _check_context(options: Options) -> None:
    """Check how the parts of a sequence are exchanged."""
    levels, kinds = options.values("hierarchical_context_parallel_sizes"), options.values("cp_comm_type")
    product, cp, layers = math.prod(levels), options.cp, options["num_layers"]
    if levels and product != cp:
        message = f"multiply to {product}, not to context_parallel_size {cp}"
        options.error("hierarchical_context_parallel_sizes", message)
    if "a2a+p2p" in kinds and not levels:
        options.error("cp_comm_type", "a2a+p2p needs hierarchical_context_parallel_sizes, such as [2, 4]")
    if cp > 1 and len(kinds) > 1 and layers is not None and len(kinds) != layers:
        options.error("cp_comm_type", f"names {len(kinds)} layers of {layers}; give one for all, or each")


def _check_batches(options: Options) -> None:
    dp, micro, whole = options.data_parallel_size, options["micro_batch_size"], options["global_batch_size"]
    if options.has("rampup_batch_size"):
        message = "is ignored by Megatron 0.19; write step_batch_size_schedule, such as '0:16 300000:32'"
        options.note("rampup_batch_size", message)
    if dp is None or micro is None:
        return
    if options.has("step_batch_size_schedule"):
        return
    if whole is not None and not options["decrease_batch_size_if_needed"]:
        _check_batch(options, "global_batch_size", (whole, micro), dp)
    own = [name for name in ("eval_global_batch_size", "eval_micro_batch_size") if options.has(name)]
    if own or whole is not None:
        whole = whole or micro * dp
        sizes = (options["eval_global_batch_size"] or whole, options["eval_micro_batch_size"] or micro)
        if own or options["decrease_batch_size_if_needed"]:
            _check_batch(options, own[0] if own else "global_batch_size", sizes, dp)


def _check_batch(options: Options, name: str, sizes: tuple[int, int], dp: int) -> None:
    """Check that a batch of all processes is made of whole micro batches of each."""
    whole, micro = sizes
    if micro < 1 or whole < 1 or whole % (micro * dp) == 0:
        return
    unit = f"micro batch {micro} x data parallel {dp} = {micro * dp}"
    fitting = [size for size in divisors(whole) if whole % (size * dp) == 0]
    other = f", or micro batch {listed(fitting)}" if fitting else ""
    near = nearest_multiples(whole, micro * dp)
    options.error(name, f"{whole} is not a multiple of {unit}; use {near}{other}")


_HYBRID = "hybrid_context_parallel"

CHECKS: tuple[Check, ...] = (
    _check_shards,
    _check_world,
    _check_instances,
    _check_heads,
    _check_groups,
    _check_widths,
    _check_lengths,
    _check_context,
    _check_batches,
    Rule(_HYBRID, lambda o: o[_HYBRID] and o.pp > 1, "does not go with pipeline parallelism"),
    Rule(_HYBRID, lambda o: o[_HYBRID] and o["enable_cuda_graph"], "does not go with enable_cuda_graph"),
    Rule(_HYBRID, lambda o: o[_HYBRID] and o["use_megatron_fsdp"], "does not go with use_megatron_fsdp"),
    Rule(
        _HYBRID,
        lambda o: o[_HYBRID] and o["dataloader_type"] not in {None, "single"},
        "needs dataloader_type single ({dataloader_type} given)",
    ),
    *needs(_HYBRID, "calculate_per_token_loss"),
    Rule(
        "step_batch_size_schedule",
        lambda o: o.has("step_batch_size_schedule", "global_batch_size"),
        "does not go with global_batch_size; the schedule says how large batches are",
    ),
    Rule(
        "padded_vocab_size",
        lambda o: o.has("padded_vocab_size", "vocab_size") and o["padded_vocab_size"] < o["vocab_size"],
        "{padded_vocab_size} is smaller than vocab_size {vocab_size}; tokens would have no embedding",
    ),
)
