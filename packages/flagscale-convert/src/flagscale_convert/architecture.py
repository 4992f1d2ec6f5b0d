"""The numbers that define a dense decoder model, in one vocabulary for both worlds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Architecture", "RopeScaling"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts."""

    kind: str
    """`linear` (positions divided by the factor) or `llama3` (Llama 3.1's bands: 1, 4, 8192)."""
    factor: float


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
