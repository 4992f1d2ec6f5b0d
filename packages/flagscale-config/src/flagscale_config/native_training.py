"""FlagScale's `train:` section where no Megatron trains: robot policies (Pi0, GR00T, RoboBrain, DreamZero).

FlagScale's own trainer ignores what it does not know; here every key of its files is typed. Options of
several models share the sections, as they do in the files. The StarVLA tree of RoboBrain-X0.5 (`framework`,
`trainer`, `datasets`) stands beside them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from flagscale_config.base import (
    Bool,
    Float,
    Fraction,
    FrozenDict,
    FrozenMap,
    Int,
    Model,
    Natural,
    NonNegative,
    Positive,
    Scalar,
    Text,
)
from flagscale_config.policy import ActionModel, VisionLanguageModel
from flagscale_config.starvla import Datasets, Framework, Trainer

__all__ = ["NativeTraining"]

_Betas = Annotated[tuple[Fraction, ...], Field(min_length=2, max_length=2)]
_Rate = Annotated[Float, Field(gt=0)]
_Dtype = Literal["float32", "float16", "bfloat16"]
_Norm = Literal["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10", "IDENTITY"]


class Scheduler(Model):
    """How the learning rate changes."""

    name: Text | None = None
    """Kind of schedule."""
    warmup_steps: Natural | None = None
    """Steps of rising rate."""
    warmup_ratio: Fraction | None = None
    """The same, as a part of all steps."""
    decay_steps: Natural | None = None
    """Steps of falling rate."""
    decay_lr: NonNegative | None = None
    """Rate at the end."""
    peak_lr: _Rate | None = None
    """Rate after warming up."""
    scheduler_kwargs: FrozenMap[str, Scalar] = Field(default_factory=FrozenDict)
    """Arguments of the schedule's own function, such as `min_lr`."""


class ParameterGroup(Model):
    """Optimiser settings of one module."""

    lr: _Rate
    """Learning rate of the module."""


class Optimizer(Model):
    """The optimiser."""

    name: Text = "AdamW"
    """Class of the optimiser."""
    lr: _Rate | None = None
    """Learning rate."""
    betas: _Betas | None = None
    """Decay of the moments."""
    eps: _Rate | None = None
    """Term against division by zero."""
    weight_decay: NonNegative | None = None
    """Weight decay."""
    param_groups: FrozenMap[str, ParameterGroup] = Field(default_factory=FrozenDict)
    """Settings of single modules, by module name."""
    scheduler: Scheduler | None = None
    """How the rate changes."""


class NativeCheckpoint(Model):
    """Checkpoints."""

    save_checkpoint: Bool = True
    """Whether any are written."""
    save_freq: Positive | None = None
    """Steps between two."""
    save_total_limit: Positive | None = None
    """Checkpoints kept."""
    output_directory: Text | None = None
    """Folder."""
    resume_from: Text | None = None
    """Checkpoint to go on from."""


class NativeSystem(Model):
    """How training runs."""

    batch_size: Positive | None = None
    """Samples per process and step."""
    train_steps: Positive | None = None
    """Optimiser steps."""
    log_freq: Positive | None = None
    """Steps between two reports."""
    grad_clip_norm: NonNegative | None = None
    """Largest gradient norm."""
    use_amp: Bool | None = None
    """Whether mixed precision is used."""
    shuffle: Bool | None = None
    """Whether samples are shuffled."""
    num_workers: Natural | None = None
    """Processes that read data."""
    seed: Int | None = None
    """Seed."""
    checkpoint: NativeCheckpoint | None = None
    """Checkpoints."""
    optimizer: Optimizer | None = None
    """The optimiser (older files)."""
    scheduler: Scheduler | None = None
    """Its schedule (older files)."""
    tensor_model_parallel_size: Positive | None = None
    """Accepted; native training is data parallel."""
    pipeline_model_parallel_size: Positive | None = None
    """Accepted; native training is data parallel."""
    context_parallel_size: Positive | None = None
    """Accepted; native training is data parallel."""
    wandb_enabled: Bool | None = None
    """Whether Weights & Biases is used."""
    project_name: Text | None = None
    """Project in Weights & Biases."""
    exp_name: Text | None = None
    """Run in Weights & Biases."""
    output_directory: Text | None = None
    """Folder of checkpoints (older files)."""
    tokenizer_max_length: Positive | None = None
    """Tokens of an instruction at most (older files)."""
    vlm_loss_scale: NonNegative | None = None
    """Weight of the language loss."""
    disable_attention_compile: Bool | None = None
    """Whether attention is not compiled."""


class Normalization(Model):
    """How each kind of feature is normalised."""

    VISUAL: _Norm | None = None
    """Images."""
    STATE: _Norm | None = None
    """States."""
    ACTION: _Norm | None = None
    """Actions."""


class Freeze(Model):
    """Which parameters do not learn; regular expressions of their names."""

    freeze_patterns: tuple[Text, ...] = ()
    """Those that do not."""
    keep_patterns: tuple[Text, ...] = ()
    """Of these the ones that do."""


class NativeModel(Model):
    """The policy."""

    model_name: Text | None = None
    """Kind of policy: `pi0`, `pi0.5`, `gr00t_n1_5`, `qwen_gr00t`, ..."""
    checkpoint_dir: Text | None = None
    """Weights to start from."""
    pretrained_model_path: Text | None = None
    """Weights to start from."""
    text_encoder_pretrained_path: Text | None = None
    """Weights of the text encoder."""
    image_encoder_pretrained_path: Text | None = None
    """Weights of the image encoder."""
    vae_pretrained_path: Text | None = None
    """Weights of the autoencoder."""
    tokenizer_path: Text | None = None
    """Path of the tokenizer."""
    tokenizer_max_length: Positive | None = None
    """Tokens of an instruction at most."""
    stat_path: Text | None = None
    """File of the data set's statistics."""
    assets_base_dir: Text | None = None
    """Folder of normalisation statistics (openpi)."""
    exp_name: Text | None = None
    """Name of the run (openpi)."""
    batch_size: Positive | None = None
    """Samples per step (openpi)."""
    training_dtype: _Dtype | None = None
    """Number format (openpi)."""
    compute_dtype: _Dtype | None = None
    """Number format."""
    resume: Bool | None = None
    """Whether to go on from the last checkpoint."""
    ckpt_overwrite: Bool | None = None
    """Whether older checkpoints may be overwritten."""
    action_steps: Positive | None = None
    """Actions carried out before the next prediction."""
    action_horizon: Positive | None = None
    """Actions predicted together."""
    action_dim: Positive | None = None
    """Numbers per action."""
    max_action_dim: Positive | None = None
    """Numbers per action, padded."""
    max_state_dim: Positive | None = None
    """Numbers per state, padded."""
    state_horizon: Positive | None = None
    """States given together."""
    chunk_size: Positive | None = None
    """Actions per chunk."""
    embodiment_tag: Text | None = None
    """Which robot it is."""
    prompt_template: Text | None = None
    """Text around an instruction."""
    normalization_mapping: Normalization | None = None
    """How features are normalised."""
    optimizer: Optimizer | None = None
    """The optimiser."""
    freeze: Freeze | None = None
    """What does not learn."""
    tune_llm: Bool | None = None
    """Whether the language model learns."""
    tune_visual: Bool | None = None
    """Whether the vision encoder learns."""
    tune_projector: Bool | None = None
    """Whether the projector learns."""
    tune_diffusion_model: Bool | None = None
    """Whether the action model learns."""
    lora_rank: Natural | None = None
    """Rank of low-rank adapters; 0 for none."""
    lora_full_model: Bool | None = None
    """Whether adapters are put everywhere."""
    train_architecture: Literal["lora", "full"] | None = None
    """Whether adapters or all weights learn."""
    use_gradient_checkpointing: Bool | None = None
    """Whether activations are computed again."""
    num_frames: Positive | None = None
    """Frames of a video."""
    num_frame_per_block: Positive | None = None
    """Frames per block."""
    num_action_per_block: Positive | None = None
    """Actions per block."""
    num_state_per_block: Positive | None = None
    """States per block."""
    frame_seqlen: Positive | None = None
    """Tokens per frame."""
    num_views: Positive | None = None
    """Cameras."""
    vlm: VisionLanguageModel | None = None
    """The vision-language model below."""
    action_model: ActionModel | None = None
    """The part that makes actions."""


class StepConfig(Model):
    """Settings of a processor step; which of them a step has depends on its `registry_name`."""

    rename_map: FrozenMap[str, Text] | None = None
    """Names in the data to names in the model."""
    device: Text | None = None
    """Device to move to."""
    float_dtype: Text | None = None
    """Number format to convert to."""
    eps: _Rate | None = None
    """Term against division by zero."""
    features: FrozenMap[str, Any] | None = None
    """Kind and shape of each feature."""
    state_horizon: Positive | None = None
    """States given together."""
    action_horizon: Positive | None = None
    """Actions predicted together."""
    max_state_dim: Positive | None = None
    """Numbers per state, padded."""
    max_action_dim: Positive | None = None
    """Numbers per action, padded."""
    language_key: Text | None = None
    """Name of the instruction."""
    embodiment_tag: Text | None = None
    """Which robot it is."""
    normalize_min_max: Bool | None = None
    """Whether values are scaled by their extremes."""
    env_action_dim: Natural | None = None
    """Numbers per action of the robot."""
    image_size: Positive | tuple[Positive, ...] | None = None
    """Pixels: one number, or height and width."""


STEPS: dict[str, tuple[str, ...]] = {
    "rename_observations_processor": ("rename_map",),
    "to_batch_processor": (),
    "device_processor": ("device", "float_dtype"),
    "normalizer_processor": ("eps", "features"),
    "unnormalizer_processor": ("eps", "features"),
    "groot_pack_inputs": (
        "state_horizon",
        "action_horizon",
        "max_state_dim",
        "max_action_dim",
        "language_key",
        "embodiment_tag",
        "normalize_min_max",
    ),
    "groot_eagle_encode": (),
    "groot_eagle_collate": (),
    "groot_action_unpack_unnormalize": ("env_action_dim", "normalize_min_max"),
    "image_resize_processor": ("image_size",),
}
"""Processor steps of FlagScale and the settings each of them has."""


class Step(Model):
    """One step of a processor."""

    registry_name: Literal[tuple(STEPS)]  # type: ignore[valid-type]
    """Which step."""
    config: StepConfig | None = None
    """Its settings."""


class Processor(Model):
    """What is done to samples before or after the model."""

    name: Text | None = None
    """Name of the processor."""
    steps: tuple[Step, ...] = ()
    """Its steps, in order."""


class WebDataset(Model):
    """A data set in WebDataset form."""

    vision_root: Text | None = None
    """Folder of the images."""
    action_key: Text | None = None
    """Name of the actions."""
    state_key: Text | None = None
    """Name of the states."""


class NativeData(Model):
    """The data."""

    data_path: Text | None = None
    """Path of the data set."""
    dataset_type: Text | None = None
    """Kind of data set."""
    wds: WebDataset | None = None
    """Settings of a WebDataset."""
    vlm_data_path: Text | None = None
    """Path of vision-language data mixed in."""
    image_key_order: tuple[Text, ...] | None = None
    """Cameras in the model's order."""
    tolerance_s: NonNegative | None = None
    """Seconds by which frames may miss their time."""
    use_imagenet_stats: Bool | None = None
    """Whether images are normalised as ImageNet's."""
    use_quantiles: Bool | None = None
    """Whether actions are normalised by quantiles."""
    rename_map: FrozenMap[str, Text] | None = None
    """Names in the data to names in the model."""
    tokenizer_path: Text | None = None
    """Path of the tokenizer (older files)."""
    config_name: Text | None = None
    """Name of the data configuration (openpi)."""
    action_key: Text | None = None
    """Name of the actions (older files)."""
    action_token_key: Text | None = None
    """Name of the action tokens (older files)."""
    state_key: Text | None = None
    """Name of the states (older files)."""
    vision_root: Text | None = None
    """Folder of the images (older files)."""
    preprocessor: Processor | None = None
    """What is done before the model."""
    postprocessor: Processor | None = None
    """What is done after it."""
    image_size: Positive | tuple[Positive, ...] | None = None
    """Pixels: one number, or height and width."""
    max_text_length: Positive | None = None
    """Tokens of an instruction at most."""
    embodiment_tag: Text | None = None
    """Which robot it is."""
    embodiment_tag_mapping: FrozenMap[str, Natural] | None = None
    """Robot names to numbers."""
    use_aligned_dataloader: Bool | None = None
    """Whether chunks are aligned with frames."""
    max_chunk_size: Positive | None = None
    """Actions per chunk at most."""
    macro_stride: Positive | None = None
    """Frames between two samples."""
    relative_action: Bool | None = None
    """Whether actions are differences."""
    crop_ratio: Fraction | None = None
    """Part of an image that is kept."""
    color_jitter: Bool | FrozenMap[str, NonNegative] | tuple[NonNegative, ...] | None = None
    """How far colours vary."""


class NativeTraining(Model):
    """A training task of FlagScale's own trainer."""

    system: NativeSystem = NativeSystem()
    """How training runs."""
    model: NativeModel = NativeModel()
    """The policy."""
    data: NativeData = NativeData()
    """The data."""
    framework: Framework | None = None
    """The policy, in StarVLA's words."""
    trainer: Trainer | None = None
    """How training runs, in StarVLA's words."""
    datasets: Datasets | None = None
    """The data, in StarVLA's words."""
    config_path: Text | None = None
    """Path of this file, as StarVLA reads it again."""
    project_name: Text | None = None
    """Project in Weights & Biases."""
    exp_name: Text | None = None
    """Run in Weights & Biases."""
    trackers: tuple[Literal["jsonl", "wandb", "tensorboard"], ...] | None = None
    """Where figures are written."""
    wandb_enabled: Bool | None = None
    """Whether Weights & Biases is used."""
    wandb_entity: Text | None = None
    """Team in Weights & Biases."""
    wandb_project: Text | None = None
    """Project in Weights & Biases."""
    is_debug: Bool | None = None
    """Whether to wait for a debugger."""
    resume: Bool | None = None
    """Whether to go on from the last checkpoint."""
    seed: Int | None = None
    """Seed."""
    batch_size: Positive | None = None
    """Samples per process and step."""
    train_steps: Positive | None = None
    """Optimiser steps."""
    log_freq: Positive | None = None
    """Steps between two reports."""
    checkpoint_dir: Text | None = None
    """Weights to start from."""
    output_directory: Text | None = None
    """Folder of checkpoints."""
