"""Parts of a model that count themselves: attention of four kinds, experts, vision and audio towers.

Every part knows its weight matrices (elements that take part in a product for a token) and its vectors
(biases, norms, low-order parameters). Sizes are in elements. Formulae: the shapes of the tensors that
Hugging Face's and Megatron's model classes create, to which `tests/test_models.py` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Attention",
    "Audio",
    "DeltaNet",
    "Experts",
    "GroupedAttention",
    "LatentAttention",
    "Rwkv7",
    "Vision",
]


@dataclass(frozen=True, kw_only=True)
class GroupedAttention:
    """Attention in which groups of query heads share keys and values; the plain kind has a group per head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    has_gate: bool = False
    """Whether the output is multiplied by a gate as wide as the queries (Qwen3-Next)."""

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def core_width(self) -> int:
        """Width of the query-key products plus that of the products with the values."""
        return 2 * self.query_width

    @property
    def cache_per_token(self) -> int:
        """Elements kept for each token of a sequence."""
        return 2 * self.kv_width

    @property
    def state_per_sequence(self) -> int:
        """Elements kept for a sequence of any length."""
        return 0

    @property
    def state_products(self) -> int:
        """Multiply-adds per token on a state of constant size."""
        return 0

    def matrices(self, hidden: int) -> int:
        """Return the elements of the weight matrices."""
        queries = self.query_width * (2 if self.has_gate else 1)
        return hidden * (queries + 2 * self.kv_width) + self.query_width * hidden

    def vectors(self, hidden: int, norm: int) -> int:
        """Return the elements of biases and norms; `norm` is 2 where a norm has a bias, else 1."""
        count = 2 * norm * self.head_dim if self.has_qk_norm else 0
        if self.has_qkv_bias:
            count += self.query_width * (2 if self.has_gate else 1) + 2 * self.kv_width
        return count + (hidden if self.has_out_bias else 0)


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention of DeepSeek-V2 and V3 (arXiv 2405.04434, section 2.1)."""

    num_heads: int
    kv_rank: int
    """Width of the compressed keys and values."""
    q_rank: int | None = None
    """Width of the compressed queries; None where they are not compressed."""
    nope_dim: int = 128
    """Head width of queries and keys without positions."""
    rope_dim: int = 64
    """Head width of queries and keys with rotary positions; one key for all heads."""
    v_dim: int = 128
    """Head width of values."""
    has_latent_norm: bool = True
    has_out_bias: bool = False

    @property
    def core_width(self) -> int:
        """Width of the query-key products plus that of the products with the values."""
        return self.num_heads * (self.nope_dim + self.rope_dim + self.v_dim)

    @property
    def cache_per_token(self) -> int:
        """Elements kept for each token: the compressed keys and values and the rotary key."""
        return self.kv_rank + self.rope_dim

    @property
    def state_per_sequence(self) -> int:
        """Elements kept for a sequence of any length."""
        return 0

    @property
    def state_products(self) -> int:
        """Multiply-adds per token on a state of constant size."""
        return 0

    def matrices(self, hidden: int) -> int:
        """Return the elements of the weight matrices."""
        query = self.num_heads * (self.nope_dim + self.rope_dim)
        queries = hidden * query if self.q_rank is None else self.q_rank * (hidden + query)
        keys_and_values = hidden * self.cache_per_token
        keys_and_values += self.kv_rank * self.num_heads * (self.nope_dim + self.v_dim)
        return queries + keys_and_values + self.num_heads * self.v_dim * hidden

    def vectors(self, hidden: int, norm: int) -> int:
        """Return the elements of biases and norms; `norm` is 2 where a norm has a bias, else 1."""
        norms = norm * (self.kv_rank + (self.q_rank or 0)) if self.has_latent_norm else 0
        return norms + (hidden if self.has_out_bias else 0)


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated DeltaNet as in Qwen3-Next (arXiv 2412.06464): linear attention with a state of constant size."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    full_attention_interval: int
    """Every how many layers ordinary attention stands instead."""

    core_width = 0
    cache_per_token = 0

    @property
    def _conv_width(self) -> int:
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_products(self) -> int:
        """Multiply-adds per token on the state: decayed read, two updates of rank one, output."""
        return 4 * self.num_value_heads * self.key_dim * self.value_dim

    @property
    def state_per_sequence(self) -> int:
        """Elements kept for a sequence: one matrix per value head and the inputs under the convolution."""
        matrices = self.num_value_heads * self.key_dim * self.value_dim
        return matrices + self._conv_width * (self.conv_kernel - 1)

    def matrices(self, hidden: int) -> int:
        """Return the elements of the weight matrices, the short convolution included."""
        values = self.num_value_heads * self.value_dim
        inputs = hidden * (self._conv_width + values + 2 * self.num_value_heads)
        return inputs + values * hidden + self._conv_width * self.conv_kernel

    def vectors(self, hidden: int, norm: int) -> int:  # noqa: ARG002 - the same call as the other kinds
        """Return the elements of decay, time step and the norm per head."""
        return 2 * self.num_value_heads + self.value_dim


@dataclass(frozen=True, kw_only=True)
class Rwkv7:
    """Time mixing of RWKV-7 (arXiv 2503.14456): a recurrent state instead of attention.

    Parameters of a whole model with vocabulary V, width D and L layers is
    2 D V + 4 D + L D (12 D + 2 (w + a + v + g) + 19) - (2 D v + D), where w, a, v, g are the low ranks; the
    first layer has no value residual.
    """

    num_heads: int
    head_dim: int
    decay_rank: int
    a_rank: int
    v_rank: int
    gate_rank: int

    core_width = 0
    cache_per_token = 0

    @property
    def state_products(self) -> int:
        """Multiply-adds per token on the state: read by the removal key, two updates of rank one, output."""
        return 4 * self.num_heads * self.head_dim**2

    @property
    def state_per_sequence(self) -> int:
        """Elements kept for a sequence: one matrix per head and the last input of time and channel mixing."""
        return self.num_heads * self.head_dim**2 + 2 * self.num_heads * self.head_dim

    def matrices(self, hidden: int) -> int:
        """Return the elements of the four square matrices and of the low-rank pairs."""
        return hidden * (4 * hidden + 2 * (self.decay_rank + self.a_rank + self.v_rank + self.gate_rank))

    def vectors(self, hidden: int, norm: int) -> int:  # noqa: ARG002 - the same call as the other kinds
        """Return the elements of mixing factors, biases and group norm."""
        return 14 * hidden


Attention = GroupedAttention | LatentAttention | Rwkv7


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the feed-forward layer."""

    num_experts: int
    experts_per_token: int
    ffn_size: int
    """Width of one expert."""
    shared_size: int = 0
    """Width of the feed-forward layer that sees every token beside the experts; 0 without one."""
    has_shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    """Layers, from 0, that have an ordinary feed-forward layer instead."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    scaling_factor: float = 1.0
    """Factor on the weights of the chosen experts."""
    num_groups: int = 1
    """Groups into which the experts are sorted for routing."""
    groups_per_token: int = 1
    has_expert_bias: bool = False
    """Whether a bias that no gradient reaches balances the load; not counted as a parameter."""
    aux_loss_coeff: float = 0.0
    has_bias: bool = False
    """Whether the experts and the router have biases."""

    def matrices(self, hidden: int, is_gated: bool, *, active: bool) -> int:  # noqa: FBT001
        """Return the elements of router and experts; of the chosen experts only where `active`."""
        factor = 3 if is_gated else 2
        experts = self.experts_per_token if active else self.num_experts
        gate = hidden if self.has_shared_gate else 0
        return (
            hidden * self.num_experts + factor * hidden * (experts * self.ffn_size + self.shared_size) + gate
        )

    def vectors(self, hidden: int, is_gated: bool, *, active: bool) -> int:  # noqa: FBT001
        """Return the elements of biases."""
        if not self.has_bias:
            return 0
        experts = self.experts_per_token if active else self.num_experts
        return self.num_experts + experts * (hidden + (2 if is_gated else 1) * self.ffn_size)


@dataclass(frozen=True, kw_only=True)
class Vision:
    """A vision tower and what joins it to the language model."""

    kind: Literal["clip", "siglip", "qwen2_5_vl", "qwen3_vl"]
    depth: int
    """Layers that are built; LLaVA-OneVision drops the last of SigLIP's 27."""
    hidden_size: int
    ffn_size: int
    num_heads: int
    patch_size: int
    out_size: int
    """Width of the language model."""
    image_size: int | None = None
    """Side of the square input in pixels, where it is fixed."""
    num_positions: int = 0
    """Learned position vectors."""
    temporal_patch_size: int = 1
    merge_size: int = 1
    """Side of the square of patches that become one token."""
    deepstack_layers: tuple[int, ...] = ()
    """Layers whose outputs also enter the language model (Qwen3-VL)."""
    has_newline: bool = False
    """Whether a learned vector ends each row of tokens (LLaVA-OneVision)."""

    @property
    def num_parameters(self) -> int:
        """Elements of tower and projector."""
        width, positions = self.hidden_size, self.num_positions * self.hidden_size
        patch = 3 * self.temporal_patch_size * self.patch_size**2 * width
        square = 4 * width**2 + 4 * width
        if self.kind == "qwen2_5_vl":
            gated = 3 * width * self.ffn_size + 2 * self.ffn_size + width
            return patch + self.depth * (square + gated + 2 * width) + self._merger(width)
        plain = 2 * width * self.ffn_size + self.ffn_size + width
        layers = self.depth * (square + plain + 4 * width)
        if self.kind == "qwen3_vl":
            merged = width * self.merge_size**2
            mergers = self._merger(2 * width) + len(self.deepstack_layers) * self._merger(2 * merged)
            return patch + width + positions + layers + mergers
        first = (
            3 * width if self.kind == "clip" else width
        )  # class token and norm, or the bias of the patches
        tower = patch + first + positions + layers + 2 * width
        projector = width * self.out_size + self.out_size + self.out_size**2 + self.out_size
        return tower + projector + (self.out_size if self.has_newline else 0)

    def _merger(self, norm: int) -> int:
        """Return the elements of the layers that turn a square of patches into one token."""
        merged = self.hidden_size * self.merge_size**2
        return norm + merged**2 + merged + merged * self.out_size + self.out_size


@dataclass(frozen=True, kw_only=True)
class Audio:
    """The audio encoder of Qwen3-Omni."""

    hidden_size: int
    depth: int
    ffn_size: int
    num_heads: int
    num_mel_bins: int
    conv_channels: int
    """Channels of the three convolutions, each of which halves time and frequency."""
    out_size: int

    @property
    def num_parameters(self) -> int:
        """Elements of the encoder; its positions are computed."""
        width, channels = self.hidden_size, self.conv_channels
        bins = -(-self.num_mel_bins // 8)
        convolutions = 9 * channels + channels + 2 * (9 * channels**2 + channels) + bins * channels * width
        layer = 4 * (width**2 + width) + 2 * width * self.ffn_size + self.ffn_size + width + 4 * width
        projection = width**2 + width + width * self.out_size + self.out_size
        return convolutions + self.depth * layer + 2 * width + projection
