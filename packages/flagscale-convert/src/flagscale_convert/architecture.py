"""The numbers that define a decoder model, dense or of experts, in one vocabulary for both worlds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Architecture", "Experts", "LatentAttention", "Recurrence", "RopeScaling", "Tower", "Yarn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn:
    """What YaRN (arXiv 2309.00071) needs beside its factor."""

    original_positions: int = 4096
    """Longest context before stretching, in tokens."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """Rotations within that context above which, and below which, a frequency is kept or fully divided."""
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    """Growth of the rotary part, and of all scores, with the logarithm of the factor."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts."""

    kind: str
    """`linear` (positions divided by the factor), `llama3` (Llama 3.1's bands: 1, 4, 8192) or `yarn`."""
    factor: float
    yarn: Yarn | None = None
    """Given exactly for `yarn`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): sizes of its projections, in elements."""

    query_rank: int | None
    """None when queries are projected directly."""
    kv_rank: int
    plain_size: int
    """The part of a query and key head without position."""
    rotary_size: int
    """The part with; keys share one for all heads."""
    value_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recurrence:
    """RWKV-7's time mix (arXiv 2503.14456): inner widths of the low-rank pairs that make its vectors."""

    decay_rank: int
    rate_rank: int
    """Of the in-context learning rate."""
    value_rank: int
    """Of how much of the first layer's value is mixed in, in all layers but the first."""
    gate_rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The mixture of experts: how many, how wide, and how a token's are chosen."""

    count: int
    per_token: int
    """Experts a token goes to, 1 to `count`."""
    ffn_size: int
    is_renormalised: bool
    """True when the weights of a token's experts sum to 1 (before `scaling`); else they are its scores."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have one plain network instead of experts, ascending."""
    scoring: str = "softmax"
    """`softmax` over all experts, or `sigmoid` of each."""
    scaling: float = 1.0
    """Factor on the weights of a token's experts."""
    groups: int = 1
    """Experts are in so many groups of equal size, from 1."""
    groups_per_token: int = 1
    """Groups a token's experts are taken from, 1 to `groups`."""
    shared_size: int = 0
    """Width of the network every token goes through beside its experts; 0 for none."""
    has_bias: bool = False
    """True when a bias per expert, learned without gradients, takes part in the choice but not the weight."""
    aux_loss: float = field(default=0.0, compare=False)
    """Weight of the load-balancing loss; training only, so two models may differ in it and be the same."""


@dataclass(frozen=True, slots=True)
class Tower:
    """An encoder of images or sound beside the language model.

    Towers differ much and Megatron has no options for most of what they are, so a tower is its section of
    `config.json`, complete: what a file leaves out is there with transformers' default.
    """

    fields: Mapping[str, Any]

    def size(self, *names: str) -> int:
        """Give the size that has one of these names."""
        return int(next(self.fields[name] for name in names if name in self.fields))

    @property
    def depth(self) -> int:
        """Layers."""
        return self.size("depth", "num_hidden_layers", "encoder_layers")

    @property
    def hidden_size(self) -> int:
        """Width between layers."""
        return self.size("hidden_size", "d_model")

    @property
    def ffn_size(self) -> int:
        """Width inside a layer's network."""
        return self.size("intermediate_size", "encoder_ffn_dim")

    @property
    def num_heads(self) -> int:
        """Attention heads; each has its own key and value."""
        return self.size("num_heads", "num_attention_heads", "encoder_attention_heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Everything that decides shapes and the function computed."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    """Rows of the embedding that mean something."""
    padded_vocab_size: int
    """Rows Megatron keeps, a multiple of its divisor; the surplus is padding."""
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    is_tied: bool
    """True when the output layer is the embedding."""
    has_qkv_bias: bool
    has_qk_norm: bool
    init_std: float = 0.02
    experts: Experts | None = None
    """None for dense models."""
    latent: LatentAttention | None = None
    """None for grouped-query attention."""
    recurrence: Recurrence | None = None
    """None for models with attention. With it, positions have no rotary frequencies: `rope_theta` is 0."""
    mtp_layers: int = 0
    """Layers behind the last one, each of which predicts one token further."""
    mrope_section: tuple[int, ...] | None = None
    """Rotary frequencies that turn with time, height and width (Qwen2-VL, arXiv 2409.12191, section 2.1).
    None when all turn with the position in the text."""
    vision: Tower | None = None
    audio: Tower | None = None
    outer: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `config.json` outside its sections: token numbers, which features are taken."""

    def has_experts(self, layer: int) -> bool:
        """Tell whether a layer is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def is_uniform(self) -> bool:
        """True when all layers hold the same tensors."""
        return self.experts is None or not self.experts.dense_layers

    @property
    def query_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_size

    @property
    def context_size(self) -> int:
        """Columns of the output projection: all heads' values."""
        return self.num_heads * (self.head_size if self.latent is None else self.latent.value_size)

    @property
    def kv_size(self) -> int:
        """Rows of the key (and of the value) projection."""
        return self.num_kv_heads * self.head_size
