"""Servers of robot policies: FlagScale's own scripts, which `serve:` describes instead of an engine.

Two shapes: a mapping of `engine` and `generate`, as an inference task has, and a list whose items hold the
script's own arguments under `engine_args`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from flagscale_config.base import Bool, Float, FrozenDict, FrozenMap, Model, Port, Positive, Text
from flagscale_config.inference import Generate, Level, Pipeline, one_or_more
from flagscale_config.native_training import Step

__all__ = ["PolicyArguments", "PolicyServer"]


class PolicyServer(Model):
    """A policy server described as an inference task."""

    engine: Pipeline
    """The policy, and where it listens."""
    generate: Annotated[
        tuple[Generate, ...], BeforeValidator(one_or_more, json_schema_input_type=Generate | list[Generate])
    ] = ()
    """What it is warmed up with."""


class Scaling(Model):
    """Numbers by which a vector is scaled."""

    scale_: tuple[Float, ...]
    """Factor of each number."""
    offset_: tuple[Float, ...]
    """Added to each number."""


class RobotConstants(Model):
    """How the robot's numbers are normalised."""

    action: Scaling | None = None
    """Actions."""
    qpos: Scaling | None = None
    """Joint positions."""


class ServedVlm(Model):
    """The vision-language model below a served policy."""

    base_vlm: Text | None = None
    """Name or path."""


class ServedFramework(Model):
    """The served policy in StarVLA's words."""

    qwenvl: ServedVlm | None = None
    """The vision-language model."""


class ServePreprocessor(Model):
    """What is done to a request before the model."""

    steps: tuple[Step, ...] = ()
    """Steps, in order."""


class PolicyArguments(Model):
    """Arguments of FlagScale's policy server scripts."""

    model: Text | None = None
    """Name or path of the policy."""
    model_sub_task: Text | None = None
    """Path of the model that divides tasks (RoboBrain-X0)."""
    model_variant: Text | None = None
    """`pi0` or `pi0.5`."""
    subtask_mode: Bool | None = None
    """Whether tasks are divided (RoboBrain-X0)."""
    tokenizer: Text | None = None
    """Path of the tokenizer."""
    tokenizer_path: Text | None = Field(default=None)
    """Path of the action tokenizer (RoboBrain-X0)."""
    host: Text | None = None
    """Address to listen at."""
    port: Port | None = None
    """Port to listen at."""
    debug: Bool | None = None
    """Whether the web server reloads."""
    threaded: Bool | None = None
    """Whether requests are answered in parallel."""
    device: Text | None = None
    """Device, such as `cuda`."""
    torch_dtype: (
        Literal["torch.float32", "torch.float16", "torch.bfloat16", "float32", "float16", "bfloat16"] | None
    ) = None
    """Number format."""
    stat_path: Text | None = None
    """File of the data set's statistics."""
    use_quantiles: Bool | None = None
    """Whether actions are normalised by quantiles."""
    images_keys: tuple[Text, ...] | None = None
    """Names of the cameras."""
    images_shape: tuple[Positive, ...] | None = None
    """Channels, height and width of an image."""
    state_key: Text | None = None
    """Name of the robot's state."""
    replay_file: Text | None = None
    """File of recorded actions to play."""
    robot_const: RobotConstants | None = None
    """How the robot's numbers are normalised."""
    framework: ServedFramework | None = None
    """The policy in StarVLA's words."""
    rename_map: FrozenMap[str, Text] = Field(default_factory=FrozenDict)
    """Names in a request to names in the model."""
    serve_preprocessor: ServePreprocessor | None = None
    """What is done to a request before the model."""
    uvicorn_log_level: Level | None = None
    """Log level of the server."""
