"""FlagScale's `experiment.auto_tuner`: the space a tuner searches, and how it searches.

A dimension of the space is `auto`, or a list of the values to try. Dimensions of a serve task may stand below
the engine they are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from flagscale_config.base import (
    Bool,
    Fraction,
    FrozenDict,
    FrozenMap,
    Model,
    Natural,
    NonNegative,
    Positive,
    Text,
)

if TYPE_CHECKING:
    from flagscale_config.findings import Findings

__all__ = ["AutoTuner", "Space", "check_tuner"]


def _dimension(value: Any) -> Any:
    """Say once what a dimension may be, instead of once per member of the union."""
    if value == "auto" or (isinstance(value, (list, tuple)) and value):
        return value
    raise PydanticCustomError("dimension", "must be auto, or a list of the values to try")


def _entry(value: Any) -> Any:
    """An entry of the tuner's meshes: `auto`, one number, or a list of numbers."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if (
        value == "auto"
        or is_number
        or (isinstance(value, (list, tuple)) and value and all(map(_entry, value)))
    ):
        return value
    raise PydanticCustomError("entry", "must be auto, a number of at least 1, or a list of such numbers")


_Sizes = Annotated[Literal["auto"] | tuple[Positive, ...], BeforeValidator(_dimension)]
_Counts = Annotated[Literal["auto"] | tuple[Natural, ...], BeforeValidator(_dimension)]
_Amounts = Annotated[Literal["auto"] | tuple[NonNegative, ...], BeforeValidator(_dimension)]
_Switches = Annotated[Literal["auto"] | tuple[Bool, ...], BeforeValidator(_dimension)]
_Methods = Annotated[Literal["auto"] | tuple[Literal["uniform", "block"], ...], BeforeValidator(_dimension)]
_Granularities = Annotated[
    Literal["auto"] | tuple[Literal["full", "selective"], ...], BeforeValidator(_dimension)
]
_Splits = Annotated[Literal["auto"] | tuple[tuple[Natural, ...], ...], BeforeValidator(_dimension)]
_Entry = Annotated[Any, BeforeValidator(_entry, json_schema_input_type=int | list[int] | Literal["auto"])]


class VllmSpace(Model):
    """Dimensions of vLLM."""

    tensor_model_parallel_size: _Sizes | None = None
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: _Sizes | None = None
    """Stages into which the layers are divided."""
    instance: _Sizes | None = None
    """Number of instances."""
    block_size: _Sizes | None = None
    """Tokens per block of the key-value cache."""
    max_num_batched_tokens: _Sizes | None = None
    """Tokens per step at most."""
    max_num_seqs: _Sizes | None = None
    """Sequences per step at most."""
    swap_space: _Amounts | None = None
    """GiB of memory for blocks swapped out."""


class SglangSpace(Model):
    """Dimensions of SGLang."""

    tensor_model_parallel_size: _Sizes | None = None
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: _Sizes | None = None
    """Stages into which the layers are divided."""
    instance: _Sizes | None = None
    """Number of instances."""
    chunked_prefill_size: _Sizes | None = None
    """Prompt tokens per step."""
    max_prefill_tokens: _Sizes | None = None
    """Prompt tokens per batch at most."""
    page_size: _Sizes | None = None
    """Tokens per page of the key-value cache."""
    max_running_requests: _Sizes | None = None
    """Requests at the same time at most."""


class LlamaCppSpace(Model):
    """Dimensions of llama.cpp."""

    threads: _Sizes | None = None
    """Threads."""
    n_gpu_layers: _Counts | None = None
    """Layers on the device."""
    split_mode: (
        Annotated[Literal["auto"] | tuple[Literal["none", "layer", "row"], ...], BeforeValidator(_dimension)]
        | None
    ) = None
    """How the model is divided among devices."""
    instance: _Sizes | None = None
    """Number of instances."""


class Space(VllmSpace):
    """The dimensions to search; serve tasks of one engine write vLLM's here."""

    vllm: VllmSpace | None = None
    """Dimensions of vLLM."""
    sglang: SglangSpace | None = None
    """Dimensions of SGLang."""
    llama_cpp: LlamaCppSpace | None = None
    """Dimensions of llama.cpp."""
    data_parallel_size: _Sizes | None = None
    """Copies of the model."""
    context_parallel_size: _Sizes | None = None
    """Processes that share each sequence."""
    expert_model_parallel_size: _Sizes | None = None
    """Processes that share the experts."""
    num_layers_per_virtual_pipeline_stage: _Counts | None = None
    """Layers per chunk of an interleaved schedule; 0 for none."""
    micro_batch_size: _Sizes | None = None
    """Sequences per process and forward pass."""
    sequence_parallel: _Switches | None = None
    """Whether activations are split along the sequence."""
    use_distributed_optimizer: _Switches | None = None
    """Whether the optimiser's state is shared."""
    use_recompute: _Switches | None = None
    """Whether activations are computed again."""
    recompute_method: _Methods | None = None
    """Which layers compute again."""
    recompute_granularity: _Granularities | None = None
    """What of a layer is computed again."""
    recompute_num_layers: _Counts | None = None
    """How many layers compute again."""
    hetero_process_meshes: tuple[_Entry, ...] | None = None
    """Five entries per mesh (tensor, context, expert, data, pipeline), each `auto`, a number or a list."""
    hetero_pipeline_layer_split: _Splits | None = None
    """Layers per stage, one list per candidate."""


class Control(Model):
    """When the search stops."""

    interval: Positive = 10
    """Seconds between two looks at a task."""
    max_time_per_task: Positive | None = None
    """Seconds a task may take."""
    max_time: Positive | None = None
    """Seconds the search may take."""
    train_iters: Positive | None = None
    """Optimiser steps per task."""
    run_best: Bool = True
    """Whether the best candidate is run at the end."""


class MemoryModel(Model):
    """How memory is estimated before a task is started."""

    model_name: Literal["default"] = "default"
    """Which estimate."""
    gpu_memory: Positive | None = None
    """MB per device."""
    gpu_utilization: tuple[Fraction, Fraction] = (0.2, 0.8)
    """Least and greatest part of it that a candidate may need."""


class Algorithm(Model):
    """In which order candidates are tried."""

    name: Literal["grid"] = "grid"
    """All of them."""
    priority: Literal["memory", "performance"] | None = None
    """What is tried first."""


class Performance(Model):
    """What is measured."""

    name: Text | None = None
    """Text before the figure in the log."""
    order: Literal["ascend", "descend"] | None = None
    """Whether less or more is better."""


class AutoTuner(Model):
    """A search for the best settings."""

    space: Space | None = None
    """The dimensions."""
    control: Control = Control()
    """When it stops."""
    memory_model: MemoryModel | None = None
    """How memory is estimated."""
    algo: Algorithm | None = None
    """In which order candidates are tried."""
    performance: Performance | None = None
    """What is measured."""
    args_mapping: FrozenMap[str, Text] = Field(default_factory=FrozenDict)
    """Names of dimensions to names of options."""
    platform: FrozenMap[str, Any] | None = None
    """Settings of the platform that is told about results, as they are."""
    engines: tuple[Literal["vllm", "sglang", "llama_cpp"], ...] | None = None
    """Engines compared (serve)."""
    cards: Positive | None = None
    """Devices at most."""
    nodes: Positive | None = None
    """Hosts at most."""


_SERVE_ONLY = (
    "vllm",
    "sglang",
    "llama_cpp",
    "instance",
    "block_size",
    "max_num_batched_tokens",
    "max_num_seqs",
)
_MESH = 5


def check_tuner(tree: Any, task: str | None, findings: Findings) -> None:
    """Report dimensions that belong to another task, meshes of odd length and a reversed memory window.

    `tree` is the `auto_tuner` section as it stands in the file; what is not as typed is reported elsewhere.
    """
    path = ("experiment", "auto_tuner")
    if not isinstance(tree, Mapping):
        return
    if task not in {"train", "serve", None}:
        findings.error("config/unsupported", path, f"{task} tasks are not tuned; train and serve tasks are")
    space = tree.get("space")
    if isinstance(space, Mapping):
        _check_space(space, task, findings)
    window = tree.get("memory_model")
    window = window.get("gpu_utilization") if isinstance(window, Mapping) else None
    if not isinstance(window, list) or len(window) != 2:
        return
    if all(isinstance(item, (int, float)) for item in window) and window[0] >= window[1]:
        here = (*path, "memory_model", "gpu_utilization")
        findings.error("config/value", here, "must be the least and the greatest part, in this order", window)


def _check_space(space: Mapping[str, Any], task: str | None, findings: Findings) -> None:
    path = ("experiment", "auto_tuner", "space")
    of_serve = set(VllmSpace.model_fields) | set(_SERVE_ONLY)
    for key in space:
        if task == "train" and (key in _SERVE_ONLY or key == "swap_space"):
            findings.error("config/value", (*path, key), "is a dimension of serve tasks; this task is train")
        if task == "serve" and key in Space.model_fields and key not in of_serve:
            findings.error("config/value", (*path, key), "is a dimension of train tasks; this task is serve")
    meshes = space.get("hetero_process_meshes")
    if isinstance(meshes, list) and len(meshes) % _MESH:
        message = f"{len(meshes)} entries are not five per mesh (tensor, context, expert, data, pipeline)"
        findings.error("config/value", (*path, "hetero_process_meshes"), message)
