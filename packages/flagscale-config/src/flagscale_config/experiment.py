"""The typed contract: what one FlagScale file asks for, frozen.

`load()` makes it; the other packages read it. What does not live here: reading files (`loader.py`), option
names (`options.py`), checks across fields (`arithmetic/`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from flagscale_config.base import FrozenDict, FrozenMap, Late, Model
from flagscale_config.errors import Origin, Problem, sort_problems
from flagscale_config.runner import Cmds, Runner, Task
from flagscale_config.tuning import AutoTuner

if TYPE_CHECKING:
    from flagscale_config.compression import Compression
    from flagscale_config.external import External
    from flagscale_config.heterogeneous import Heterogeneous
    from flagscale_config.inference import Inference
    from flagscale_config.native_training import NativeTraining
    from flagscale_config.policy_server import PolicyServer
    from flagscale_config.reinforcement import ReinforcementLearning
else:
    Compression = Annotated[Any, Late("flagscale_config.compression:Compression")]
    External = Annotated[Any, Late("flagscale_config.external:External")]
    Heterogeneous = Annotated[Any, Late("flagscale_config.heterogeneous:Heterogeneous")]
    Inference = Annotated[Any, Late("flagscale_config.inference:Inference")]
    NativeTraining = Annotated[Any, Late("flagscale_config.native_training:NativeTraining")]
    PolicyServer = Annotated[Any, Late("flagscale_config.policy_server:PolicyServer")]
    ReinforcementLearning = Annotated[Any, Late("flagscale_config.reinforcement:ReinforcementLearning")]

__all__ = ["Experiment", "Parallelism", "Profile", "Resources", "ServeInstance", "Train"]

SCHEMA_VERSION = "1.1"


class Parallelism(Model):
    """How a model is spread over processes; every size is 1 when not given."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages into which the layers are divided."""
    context_parallel_size: int = 1
    """Processes that share each sequence."""
    expert_model_parallel_size: int = 1
    """Processes that share the experts."""
    expert_tensor_parallel_size: int | None = None
    """Processes that share each expert's matrices; the tensor size by default."""
    virtual_pipeline_stages: int | None = None
    """Model chunks per pipeline stage when stages are interleaved."""
    sequence_parallel: bool = False
    """Whether activations between tensor-parallel regions are split along the sequence."""

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model: tensor x pipeline x context."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )


class Train(Model):
    """A training task: Megatron's options, and the few of them that plans depend on."""

    options: FrozenMap[str, Any]
    """Every option given, by Megatron's canonical name with underscores, typed as Megatron's parser types it.
    Switches are booleans, several values are tuples; what is null in the file is absent. Section names are
    gone."""
    parallelism: Parallelism
    """How the model is spread over processes."""
    micro_batch_size: int
    """Sequences per process and forward pass."""
    global_batch_size: int | None = None
    """Sequences per optimiser step over all processes; micro batch x data parallel size by default."""
    train_iters: int | None = None
    """Optimiser steps; None when the length is given in samples."""
    extra_args: tuple[str, ...] = ()
    """Words passed to Megatron as they are: the only way around the option table."""
    script: str | None = None
    """FlagScale's model script where another model than a GPT is trained, such as `train_llava`."""
    script_options: FrozenMap[str, Any] = Field(default_factory=FrozenDict)
    """The options that only that script has."""
    heterogeneous: Heterogeneous | None = None
    """How the model is spread over several kinds of chips; None for one kind. Then `parallelism` is that of
    the options, not of the meshes."""


class Resources(Model):
    """What an instance needs and how often it is started."""

    num_replicas: int | Literal["auto"] = 1
    """Number of copies."""
    num_gpus: float | None = None
    """Devices per copy."""
    min_replicas: int | None = None
    """Fewest copies when scaling."""
    max_replicas: int | None = None
    """Most copies when scaling."""
    downscale_delay_s: float | None = None
    """Seconds of little load before a copy is removed."""
    upscale_delay_s: float | None = None
    """Seconds of much load before a copy is added."""
    target_ongoing_requests: float | None = None
    """Requests per copy aimed at."""
    max_ongoing_requests: int | None = None
    """Requests per copy at most."""


class Profile(Model):
    """The load for which serving is tuned."""

    prefix_len: int = 0
    """Tokens shared by all prompts."""
    input_len: int = 1024
    """Tokens per prompt."""
    output_len: int = 1024
    """Tokens generated per prompt."""
    num_prompts: int = 128
    """Number of prompts."""
    range_ratio: float = 1
    """Spread of the lengths."""


class ServeInstance(Model):
    """One item of a serve task: a model and the engine that serves it."""

    serve_id: str
    """Unique in the file."""
    engine: Literal["vllm", "sglang", "llama_cpp", "transformers", "native"] | None = None
    """The engine; None leaves the choice to the chip."""
    engine_args: FrozenMap[str, Any] = Field(default_factory=FrozenDict)
    """Options in vLLM's vocabulary, by name with underscores, typed as vLLM's parser types them."""
    engine_args_specific: FrozenMap[str, FrozenMap[str, Any]] = Field(default_factory=FrozenDict)
    """Options for one engine only, by engine."""
    resources: Resources = Resources()
    """What the instance needs."""
    profile: Profile | None = None
    """The load for which it is tuned."""
    module: str | None = None
    """Python file of a composed application's class."""
    name: str | None = None
    """Class in that file."""
    depends: tuple[str, ...] = ()
    """Ids of the items this one calls."""
    extra_args: tuple[str, ...] = ()
    """Words passed to the engine as they are."""


_MOVED = {
    "name": "experiment.exp_name",
    "shortcuts": "experiment",
    "node_envs": "experiment.envs",
    "device_type_envs": "experiment.envs",
    "device_type_args": "device_type_specific",
    "node_specific_args": "node_specific",
    "native_train": "train",
    "policy_server": "serve",
    "train.parallelism.virtual_pipeline_stages": "train.options.num_virtual_stages_per_pipeline_rank",
    "train.parallelism": "train.options",
    "train.micro_batch_size": "train.options.micro_batch_size",
    "train.global_batch_size": "train.options.global_batch_size",
    "train.train_iters": "train.options.train_iters",
}
_SECTIONS = ("train", "serve", "inference", "compress", "rl")
_OF_NO_FILE = ("cwd", "source", "schema_version", "notes")


def path_in_file(key: str) -> str:
    """Return where a field of an experiment stands in the file; a path in the file is returned as it is."""
    head = key.partition(".")[0]
    if head in _OF_NO_FILE:
        return ""
    for field, home in _MOVED.items():
        if key == field or key.startswith(f"{field}."):
            return home + key[len(field) :]
    return f"experiment.{key}" if head in Experiment.model_fields and head not in _SECTIONS else key


class Experiment(Model):
    """What one experiment file asks for, composed, resolved and checked."""

    schema_version: Literal["1.0", "1.1"] = "1.1"
    """Version of this contract; within a major version fields are only added."""
    name: str
    """`experiment.exp_name`."""
    exp_dir: str
    """Root of all artefacts, absolute."""
    cwd: str
    """Directory in which the experiment was loaded; relative paths in the file start here."""
    source: str
    """Path of the experiment file, absolute."""
    seed: int | None = None
    """`experiment.seed`; has an effect only where the file refers to it."""
    shortcuts: FrozenMap[str, Any] = Field(default_factory=FrozenDict)
    """Convenience values of the `experiment` section that other keys refer to: `save_steps`, `load`, `model`,
    ..."""
    task: Task
    """What is to be done."""
    runner: Runner = Runner()
    """Where and how processes are started."""
    envs: FrozenMap[str, str] = Field(default_factory=FrozenDict)
    """Environment variables of every process."""
    device_type_envs: FrozenMap[str, FrozenMap[str, str]] = Field(default_factory=FrozenDict)
    """More of them by device type of the hostfile; they win over `envs`."""
    node_envs: FrozenMap[str, FrozenMap[str, str]] = Field(default_factory=FrozenDict)
    """More of them by host; they win over both."""
    node_args: FrozenMap[str, FrozenMap[str, Any]] = Field(default_factory=FrozenDict)
    """Engine options by host."""
    cmds: Cmds = Cmds()
    """Shell text around the task."""
    device_type_args: FrozenMap[str, FrozenMap[str, Any]] = Field(default_factory=FrozenDict)
    """Megatron options by device type of the hostfile (`device_type_specific` beside `experiment`)."""
    node_specific_args: FrozenMap[str, FrozenMap[str, Any]] = Field(default_factory=FrozenDict)
    """Megatron options by host (`node_specific` beside `experiment`); they win over those by device type."""
    auto_tuner: AutoTuner | None = None
    """Search of the tuner."""
    train: Train | None = None
    """Present when `task.type` is `train` and Megatron trains."""
    native_train: NativeTraining | None = None
    """Present when `task.type` is `train` and FlagScale's own trainer trains (robot policies)."""
    serve: tuple[ServeInstance, ...] = ()
    """Not empty when `task.type` is `serve`, unless a policy server is asked for."""
    policy_server: PolicyServer | None = None
    """Present when `task.type` is `serve` and the section describes a policy server."""
    inference: Inference | None = None
    """Present when `task.type` is `inference`."""
    compress: Compression | None = None
    """Present when `task.type` is `compress`."""
    rl: ReinforcementLearning | None = None
    """Present when `task.type` is `rl`."""
    external: External | None = None
    """Present when the task's section only wraps another project's program."""
    notes: tuple[str, ...] = ()
    """What was read differently from how it is written, as text; `check` shows the same with places."""

    _origins: Mapping[str, Origin] = PrivateAttr(default_factory=dict)
    _notes: tuple[Problem, ...] = PrivateAttr(default=())

    @classmethod
    def located(cls, origins: Mapping[str, Origin], found: Iterable[Problem], **fields: Any) -> Experiment:
        """Return an experiment that knows where its values come from; `load()` is the one caller."""
        experiment = cls(**fields)
        experiment._origins = origins
        experiment._notes = sort_problems(found)
        return experiment

    def origin(self, key: str) -> Origin:
        """Return where a value comes from.

        `key` is a path in the file (`experiment.runner.nnodes`, `train.model.lr`) or in this experiment
        (`runner.nnodes`, `train.options.lr`). A key inside a value has the origin of the nearest key around
        it; what no file says (`cwd`, a whole section left out) has the origin of the file as a whole.
        """
        key = path_in_file(key)
        while key and key not in self._origins:
            key = key.rpartition(".")[0]
        return self._origins.get(key, Origin(self.source))

    def origins(self) -> Mapping[str, Origin]:
        """Return all known origins by dotted path."""
        return self._origins

    def problems(self) -> tuple[Problem, ...]:
        """Return the notes with their places."""
        return self._notes
