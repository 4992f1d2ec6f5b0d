"""The course of a training: schedule, rates, data, checkpoints.

Twins of Megatron's `validate_args` and of its `OptimizerParamScheduler`.
"""

from __future__ import annotations

from flagscale_config.arithmetic.options import Check, Options, Rule, clashes, nearest_multiples, needs

__all__ = ["CHECKS"]


def _check_schedule(options: Options) -> None:
    if options["skip_train"]:
        return
    iters, samples = options["train_iters"], options["train_samples"]
    if iters and samples:
        options.error("train_samples", "does not go with train_iters; give one of them")
        return
    unit, other = ("samples", "iters") if iters else ("iters", "samples")
    if not iters and not samples:
        return
    for name in (f"lr_decay_{unit}", f"lr_warmup_{unit}"):
        if options[name]:
            length = "train_iters" if iters else "train_samples"
            options.error(name, f"does not go with {length}; use {name.replace(unit, other)}")
    warmup = f"lr_warmup_{other}"
    if options.has("lr_warmup_fraction") and options[warmup]:
        options.error(warmup, "does not go with lr_warmup_fraction; give one of them")
        return
    decay = f"lr_decay_{other}" if options[f"lr_decay_{other}"] else f"train_{other}"
    if options[warmup] and options[warmup] >= options[decay]:
        # Megatron asserts it without a word, after a minute of loading.
        options.error(
            warmup, f"{options[warmup]} is not less than {decay} {options[decay]}; lower it or raise that"
        )


def _check_rates(options: Options) -> None:
    lr, low = options["lr"], options["min_lr"]
    if lr is not None and low is not None and low > lr:
        options.error("min_lr", f"{low} is more than lr {lr}; lower it")
    style, ends = options["weight_decay_incr_style"], ("start_weight_decay", "end_weight_decay")
    for name in ends:
        if style == "constant" and options.has(name):
            options.error(name, f"needs weight_decay_incr_style linear or cosine ({style} given)")
        elif style != "constant" and not options.has(name):
            options.error("weight_decay_incr_style", f"{style} needs {name}")


def _check_saving(options: Options) -> None:
    if options.has("save") and not options.has("save_interval"):
        options.error("save", "needs save_interval, the number of steps between checkpoints")
    every, keep = options["save_interval"], options["save_retain_interval"]
    if options.has("save") and every and keep is not None and (keep < 1 or keep % every):
        message = f"{keep} is not a multiple of save_interval {every}; use {nearest_multiples(keep, every)}"
        options.error("save_retain_interval", message)
    if options.has("save", "save_params_interval") and options["overlap_param_gather"]:
        options.error("save_params_interval", "does not go with overlap_param_gather")
    every, log = options["log_memory_interval"], options["log_interval"]
    if every is not None and every % log:
        message = f"{every} is not a multiple of log_interval {log}; use {nearest_multiples(every, log)}"
        options.error("log_memory_interval", message)


def _check_data(options: Options) -> None:
    split = [name for name in ("train_data_path", "valid_data_path", "test_data_path") if options.has(name)]
    sources = [bool(options["mock_data"]), bool(options["data_path"]), any(options[name] for name in split)]
    if sum(sources) > 1:
        message = "more than one source of data; give one of data_path, train/valid/test_data_path, mock_data"
        options.error(
            options.blame("data_path", "train_data_path", "valid_data_path", "test_data_path", "mock_data"),
            message,
        )
    if options.has("data_path", "data_args_path"):
        options.error("data_args_path", "does not go with data_path; it names the file that holds it")
    if split and options.has("per_split_data_args_path"):
        options.error(
            "per_split_data_args_path", f"does not go with {split[0]}; it names the file that holds it"
        )
    if options["num_dataset_builder_threads"] < 1:
        options.error("num_dataset_builder_threads", "must be at least 1")


def _check_fim(options: Options) -> None:
    """Check fill-in-the-middle data."""
    if not options["fim_data"]:
        return
    if options["mock_data"]:
        options.error("fim_data", "does not go with mock_data")
    for name in ("fim_rate", "fim_spm_rate"):
        if not options[name]:
            options.error(name, "must be more than 0 with fim_data")


_DISTRIBUTED = ("torch_dist", "torch_dcp", "fsdp_dtensor")
_LOCAL = "non_persistent_ckpt_type"

CHECKS: tuple[Check, ...] = (
    _check_schedule,
    _check_rates,
    _check_saving,
    _check_data,
    _check_fim,
    Rule(
        "ckpt_format",
        lambda o: o["ckpt_format"] == "torch_dcp" and not o["use_torch_fsdp2"],
        "torch_dcp needs use_torch_fsdp2; use torch_dist",
    ),
    Rule(
        "ckpt_format",
        lambda o: o["ckpt_format"] == "torch_dcp" and (o.tp > 1 or o.pp > 1),
        "torch_dcp does not go with tensor or pipeline parallelism; use torch_dist",
    ),
    Rule(
        "ckpt_format",
        lambda o: o["ckpt_format"] == "fsdp_dtensor" and not o["use_megatron_fsdp"],
        "fsdp_dtensor needs use_megatron_fsdp; use torch_dist",
    ),
    *needs("ckpt_convert_format", "ckpt_convert_save", "load"),
    *needs("load_main_params_from_ckpt", "no_load_optim"),
    Rule(
        "override_ckpt_iteration",
        lambda o: o.has("override_ckpt_iteration") and o["finetune"],
        "does not go with finetune",
    ),
    Rule(
        _LOCAL,
        lambda o: o[_LOCAL] == "local" and not o["non_persistent_local_ckpt_dir"],
        "local needs non_persistent_local_ckpt_dir",
    ),
    Rule(_LOCAL, lambda o: o[_LOCAL] == "in_memory", "in_memory is not built yet; use global or local"),
    *needs("replication", "replication_jump"),
    Rule("replication", lambda o: o["replication"] and o[_LOCAL] != "local", f"needs {_LOCAL} local"),
    *needs("logits_save_dir", "logits_save_top_k", "async_save"),
    Rule(
        "async_save",
        lambda o: o["logits_save_dir"] and o["async_save"] and _is_async_off(o),
        "needs use_persistent_ckpt_worker, without which Megatron switches it off",
    ),
    *clashes("batch_size", "micro_batch_size"),
    Rule("warmup", lambda o: o["warmup"] is not None, "is gone; use lr_warmup_fraction"),
    Rule(
        "model_parallel_size",
        lambda o: o["model_parallel_size"] is not None,
        "is gone; use tensor_model_parallel_size",
    ),
    Rule(
        "checkpoint_activations", lambda o: o["checkpoint_activations"], "is gone; use recompute_granularity"
    ),
    Rule(
        "encoder_num_layers",
        lambda o: o.has("num_layers", "encoder_num_layers"),
        "does not go with num_layers; keep that",
    ),
    Rule(
        "encoder_seq_length",
        lambda o: o.has("seq_length", "encoder_seq_length"),
        "does not go with seq_length; keep that",
    ),
)


def _is_async_off(options: Options) -> bool:
    return options["ckpt_format"] in _DISTRIBUTED and not options["use_persistent_ckpt_worker"]
