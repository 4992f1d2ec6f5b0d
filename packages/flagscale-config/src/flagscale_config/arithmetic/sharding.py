"""The state of training spread over copies of the model: distributed optimizer, FSDP, and what overlaps.

Twins of Megatron's `validate_args`.
"""

from __future__ import annotations

from flagscale_config.arithmetic.options import Check, Options, Rule, clashes, needs
from flagscale_config.arithmetic.pipeline import is_interleaved

__all__ = ["CHECKS"]

_TORCH, _MEGATRON, _GATHER = "use_torch_fsdp2", "use_megatron_fsdp", "overlap_param_gather"
_STEP = "overlap_param_gather_with_optimizer_step"


def _check_torch_fsdp(options: Options) -> None:
    if not options[_TORCH]:
        return
    _check_sizes_of_fsdp(options)
    for name in ("no_gradient_accumulation_fusion", "untie_embeddings_and_output_weights"):
        if not options[name]:
            options.error(_TORCH, f"needs {name}")
    if options["ckpt_format"] not in {"torch_dist", "torch_dcp"}:
        options.error(_TORCH, "needs ckpt_format torch_dist or torch_dcp")
    for name in ("use_distributed_optimizer", "fp16"):
        if options[name]:
            options.error(_TORCH, f"does not go with {name}")


def _check_sizes_of_fsdp(options: Options) -> None:
    for name in ("pipeline_model_parallel_size", "expert_model_parallel_size"):
        if options[name] > 1:
            options.error(_TORCH, f"does not go with {name} of more than 1")


def _check_megatron_fsdp(options: Options) -> None:
    if not options[_MEGATRON]:
        return
    if options["ckpt_format"] != "fsdp_dtensor":
        options.error(_MEGATRON, "needs ckpt_format fsdp_dtensor ({ckpt_format} given)".format_map(options))
    if options["optimizer"] not in {"sgd", "adam"}:
        options.error(_MEGATRON, "needs optimizer adam or sgd ({optimizer} given)".format_map(options))
    for name in ("moe_single_grouped_weight", "moe_single_grouped_bias"):
        if options[name]:
            options.error(_MEGATRON, f"does not go with {name}")
    strategy = options["data_parallel_sharding_strategy"]
    if strategy == "optim_grads_params" and options.has("check_weight_hash_across_dp_replicas_interval"):
        name = "check_weight_hash_across_dp_replicas_interval"
        options.error(name, "does not go with data_parallel_sharding_strategy optim_grads_params")
    if strategy == "no_shard" and options["init_model_with_meta_device"]:
        options.error(
            "init_model_with_meta_device", "does not go with data_parallel_sharding_strategy no_shard"
        )


def _check_other_optimizers(options: Options) -> None:
    """Check optimizers other than Adam and SGD."""
    kind = options["optimizer"]
    if kind in {"adam", "sgd"}:
        return
    if options[_TORCH]:
        options.error("optimizer", f"{kind} does not go with {_TORCH}")
    if options["ckpt_format"] not in {"torch", "torch_dist"}:
        options.error("optimizer", f"{kind} needs ckpt_format torch or torch_dist")


def _check_overlapped_step(options: Options) -> None:
    if not options[_STEP]:
        return
    for name in ("use_distributed_optimizer", _GATHER):
        if not options[name] and not (name == "use_distributed_optimizer" and options[_MEGATRON]):
            options.error(_STEP, f"needs {name}")
    if not is_interleaved(options):
        options.error(_STEP, "needs interleaved stages: num_virtual_stages_per_pipeline_rank")
    if options["ckpt_format"] != "torch":
        options.error(_STEP, "needs ckpt_format torch ({ckpt_format} given)".format_map(options))


def _check_gloo(options: Options) -> None:
    """Check what needs Gloo process groups."""
    if not options["disable_gloo_process_groups"] or not options["use_distributed_optimizer"]:
        return
    if options["optimizer"] not in {"adam", "sgd"}:
        return
    if options["ckpt_format"] == "torch":
        options.error("disable_gloo_process_groups", "needs a distributed ckpt_format: torch_dist")
    if (
        options["dist_ckpt_optim_fully_reshardable"]
        and options["distrib_optim_fully_reshardable_mem_efficient"]
    ):
        name = "distrib_optim_fully_reshardable_mem_efficient"
        options.error(name, "does not go with disable_gloo_process_groups")


def _cuts_finer(options: Options) -> bool:
    """Whether weights are cut finer than tensors."""
    shards = options["tensor_parallel_num_weight_shards"] or options.tp
    expert_shards = options["expert_tensor_parallel_num_weight_shards"] or options.etp
    return bool(shards > options.tp or expert_shards > options.etp)


def _check_shards(options: Options) -> None:
    """Check what weights cut finer than tensors do not go with."""
    if not _cuts_finer(options):
        return
    name = options.blame("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards")
    if options["ddp_average_in_collective"]:
        options.error(name, "does not go with ddp_average_in_collective")
    if options["ckpt_format"] not in {"torch", "torch_dist"}:
        options.error(name, "needs ckpt_format torch or torch_dist")
    if options["num_distributed_optimizer_instances"] > 1:
        options.error(name, "does not go with num_distributed_optimizer_instances of more than 1")
    if options["fp4_format"] and not options["fp4_param_gather"]:
        options.error(name, "with fp4_format needs fp4_param_gather")
    gathers = ("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag")
    if options["fp8_recipe"] == "mxfp8" and not all(options[other] for other in gathers):
        options.error(name, f"with fp8_recipe mxfp8 needs {' and '.join(gathers)}")
    if (
        options["dist_ckpt_optim_fully_reshardable"]
        and options["distrib_optim_fully_reshardable_mem_efficient"]
    ):
        options.error(name, "does not go with distrib_optim_fully_reshardable_mem_efficient")


CHECKS: tuple[Check, ...] = (
    _check_torch_fsdp,
    _check_megatron_fsdp,
    _check_other_optimizers,
    _check_overlapped_step,
    _check_gloo,
    _check_shards,
    Rule(
        _GATHER,
        lambda o: (
            o[_GATHER]
            and not (o["use_distributed_optimizer"] or o[_MEGATRON] or o["optimizer"] == "dist_muon")
        ),
        "needs use_distributed_optimizer",
    ),
    *needs(_GATHER, "overlap_grad_reduce"),
    *needs("fsdp_manual_registration", _MEGATRON, "use_nccl_ub"),
    Rule(
        "tp_comm_overlap",
        lambda o: o["tp_comm_overlap"] and not (o["sequence_parallel"] and o.tp > 1),
        "needs sequence_parallel and tensor_model_parallel_size of more than 1",
    ),
    Rule(
        "sharp_enabled_group",
        lambda o: o["sharp_enabled_group"] and not o["use_sharp"],
        "needs use_sharp",
    ),
    Rule(
        "sharp_enabled_group",
        lambda o: (
            o["use_sharp"]
            and o["sharp_enabled_group"] == "dp_replica"
            and o["num_distributed_optimizer_instances"] == 1
        ),
        "dp_replica needs num_distributed_optimizer_instances of more than 1",
    ),
    *clashes("step_batch_size_schedule", "decrease_batch_size_if_needed"),
)
