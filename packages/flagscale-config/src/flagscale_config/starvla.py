"""The StarVLA tree of RoboBrain-X0.5 files: `framework`, `trainer`, `datasets` below `train:`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from flagscale_config.base import (
    Bool,
    Float,
    Fraction,
    FrozenDict,
    FrozenMap,
    Model,
    Natural,
    NonNegative,
    Positive,
    Scalar,
    Text,
)
from flagscale_config.policy import ActionModel, VisionLanguageModel

__all__ = ["Datasets", "Framework", "Trainer"]

_Rate = Annotated[Float, Field(gt=0)]
_Betas = Annotated[tuple[Fraction, ...], Field(min_length=2, max_length=2)]


class Dino(Model):
    """The second vision encoder."""

    dino_backbone: Text | None = None
    """Name of the model."""


class Framework(Model):
    """The policy in StarVLA's words."""

    name: Text | None = None
    """Kind of policy, such as `QwenGR00T`."""
    qwenvl: VisionLanguageModel | None = None
    """The vision-language model."""
    dino: Dino | None = None
    """The second vision encoder."""
    action_model: ActionModel | None = None
    """The part that makes actions."""
    reduce_in_full_precision: Bool | None = None
    """Whether gradients are summed in float32."""


class TrainerOptimizer(Model):
    """The optimiser in StarVLA's words."""

    name: Text = "AdamW"
    """Class of the optimiser."""
    betas: _Betas | None = None
    """Decay of the moments."""
    eps: _Rate | None = None
    """Term against division by zero."""
    weight_decay: NonNegative | None = None
    """Weight decay."""


class Trainer(Model):
    """How training runs, in StarVLA's words."""

    epochs: Positive | None = None
    """Passes over the data."""
    max_train_steps: Positive | None = None
    """Optimiser steps at most."""
    num_warmup_steps: Natural | None = None
    """Steps of rising rate."""
    warmup_ratio: Fraction | None = None
    """The same, as a part of all steps."""
    save_interval: Positive | None = None
    """Steps between two checkpoints."""
    eval_interval: Positive | None = None
    """Steps between two evaluations."""
    logging_frequency: Positive | None = None
    """Steps between two reports."""
    learning_rate: FrozenMap[str, _Rate] | None = None
    """Rate of each module; `base` for the others."""
    lr_scheduler_type: Text | None = None
    """Kind of schedule."""
    scheduler_specific_kwargs: FrozenMap[str, Scalar] = Field(default_factory=FrozenDict)
    """Arguments of the schedule's own function, such as `min_lr`."""
    loss_scale: FrozenMap[str, NonNegative] | None = None
    """Weight of each kind of data."""
    optimizer: TrainerOptimizer | None = None
    """The optimiser."""
    weight_decay: NonNegative | None = None
    """Weight decay."""
    gradient_accumulation_steps: Positive | None = None
    """Batches per optimiser step."""
    gradient_clipping: NonNegative | None = None
    """Largest gradient norm."""
    max_grad_norm: NonNegative | None = None
    """Largest gradient norm."""
    enable_gradient_checkpointing: Bool | None = None
    """Whether activations are computed again."""
    enable_mixed_precision_training: Bool | None = None
    """Whether mixed precision is used."""
    freeze_modules: Bool | Text | None = None
    """What does not learn."""
    is_resume: Bool | None = None
    """Whether to go on from a checkpoint."""
    resume_epoch: Natural | None = None
    """Epoch to go on from."""
    resume_step: Natural | None = None
    """Step to go on from."""


class TaskEncoder(Model):
    """How samples are read."""

    action_horizon: Positive | None = None
    """Actions predicted together."""
    action_key: Text | None = None
    """Name of the actions."""
    state_key: Text | None = None
    """Name of the states."""
    vision_root: Text | None = None
    """Folder of the images."""


class Datasets(Model):
    """The data in StarVLA's words."""

    data_path: Text | None = None
    """Path of the data set."""
    task_encoder: TaskEncoder | None = None
    """How samples are read."""
    vla_data: FrozenMap[str, Any] | None = None
    """StarVLA's own settings of robot data, as they are."""
    vlm_data: FrozenMap[str, Any] | None = None
    """StarVLA's own settings of vision-language data, as they are."""
