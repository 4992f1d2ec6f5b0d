"""The numbers that define a decoder model, dense or of experts, in one vocabulary for both worlds."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Architecture", "Experts", "RopeScaling"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts."""

    kind: str
    """`linear` (positions divided by the factor) or `llama3` (Llama 3.1's bands: 1, 4, 8192)."""
    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The mixture of experts: how many, how wide, and how a token's are chosen (always by softmax)."""

    count: int
    per_token: int
    """Experts a token goes to, 1 to `count`."""
    ffn_size: int
    is_renormalised: bool
    """True when the weights of a token's experts sum to 1; else they are what the softmax over all gave."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have one plain network instead of experts, ascending."""
    aux_loss: float = field(default=0.0, compare=False)
    """Weight of the load-balancing loss; training only, so two models may differ in it and be the same."""


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
    def kv_size(self) -> int:
        """Rows of the key (and of the value) projection."""
        return self.num_kv_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        """Rows of Megatron's fused projection."""
        return self.query_size + 2 * self.kv_size
