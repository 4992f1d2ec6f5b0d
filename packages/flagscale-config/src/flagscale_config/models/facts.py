"""What is known of a language model: its architecture in numbers, and what follows from them by formula.

One shape for three origins: the published models (`published()`), a Hugging Face `config.json`
(`from_hugging_face()`) and Megatron options (`from_megatron()`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.models.parts import (
    Attention,
    Audio,
    DeltaNet,
    Experts,
    Rwkv7,
    Vision,
)

__all__ = ["ModelFacts"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The numbers of one model. Sizes are in elements, counts include every tensor that training changes."""

    name: str = ""
    """Name in this catalogue (`qwen3-0.6b`); empty for a model of one's own."""
    family: str = ""
    architecture: str = ""
    """Hugging Face's class, `Qwen3ForCausalLM`."""
    hf_repo: str | None = None
    license: str | None = None
    published_size: str = ""
    """Total, or total / active, in the publisher's words."""
    source: str = ""
    """Where the numbers come from."""
    notes: tuple[str, ...] = ()
    """What differs between releases, and numbers that only a published total confirms."""

    hidden_size: int
    num_layers: int
    vocab_size: int | None
    """Rows of the embedding; None where a tokenizer still has to decide it."""
    ffn_size: int
    """Width of an ordinary feed-forward layer, whether or not the model has one."""
    attention: Attention
    linear_attention: DeltaNet | None = None
    """What stands instead of `attention` in most layers of a hybrid."""
    experts: Experts | None = None
    num_mtp_layers: int = 0
    """Modules that predict further tokens (multi-token prediction)."""
    is_gated: bool = True
    """Whether feed-forward layers have a gate (SwiGLU)."""
    activation: str = "silu"
    has_ffn_bias: bool = False
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_eps: float = 1e-5
    norms_per_layer: int = 2
    is_tied: bool = False
    """Whether embedding and output layer share one matrix."""
    max_positions: int | None = None
    """Longest sequence in tokens."""
    num_learned_positions: int = 0
    """Learned position vectors; 0 with rotary positions."""
    rope_theta: float | None = None
    rope_scaling: Mapping[str, Any] | None = None
    """As in `config.json`; None where positions are not scaled."""
    rope_percent: float = 1.0
    """Part of each head that has positions."""
    vision: Vision | None = None
    audio: Audio | None = None
    other_parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameters of parts without a formula here (the speech of Qwen3-Omni), as counted; in no total."""

    # --- parameters -------------------------------------------------------------------------------------

    @property
    def num_parameters(self) -> int:
        """Parameters of the model: language, vision and audio, without modules for multi-token prediction.

        Raises:
            ConfigError: the vocabulary is not known.
        """
        return self.num_language_parameters + sum(
            part.num_parameters for part in (self.vision, self.audio) if part is not None
        )

    @property
    def num_language_parameters(self) -> int:
        """Parameters of the language model alone."""
        return self._embeddings + self._blocks(active=False)

    @property
    def num_active_parameters(self) -> int:
        """Parameters of the model that one token meets, both embeddings included."""
        return self.num_parameters - self._blocks(active=False) + self._blocks(active=True)

    @property
    def num_mtp_parameters(self) -> int:
        """Parameters of the modules for multi-token prediction; they share embedding and output layer.

        Each is two norms, a projection of two widths to one, a layer of the last kind and a final norm
        (arXiv 2412.19437, section 2.2).
        """
        hidden, norm = self.hidden_size, self._norm
        layer = self._layer(self.num_layers - 1, active=False)
        return self.num_mtp_layers * (2 * norm * hidden + 2 * hidden**2 + layer + norm * hidden)

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the embedding, and of the output layer where it has its own."""
        return self._vocabulary * self.hidden_size * (1 if self.is_tied else 2)

    # --- work and memory ---------------------------------------------------------------------------------

    def forward_flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations of one forward pass per token of a sequence of `seq_len`.

        Matrix products only, two operations per multiply-add, the causal half of the attention; without
        multi-token prediction, vision and audio.
        """
        return 2.0 * (self._products + self._vocabulary * self.hidden_size) + self._core(seq_len)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations of one training step per token of a sequence of `seq_len`.

        Forward and backward (three forward passes) without recomputation, modules for multi-token prediction
        included: 6 x the weights of all products that a token takes part in, plus 6 L s a d for attention
        with heads of width d (3 L s a (n + r + v) when latent). Published throughput tables count so.
        """
        each = self._mtp_products + self._vocabulary * self.hidden_size
        mtp = 2.0 * each + seq_len * self.attention.core_width
        return 3.0 * (self.forward_flops_per_token(seq_len) + self.num_mtp_layers * mtp)

    def kv_cache_bytes_per_token(self, bytes_per_element: float = 2) -> float:
        """Return the bytes a serving engine keeps per token of a sequence; 0 for a purely recurrent model.

        Keys and values of every group: 2 x layers x groups x head_dim; latent attention keeps one compressed
        vector instead, layers x (kv_rank + rope_dim), and tensor parallelism does not divide it.
        """
        return self._num_full_attention * self.attention.cache_per_token * bytes_per_element

    def state_bytes_per_sequence(self, bytes_per_element: float = 4) -> float:
        """Return the bytes of recurrent state per sequence of any length; 0 where there is only attention."""
        kinds = [self._attention_of(layer) for layer in range(self.num_layers)]
        return sum(kind.state_per_sequence for kind in kinds if isinstance(kind, (DeltaNet, Rwkv7))) * (
            bytes_per_element
        )

    # --- origins ----------------------------------------------------------------------------------------

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> ModelFacts:
        """Read a Hugging Face `config.json`.

        Raises:
            ConfigError: the architecture is not known, or a number is missing.
        """
        from flagscale_config.models.hugging_face import read

        return read(config)

    @classmethod
    def from_megatron(cls, options: Mapping[str, Any], vocab_size: int | None = None) -> ModelFacts:
        """Read Megatron options by canonical name, as `Train.options` holds them.

        `vocab_size` counts the rows of the embedding where the options do not say it.

        Raises:
            ConfigError: the model is of a kind not described here, or a number is missing.
        """
        from flagscale_config.models.megatron import read

        return read(options, vocab_size)

    def to_megatron(self) -> dict[str, Any]:
        """Return the Megatron options that describe the language model, by canonical name.

        What decides tensors and their meaning; sizes of batches, dropout, initialisation and losses are the
        user's.

        Raises:
            ConfigError: Megatron's `GPTModel` cannot be this model (RWKV, linear attention, Grok).
        """
        from flagscale_config.models.megatron import write

        return write(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts and what follows from them as plain data, what is not there left out."""
        from dataclasses import asdict

        facts = {key: value for key, value in asdict(self).items() if value not in (None, "", (), {})}
        counts = {"num_parameters": self.num_parameters, "num_active_parameters": self.num_active_parameters}
        if self.num_mtp_layers:
            counts["num_mtp_parameters"] = self.num_mtp_parameters
        return {**facts, **counts, "kv_cache_bytes_per_token_16_bit": int(self.kv_cache_bytes_per_token())}

    # --- layers -----------------------------------------------------------------------------------------

    @property
    def _vocabulary(self) -> int:
        if self.vocab_size is None:
            message = "the size of the vocabulary is needed; set padded_vocab_size or vocab_size"
            raise ConfigError([Problem(code="config/model", message=message)])
        return self.vocab_size

    @property
    def _norm(self) -> int:
        return 2 if self.normalization == "LayerNorm" else 1

    @property
    def _num_full_attention(self) -> int:
        if self.linear_attention is None:
            return self.num_layers
        return self.num_layers // self.linear_attention.full_attention_interval

    @property
    def _embeddings(self) -> int:
        """Embeddings and the norms that belong to no layer."""
        hidden = self.hidden_size
        norms = 2 if isinstance(self.attention, Rwkv7) else 1  # RWKV also normalises the embedding
        return self.num_embedding_parameters + (self.num_learned_positions + norms * self._norm) * hidden

    def _attention_of(self, layer: int) -> Attention | DeltaNet:
        linear = self.linear_attention
        if linear is None or (layer + 1) % linear.full_attention_interval == 0:
            return self.attention
        return linear

    def _feed_forward(self, layer: int, *, active: bool) -> tuple[int, int]:
        """Return matrix elements and vector elements of a layer's feed-forward part."""
        experts = self.experts
        if experts is not None and layer not in experts.dense_layers:
            return (
                experts.matrices(self.hidden_size, is_gated=self.is_gated, active=active),
                experts.vectors(self.hidden_size, is_gated=self.is_gated, active=active),
            )
        vectors = self.hidden_size if isinstance(self.attention, Rwkv7) else 0  # factor of the channel mix
        if self.has_ffn_bias:
            vectors += self.hidden_size + (2 if self.is_gated else 1) * self.ffn_size
        return (3 if self.is_gated else 2) * self.hidden_size * self.ffn_size, vectors

    def _layer_matrices(self, layer: int, *, active: bool) -> int:
        attention = self._attention_of(layer)
        matrices = attention.matrices(self.hidden_size) + self._feed_forward(layer, active=active)[0]
        if isinstance(attention, Rwkv7) and layer == 0:
            matrices -= 2 * attention.v_rank * self.hidden_size  # no earlier layer to take values from
        return matrices

    def _layer(self, layer: int, *, active: bool) -> int:
        """Return the parameters of one layer."""
        attention = self._attention_of(layer)
        vectors = attention.vectors(self.hidden_size, self._norm)
        vectors += self._feed_forward(layer, active=active)[1]
        vectors += self.norms_per_layer * self._norm * self.hidden_size
        if isinstance(attention, Rwkv7) and layer == 0:
            vectors -= self.hidden_size
        return self._layer_matrices(layer, active=active) + vectors

    def _blocks(self, *, active: bool) -> int:
        return sum(self._layer(layer, active=active) for layer in range(self.num_layers))

    @property
    def _products(self) -> int:
        """Weights of all layers that a token takes part in products with, and products with states."""
        layers = range(self.num_layers)
        states = sum(
            kind.state_products
            for kind in map(self._attention_of, layers)
            if isinstance(kind, (DeltaNet, Rwkv7))
        )
        return states + sum(self._layer_matrices(layer, active=True) for layer in layers)

    @property
    def _mtp_products(self) -> int:
        return 2 * self.hidden_size**2 + self._layer_matrices(self.num_layers - 1, active=True)

    def _core(self, seq_len: int) -> float:
        """Return the operations of causal attention in one forward pass per token."""
        return float(self._num_full_attention * seq_len * self.attention.core_width)
