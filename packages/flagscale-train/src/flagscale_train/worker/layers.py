"""Layers without Transformer Engine: what Megatron builds a decoder from, in plain torch.

Megatron's own local layers refuse sequence and context parallelism and cannot build latent attention (MLA).
`TorchLayers` is a provider of layers that can; `local_spec` describes a decoder with it. Nothing here depends
on the kind of device. With Transformer Engine Megatron's own choice of layers is used, so nothing here is.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import get_cuda_rng_tracker, mappings
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import grouped_mm, scaled_dot_product_attention

from flagscale_train.worker.refusal import Refusal

__all__ = ["Attention", "GroupedExperts", "LatentAttention", "Norm", "TorchLayers", "local_spec"]


class Norm:
    """Builds the norm the configuration names, with its parameters marked for sequence parallel.

    Megatron's wrapper of torch's norms refuses sequence parallel, although all it takes is the mark on the
    parameters that makes Megatron sum their gradients over the tensor-parallel group.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_options: Any) -> Any:
        """Return a torch module; `config` is Megatron's TransformerConfig."""
        if config.layernorm_zero_centered_gamma:
            raise Refusal("apply_layernorm_1p: needs Transformer Engine, which is not installed: remove it")
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class Attention(torch.nn.Module):
    """Scaled dot-product attention by torch, with context parallelism and any width of keys and values.

    Under context parallelism each rank holds the pieces r and 2n-1-r of the 2n pieces of a sequence, so that
    all have as much to do, and gathers the keys and values of the others. Its backward sums their gradients.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_options: Any,
    ) -> None:
        """Prepare the attention of one layer.

        Args:
            config: Megatron's TransformerConfig.
            layer_number: counted from 1.
            attention_dropout: probability; the configuration's by default.
            softmax_scale: factor of the scores; 1 / sqrt(width of a head) by default.
            pg_collection: Megatron's process groups; the global ones by default.
        """
        super().__init__()
        if config.softmax_type != "vanilla":
            raise Refusal(
                f"softmax_type: {config.softmax_type}: needs Transformer Engine, which is not installed: "
                "use vanilla"
            )
        self.config = config
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        is_windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window: int | None = config.window_size[0] if is_windowed else None
        group = getattr(pg_collection, "cp", None)
        self.group = parallel_state.get_context_parallel_group() if group is None else group

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_options: Any,
    ) -> torch.Tensor:
        """Attend causally, and only to what the mask leaves.

        Args:
            query: [sequence here, batch, heads here, width].
            key: [sequence here, batch, groups here, width].
            value: [sequence here, batch, groups here, width of a value].
            attention_mask: true where a key is hidden, [batch, 1, sequence here, whole sequence], or None for
                causal alone.
            attention_bias: not supported.
            packed_seq_params: not supported; give `reset_attention_mask` for documents that must not see each
                other.

        Returns:
            [sequence here, batch, heads here * width of a value].
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise Refusal("packed sequences and attention biases need Transformer Engine")
        key, value = self._whole(key), self._whole(value)
        seen = self._seen(query, key, attention_mask)
        query_bhsd, key_bgsd, value_bgsd = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        attend = partial(
            scaled_dot_product_attention,
            query_bhsd,
            key_bgsd,
            value_bgsd,
            attn_mask=seen,
            is_causal=seen is None,
            scale=self.scale,
            enable_gqa=query_bhsd.shape[1] != key_bgsd.shape[1],
        )
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            # Each tensor-parallel rank has other heads and drops other places; under sequence parallel
            # Megatron has changed to the ranks' own generators already.
            with get_cuda_rng_tracker().fork():
                out_bhsd = attend(dropout_p=dropout)
        else:
            out_bhsd = attend(dropout_p=dropout)
        return out_bhsd.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        """Gather a tensor over the context-parallel ranks and put its pieces in the sequence's order."""
        size = self.group.size()
        if size == 1:
            return part
        gathered = mappings.gather_from_sequence_parallel_region(part.contiguous(), group=self.group)
        pieces = gathered.chunk(2 * size)
        # They come as 0, 2n-1, 1, 2n-2, ...: the first half of each rank ascends, the second descends.
        return torch.cat([*pieces[::2], *reversed(pieces[1::2])])

    def _seen(
        self, query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return which keys each query may see; None if that is every key up to its own place."""
        if hidden is not None and self.window is None:
            return ~hidden
        if self.group.size() == 1 and self.window is None:
            return None
        queries, keys = self._places(query), torch.arange(key.shape[0], device=key.device)
        seen = queries[:, None] >= keys[None]
        if self.window is not None and self.window >= 0:
            seen &= queries[:, None] - keys[None] <= self.window
        return seen if hidden is None else seen & ~hidden

    def _places(self, query: torch.Tensor) -> torch.Tensor:
        """Return where in the sequence the queries of this rank stand."""
        size, rank, length = self.group.size(), self.group.rank(), query.shape[0]
        if size == 1:
            return torch.arange(length, device=query.device)
        half = torch.arange(length // 2, device=query.device)
        return torch.cat([rank * len(half) + half, (2 * size - 1 - rank) * len(half) + half])


class LatentAttention(MLASelfAttention):
    """Multi-head latent attention (arXiv 2405.04434) of plain layers.

    Two things differ from Megatron's. Without a query rank there is no norm before the query's projection, as
    published; Megatron asks for a fused one. And the part of the keys that carries positions is shared by all
    heads, so its gradient is summed over the tensor-parallel ranks, each of which has some of the heads;
    Megatron's way of gathering leaves that out where the down-projection is a column-parallel layer.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        has_query_rank = self.config.q_lora_rank is not None
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm if has_query_rank else IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, latent = super()._qkv_down_projection(hidden_states)
        if self.tp_group.size() == 1:
            return query, latent
        latent = mappings.gather_from_tensor_model_parallel_region(latent, group=self.tp_group)
        if self.config.sequence_parallel:
            # What follows gathers the sequence again, and that sums the gradients.
            return query, mappings.scatter_to_sequence_parallel_region(latent, group=self.tp_group)
        keys_values, positions = latent.split(
            [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1
        )
        positions = mappings.copy_to_tensor_model_parallel_region(positions, group=self.tp_group)
        return query, torch.cat([keys_values, positions], dim=-1)


class GroupedExperts(SequentialMLP):
    """Experts whose matrix products are one grouped product by torch instead of one after another.

    Parameters and checkpoints are those of Megatron's sequential experts.
    """

    def forward(
        self, hidden: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Apply each expert to its tokens.

        Args:
            hidden: tokens in the order of their experts, [tokens, hidden size].
            tokens_per_expert: how many each expert gets, [experts here].
            probs: weight of each token's expert, [tokens].

        Returns:
            The weighted outputs, [tokens, hidden size], and no bias.
        """
        config = self.config
        has_adapters = any(hasattr(layer, "lora") for layer in self.local_experts[0].children())
        if (
            has_adapters
            or config.add_bias_linear
            or not config.gated_linear_unit
            or config.moe_apply_probs_on_input
        ):
            return super().forward(hidden, tokens_per_expert, probs)
        ends = tokens_per_expert.to(hidden.device).cumsum(0, dtype=torch.int32)
        first = torch.stack([expert.linear_fc1.weight for expert in self.local_experts]).transpose(1, 2)
        second = torch.stack([expert.linear_fc2.weight for expert in self.local_experts]).transpose(1, 2)
        gate, up = grouped_mm(hidden, first, offs=ends).chunk(2, dim=-1)
        inner = (config.activation_func(gate) * up * probs[:, None]).to(hidden.dtype)
        return grouped_mm(inner, second, offs=ends), None


class TorchLayers(LocalSpecProvider):
    """Megatron's local layers with the norm, the attention and the experts of this module."""

    def layer_norm(self, *_arguments: Any, **_named: Any) -> Any:
        """Return the norm; which one it builds is the configuration's choice."""
        return Norm

    def core_attention(self) -> Any:
        """Return the attention between projections."""
        return Attention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:  # noqa: FBT001 -- Megatron's signature
        """Return the builder of a layer's experts."""
        submodules = MLPSubmodules(
            linear_fc1=self.column_parallel_linear(), linear_fc2=self.row_parallel_linear()
        )
        return partial(GroupedExperts if moe_use_grouped_gemm else SequentialMLP, submodules=submodules)


def local_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Describe the decoder in plain torch layers; Megatron's model builder calls this.

    Args:
        config: Megatron's GPTModelConfig, or what stands for it, with `transformer`.
        vp_stage: virtual pipeline stage, None without virtual stages.

    Returns:
        The block's specification.
    """
    # Megatron looks both up by name where it describes layers, those of multi-token prediction included.
    gpt_layer_specs.LocalSpecProvider = TorchLayers
    gpt_layer_specs.MLASelfAttention = LatentAttention
    transformer = config.transformer
    block = gpt_layer_specs.get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    block.layer_norm = Norm
    return block
