"""The parts of a robot policy, which FlagScale's own trainer and StarVLA describe by the same keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flagscale_config.base import Bool, Float, Fraction, Model, Natural, Positive, Text

__all__ = ["ActionModel", "VisionLanguageModel"]

_Rate = Annotated[Float, Field(gt=0)]


class DiffusionModel(Model):
    """The transformer that denoises actions."""

    num_layers: Positive | None = None
    """Layers."""
    output_dim: Positive | None = None
    """Width of the output."""
    cross_attention_dim: Positive | None = None
    """Width of what is attended to."""
    dropout: Fraction | None = None
    """Dropout."""
    final_dropout: Bool | None = None
    """Whether dropout follows the last layer."""
    interleave_self_attention: Bool | None = None
    """Whether self-attention alternates with cross-attention."""
    norm_type: Text | None = None
    """Kind of normalisation."""
    positional_embeddings: Text | None = None
    """Kind of positional embeddings."""


class ActionModel(Model):
    """The part that turns features into actions."""

    type: Text | None = None
    """Kind of action model."""
    action_model_type: Text | None = None
    """Size, such as `DiT-B` or `DiT-L`."""
    use_state: Bool | None = None
    """Whether the robot's state is an input."""
    hidden_size: Positive | None = None
    """Width."""
    action_hidden_dim: Positive | None = None
    """Width of the action encoder."""
    add_pos_embed: Bool | None = None
    """Whether positions are embedded."""
    max_seq_len: Positive | None = None
    """Longest sequence."""
    action_dim: Positive | None = None
    """Numbers per action."""
    state_dim: Positive | None = None
    """Numbers per state."""
    action_horizon: Positive | None = None
    """Actions predicted together."""
    future_action_window_size: Natural | None = None
    """Actions after the present one."""
    past_action_window_size: Natural | None = None
    """Actions before the present one."""
    repeated_diffusion_steps: Positive | None = None
    """Noise samples per training sample."""
    noise_beta_alpha: _Rate | None = None
    """First parameter of the noise distribution."""
    noise_beta_beta: _Rate | None = None
    """Second parameter of the noise distribution."""
    noise_s: Fraction | None = None
    """Largest noise level."""
    num_timestep_buckets: Positive | None = None
    """Steps into which time is divided."""
    num_inference_timesteps: Positive | None = None
    """Denoising steps."""
    num_target_vision_tokens: Natural | None = None
    """Learned vision tokens."""
    diffusion_model_cfg: DiffusionModel | None = None
    """The transformer inside."""


class VisionLanguageModel(Model):
    """The vision-language model below a policy."""

    type: Text | None = None
    """Kind of model."""
    base_vlm: Text | None = None
    """Name or path."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention of transformers."""
    vl_hidden_dim: Positive | None = None
    """Width of its features."""
