"""Checks across Megatron options: twins of assertions Megatron makes once the cluster has been started.

The twins are proven against Megatron's own code by `tests/test_megatron_twins.py`. Every message has the
numbers and the nearest values that would work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flagscale_config.findings import Findings
from flagscale_config.options import option_table
from flagscale_config.runner import Runner

__all__ = ["check_train", "virtual_stages"]

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
    "seq_length",
    "max_position_embeddings",
    "micro_batch_size",
    "global_batch_size",
    "save_interval",
)
_SPLITS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


class Options:
    """The options of a run as Megatron would see them: what is not given has Megatron's default."""

    def __init__(self, given: Mapping[str, Any], findings: Findings, world_size: int | None) -> None:
        self.given = given
        self.findings = findings
        self.world_size = world_size
        self._table = option_table("megatron").options

    def __getitem__(self, name: str) -> Any:
        value = self.given.get(name)
        option = self._table.get(name)
        if value is not None or option is None:
            return value
        # The default of `no_x` in the table is that of the attribute it switches off, which is true.
        return False if option.kind == "false" else option.default

    def has(self, *names: str) -> bool:
        """Whether every option named has a value."""
        return all(self[name] is not None for name in names)

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model."""
        size = self["tensor_model_parallel_size"] * self["pipeline_model_parallel_size"]
        return int(size * self["context_parallel_size"])

    @property
    def data_parallel_size(self) -> int | None:
        """Copies of the model, when the number of processes is known and fits."""
        if self.world_size is None or self.world_size % self.model_size:
            return None
        return self.world_size // self.model_size

    def error(self, name: str, message: str) -> None:
        """Report a contradiction at the place where `name` (or the first given of others) is set."""
        self.findings.error("config/arithmetic", self.path(name), message, self[name])

    def path(self, name: str) -> Sequence[str | int]:
        """Return where an option stands in the file; the train section when it is a default."""
        return self.findings.option_paths.get(name, ("train",))

    def blame(self, *names: str) -> str:
        """Return the first of the options that is given, to point at."""
        return next((name for name in names if name in self.given), names[0])


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number in order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest_multiples(number: int, of: int) -> str:
    """Return the multiples of `of` just below and above a number, as text."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def _listed(values: Sequence[int], limit: int = 12) -> str:
    """Return a list of valid values as text."""
    shown = ", ".join(map(str, values[:limit]))
    return shown + (", ..." if len(values) > limit else "")


def check_train(given: Mapping[str, Any], runner: Runner | None, findings: Findings) -> None:
    """Report every contradiction between the options of a training task, and with the number of processes."""
    options = Options(given, findings, runner.world_size if runner is not None else None)
    if not _check_sizes(options):
        return
    for check in _CHECKS:
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


def _check_world(options: Options) -> None:
    tp, pp, cp = (options[f"{axis}_parallel_size"] for axis in ("tensor_model", "pipeline_model", "context"))
    world, size = options.world_size, options.model_size
    if world is None:
        return
    if world % size:
        sizes = f"tensor {tp} x pipeline {pp} x context {cp} = {size}"
        message = (
            f"{world} processes are not a multiple of {sizes}; use {nearest_multiples(world, size)} processes"
        )
        options.error(
            options.blame(
                "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
            ),
            message,
        )
    etp = options["expert_tensor_parallel_size"] or tp
    ep = options["expert_model_parallel_size"]
    if ep > 1 and world % (etp * ep * pp):
        sizes = f"expert tensor {etp} x expert {ep} x pipeline {pp} = {etp * ep * pp}"
        near = nearest_multiples(world, etp * ep * pp)
        message = f"{world} processes are not a multiple of {sizes}; use {near} processes"
        options.error("expert_model_parallel_size", message)


def _check_heads(options: Options) -> None:
    if not options.has("num_attention_heads", "hidden_size"):
        return
    heads, hidden, tp = (
        options["num_attention_heads"],
        options["hidden_size"],
        options["tensor_model_parallel_size"],
    )
    if heads % tp:
        message = f"{heads} attention heads cannot be shared by {tp}; use one of {_listed(divisors(heads))}"
        options.error(options.blame("tensor_model_parallel_size", "num_attention_heads"), message)
    if not options.has("kv_channels") and hidden % heads:
        near = nearest_multiples(hidden, heads)
        message = f"{hidden} is not a multiple of {heads} heads; use {near}, or set kv_channels"
        options.error("hidden_size", message)


def _check_groups(options: Options) -> None:
    if not options["group_query_attention"]:
        if options.given.get("num_query_groups", 1) != 1:
            message = "has no effect without group_query_attention: true; every head then has its own keys"
            options.findings.note("config/no-effect", options.path("num_query_groups"), message)
        return
    if not options.has("num_attention_heads"):
        return
    heads, groups = options["num_attention_heads"], options["num_query_groups"]
    tp = options["tensor_model_parallel_size"]
    if heads % groups:
        allowed = _listed(divisors(heads))
        message = f"{heads} attention heads cannot form {groups} groups; use one of {allowed}"
        options.error("num_query_groups", message)
    if groups % tp and tp % groups:
        size = f"tensor_model_parallel_size {tp}"
        near = f"use {nearest_multiples(groups, tp)}, or tensor parallelism {_listed(divisors(groups))}"
        message = f"{groups} query groups are neither multiple nor divisor of {size}; {near}"
        options.error("num_query_groups", message)


def _check_widths(options: Options) -> None:
    tp = options["tensor_model_parallel_size"]
    width = options.given.get("ffn_hidden_size")
    if width is not None and width % tp:
        near = nearest_multiples(width, tp)
        message = f"{width} is not a multiple of tensor_model_parallel_size {tp}; use {near}"
        options.error("ffn_hidden_size", message)


def _check_lengths(options: Options) -> None:
    length, limit, cp = (
        options["seq_length"],
        options["max_position_embeddings"],
        options["context_parallel_size"],
    )
    if length is None:
        return
    if limit is not None and length > limit:
        message = f"{length} is more than max_position_embeddings {limit}; shorten it or raise that"
        options.error("seq_length", message)
    if cp > 1 and length % (2 * cp):
        near = nearest_multiples(length, 2 * cp)
        message = f"{length} is not a multiple of 2 x context_parallel_size {cp}; use {near}"
        options.error("seq_length", message)
    tp = options["tensor_model_parallel_size"]
    if options["sequence_parallel"] and tp == 1:
        message = "has no effect with tensor_model_parallel_size 1; Megatron switches it off"
        options.findings.note("config/no-effect", options.path("sequence_parallel"), message)


def _check_batches(options: Options) -> None:
    dp, micro, whole = options.data_parallel_size, options["micro_batch_size"], options["global_batch_size"]
    if dp is None or micro is None or whole is None:
        return
    _check_batch(options, "global_batch_size", (whole, micro), dp)
    own = [name for name in ("eval_global_batch_size", "eval_micro_batch_size") if options.has(name)]
    if own:
        sizes = (options["eval_global_batch_size"] or whole, options["eval_micro_batch_size"] or micro)
        _check_batch(options, own[0], sizes, dp)


def _check_batch(options: Options, name: str, sizes: tuple[int, int], dp: int) -> None:
    """Check that a batch of all processes is made of whole micro batches of each."""
    whole, micro = sizes
    if micro < 1 or whole < 1 or whole % (micro * dp) == 0:
        return
    unit = f"micro batch {micro} x data parallel {dp} = {micro * dp}"
    fitting = [size for size in divisors(whole) if whole % (size * dp) == 0]
    other = f", or micro batch {_listed(fitting)}" if fitting else ""
    near = nearest_multiples(whole, micro * dp)
    options.error(name, f"{whole} is not a multiple of {unit}; use {near}{other}")


def _check_experts(options: Options) -> None:
    experts, ep = options["num_experts"], options["expert_model_parallel_size"]
    if ep > 1 and not experts:
        options.error(
            "expert_model_parallel_size", f"is {ep}, but the model has no experts; set num_experts or 1"
        )
    elif experts and experts % ep:
        message = f"{experts} experts cannot be shared by {ep}; use one of {_listed(divisors(experts))}"
        options.error("expert_model_parallel_size", message)


def _stage_layers(options: Options) -> int:
    """Return the layers to divide, the embedding and the loss counted where they count as layers."""
    return int(options["num_layers"]) + sum(bool(options[name]) for name in _SPLITS)


def _check_stages(options: Options) -> None:
    if not options.has("num_layers") or options.has("hybrid_layer_pattern"):
        return
    if options.has("pipeline_model_parallel_layout"):
        return  # a language of its own; Megatron checks it
    first, last = options["decoder_first_pipeline_num_layers"], options["decoder_last_pipeline_num_layers"]
    if first is None and last is None:
        layers, pp = _stage_layers(options), options["pipeline_model_parallel_size"]
        if layers % pp:
            message = f"{layers} layers cannot form {pp} equal stages; use one of {_listed(divisors(layers))}"
            uneven = (
                ", or decoder_first_pipeline_num_layers / decoder_last_pipeline_num_layers for uneven ones"
            )
            options.error(options.blame("pipeline_model_parallel_size", "num_layers"), message + uneven)
            return
    elif not _check_uneven(options, first, last):
        return
    _check_virtual(options)


def _check_uneven(options: Options, first: int | None, last: int | None) -> bool:
    """Check stages of which the first or last is given; the middle must divide evenly."""
    name = "decoder_first_pipeline_num_layers" if first is not None else "decoder_last_pipeline_num_layers"
    if any(size is not None and size < 1 for size in (first, last)):
        options.error(name, "must be at least 1")
        return False
    if options.has("num_layers_per_virtual_pipeline_stage"):
        message = "does not go with uneven stages; use num_virtual_stages_per_pipeline_rank"
        options.error("num_layers_per_virtual_pipeline_stage", message)
        return False
    for split in _SPLITS:
        if options[split]:
            options.error(split, f"does not go with {name}; the sizes of its stages are given there")
            return False
    rest = options["num_layers"] - (first or 0) - (last or 0)
    stages = options["pipeline_model_parallel_size"] - (first is not None) - (last is not None)
    if rest < 0 or stages < 0 or bool(rest) != bool(stages):
        options.error(name, f"leaves {rest} layers for {stages} middle stages")
        return False
    if stages and rest % stages:
        options.error(name, f"leaves {rest} layers, which {stages} middle stages cannot share equally")
        return False
    return True


def _virtual_stages(options: Options) -> int | None:
    """Return the model chunks per stage; None when stages are not interleaved or the numbers do not fit."""
    per_chunk = options["num_layers_per_virtual_pipeline_stage"]
    if per_chunk is None:
        chunks = options["num_virtual_stages_per_pipeline_rank"]
        return None if chunks == 1 else chunks
    per_stage = _stage_layers(options) // options["pipeline_model_parallel_size"]
    if per_chunk < 1 or per_stage % per_chunk:
        allowed = _listed(divisors(per_stage))
        message = f"{per_chunk} does not divide the {per_stage} layers of a stage; use one of {allowed}"
        options.error("num_layers_per_virtual_pipeline_stage", message)
        return None
    chunks = per_stage // per_chunk
    return None if chunks == 1 else chunks


def _check_virtual(options: Options) -> None:
    names = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    given = [name for name in names if options.has(name)]
    if len(given) == 2:
        options.error(given[0], f"does not go with {given[1]}; give one of them")
        return
    chunks = _virtual_stages(options) if given else None
    if chunks is None:
        return
    pp = options["pipeline_model_parallel_size"]
    need = 3 if options["no_overlap_p2p_communication"] else 2
    if pp < need:
        options.error(
            given[0], f"interleaved stages need pipeline_model_parallel_size of at least {need} ({pp} given)"
        )
        return
    first, last = options["decoder_first_pipeline_num_layers"], options["decoder_last_pipeline_num_layers"]
    middle = pp - (first is not None) - (last is not None)
    rest = _stage_layers(options) - (first or 0) - (last or 0)
    sizes = [size for size in (first, last, rest // middle if middle else None) if size is not None]
    wrong = next((size for size in sizes if size % chunks), None)
    if wrong is not None:
        allowed = _listed(divisors(wrong))
        message = f"{chunks} chunks do not divide the {wrong} layers of a stage; use one of {allowed}"
        options.error(given[0], message)


def virtual_stages(given: Mapping[str, Any]) -> int | None:
    """Return the model chunks per pipeline stage of checked options, None when stages are not interleaved."""
    per_chunk = given.get("num_layers_per_virtual_pipeline_stage")
    if per_chunk is None:
        return given.get("num_virtual_stages_per_pipeline_rank")
    layers = given["num_layers"] + sum(bool(given.get(name)) for name in _SPLITS)
    return int(layers // given.get("pipeline_model_parallel_size", 1) // per_chunk)


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
    if options.has("save") and every and keep and keep % every:
        message = f"{keep} is not a multiple of save_interval {every}; use {nearest_multiples(keep, every)}"
        options.error("save_retain_interval", message)
    if options["ckpt_format"] == "torch_dcp" and not options["use_torch_fsdp2"]:
        options.error("ckpt_format", "torch_dcp needs use_torch_fsdp2; use torch_dist")
    if options["ckpt_format"] == "fsdp_dtensor" and not options["use_megatron_fsdp"]:
        options.error("ckpt_format", "fsdp_dtensor needs use_megatron_fsdp; use torch_dist")


def _check_recompute(options: Options) -> None:
    kind = options["recompute_granularity"]
    if kind == "full":
        for name in ("recompute_method", "recompute_num_layers"):
            if not options.has(name):
                options.error("recompute_granularity", f"full needs {name}")
    elif kind == "selective":
        for name in ("recompute_method", "recompute_num_layers"):
            if options.has(name):
                options.error(name, "does not go with recompute_granularity selective; remove it or use full")
    if options["distribute_saved_activations"] and options["tensor_model_parallel_size"] == 1:
        options.error("distribute_saved_activations", "needs tensor_model_parallel_size of more than 1")


def _check_precision(options: Options) -> None:
    if options["fp16"] and options["bf16"]:
        options.error("fp16", "does not go with bf16; give one of them")
    if options["fp32_residual_connection"] and not (options["fp16"] or options["bf16"]):
        options.error("fp32_residual_connection", "needs fp16 or bf16")


def _check_data(options: Options) -> None:
    split = any(options[name] for name in ("train_data_path", "valid_data_path", "test_data_path"))
    sources = [bool(options["mock_data"]), bool(options["data_path"]), split]
    if sum(sources) > 1:
        message = "more than one source of data; give one of data_path, train/valid/test_data_path, mock_data"
        options.error(
            options.blame("data_path", "train_data_path", "valid_data_path", "test_data_path", "mock_data"),
            message,
        )


def _check_overlap(options: Options) -> None:
    is_sharded = (
        options["use_distributed_optimizer"]
        or options["use_megatron_fsdp"]
        or options["optimizer"] == "dist_muon"
    )
    if options["overlap_param_gather"] and not is_sharded:
        options.error("overlap_param_gather", "needs use_distributed_optimizer")
    if options["overlap_param_gather"] and not options["overlap_grad_reduce"]:
        options.error("overlap_param_gather", "needs overlap_grad_reduce")
    is_sequence_parallel = options["sequence_parallel"] and options["tensor_model_parallel_size"] > 1
    if options["tp_comm_overlap"] and not is_sequence_parallel:
        options.error(
            "tp_comm_overlap", "needs sequence_parallel and tensor_model_parallel_size of more than 1"
        )
    if options["position_embedding_type"] == "mrope" and not options.has("mrope_section"):
        options.error("position_embedding_type", "mrope needs mrope_section")


_CHECKS: tuple[Callable[[Options], None], ...] = (
    _check_world,
    _check_heads,
    _check_groups,
    _check_widths,
    _check_lengths,
    _check_batches,
    _check_experts,
    _check_stages,
    _check_schedule,
    _check_rates,
    _check_saving,
    _check_recompute,
    _check_precision,
    _check_data,
    _check_overlap,
)
