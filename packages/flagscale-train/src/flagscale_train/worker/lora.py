"""Low-rank adapters (LoRA, arXiv 2106.09685) on Megatron's parallel linear layers.

The model's own weights come from `pretrained_checkpoint` and are frozen; each chosen layer gets
`x -> alpha / rank * B A x` beside it. Only A and B have gradients, optimizer state and a place in
checkpoints.
Under tensor parallelism the part of an adapter that meets a divided axis is divided with it, the other part
is the same on every rank. Each expert has adapters of its own, on the rank that has the expert.

Layers of Transformer Engine are told by the same rules; `benchmarks/transformer_engine.py` compares both on a
GPU.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, mappings
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.training import checkpointing
from torch.nn.functional import dropout, layer_norm, linear, rms_norm

from flagscale_train.worker.refusal import Refusal

__all__ = ["Adapter", "add_arguments", "attach", "is_asked_for"]

_ROW = ("linear_proj", "linear_fc2")
"""Layers whose input is divided among tensor-parallel ranks; of all others it is the output."""
_DOWN = ("linear_q_down_proj", "linear_kv_down_proj")
_DENSE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_FEED_FORWARD = {
    "gate_proj": ("linear_fc1", 0), "up_proj": ("linear_fc1", 1), "down_proj": ("linear_fc2", None),
}  # fmt: skip
_ATTENTION = {
    "q_proj": ("linear_qkv", 0), "k_proj": ("linear_qkv", 1), "v_proj": ("linear_qkv", 2),
    "o_proj": ("linear_proj", None),
}  # fmt: skip
_LATENT_ATTENTION = {
    "q_proj": ("linear_q_proj", None), "q_a_proj": ("linear_q_down_proj", None),
    "q_b_proj": ("linear_q_up_proj", None), "kv_a_proj_with_mqa": ("linear_kv_down_proj", None),
    "kv_b_proj": ("linear_kv_up_proj", None), "o_proj": ("linear_proj", None),
}  # fmt: skip
"""Hugging Face's layers: in which of Megatron's they are, and as which part of it; None for all of it."""
_ALL_PARTS = {"linear_qkv": {0, 1, 2}, "linear_fc1": {0, 1}}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(self_attention|mlp)\.(\w+)")
_EXPERT = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.(?:local_experts\.(\d+)\.)?(linear_fc[12])")
"""A layer of one expert here, or without a number that of all experts here in one."""


def add_arguments(parser: Any) -> Any:
    """Add the options of FlagOS's Megatron-LM-FL to a Megatron that lacks them."""
    if "--peft-type" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group(title="lora")
    group.add_argument("--peft-type", choices=["lora"])
    group.add_argument("--lora-dim", type=int, default=8)
    group.add_argument("--lora-alpha", type=int, default=16)
    group.add_argument("--lora-dropout", type=float, default=0.0)
    group.add_argument("--lora-dropout-position", default="pre")
    group.add_argument("--lora-in-init-method", default="kaiming")
    group.add_argument("--lora-out-init-method", default="zero")
    group.add_argument("--lora-target-modules", nargs="+", default=[*_DENSE])
    return parser


def is_asked_for(args: Any) -> bool:
    """Tell whether Megatron's arguments ask for adapters; ones that were not parsed with ours do not."""
    return getattr(args, "peft_type", None) == "lora"


@dataclass(frozen=True)
class _Settings:
    rank: int
    scale: float
    dropout: float
    is_after: bool
    """Whether dropout comes after the adapter, not before."""
    init: tuple[str, str]
    """Of A and of B."""
    seed: int
    targets: dict[str, set[int] | None]
    """Megatron's layers and which of their parts; None for all."""

    @classmethod
    def of(cls, args: Any) -> _Settings:
        attention = _LATENT_ATTENTION if args.multi_latent_attention else _ATTENTION
        targets: dict[str, set[int] | None] = {}
        for name in args.lora_target_modules:
            layer, part = {**attention, **_FEED_FORWARD}.get(name, (name, None))
            parts = targets.setdefault(layer, set())
            targets[layer] = None if part is None or parts is None else parts | {part}
        return cls(
            rank=args.lora_dim,
            scale=args.lora_alpha / args.lora_dim,
            dropout=args.lora_dropout,
            is_after=args.lora_dropout_position == "post",
            init=(args.lora_in_init_method, args.lora_out_init_method),
            seed=args.seed,
            targets=targets,
        )


class Adapter(torch.nn.Module):
    """The low-rank change of one linear layer."""

    def __init__(
        self, layer: Any, name: str, settings: _Settings, config: Any, weight: str = "weight"
    ) -> None:
        """Make an adapter for a layer.

        Args:
            layer: Megatron's column- or row-parallel layer; its weight is [output here, input here].
            name: of the layer in the whole model, of which the first values are a function.
            settings: rank, scale and the rest.
            config: Megatron's TransformerConfig.
            weight: name of the weight in the layer, which may have those of several experts.

        Raises:
            Refusal: the layer is one that adapters do not follow.
        """
        super().__init__()
        self.name, self._settings, self._config = name, settings, config
        self.kind = name.rpartition(".")[2]
        self._is_column = self.kind not in _ROW
        self._is_expert = ".experts." in name
        # A plan divides no expert that has adapters among tensor-parallel ranks.
        self._size = 1 if self._is_expert else parallel_state.get_tensor_model_parallel_world_size()
        self._is_sequence = config.sequence_parallel and self._size > 1
        if self._size > 1 and self.kind in _DOWN and not isinstance(layer, ColumnParallelLinear):
            raise Refusal(
                f"lora_target_modules: {self.kind}: Transformer Engine keeps it whole on every rank, which "
                "adapters do not follow: leave it out, or use tensor_model_parallel_size 1"
            )
        self._layer = [layer]  # in a list, so that it does not become a part of this module
        adapted = getattr(layer, weight)
        rows, columns = adapted.shape
        of_tensor = {"dtype": config.params_dtype, "device": adapted.device}
        self.A = torch.nn.Parameter(torch.empty(settings.rank, columns, **of_tensor))
        self.B = torch.nn.Parameter(torch.empty(rows, settings.rank, **of_tensor))
        divided, whole = (self.B, self.A) if self._is_column else (self.A, self.B)
        set_tensor_model_parallel_attributes(
            divided, is_parallel=True, dim=0 if self._is_column else 1, stride=1
        )
        # Where a rank sees a part of the sequence only, Megatron sums the gradients of what has this mark.
        whole.sequence_parallel = self._is_sequence
        # Megatron sums the gradients of experts over other ranks than those of the rest.
        self.A.allreduce = self.B.allreduce = getattr(adapted, "allreduce", True)
        self._fill()
        self._taught = self._rows_taught()

    @torch.no_grad()
    def _fill(self) -> None:
        """Give first values that do not depend on the layout: each rank takes its part of the same whole."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        for tensor, kind, which in zip((self.A, self.B), self._settings.init, "AB", strict=True):
            axis = (
                getattr(tensor, "partition_dim", -1)
                if getattr(tensor, "tensor_model_parallel", False)
                else None
            )
            shape = list(tensor.shape)
            if axis is not None:
                shape[axis] *= self._size
            whole = torch.empty(shape)
            chance = torch.Generator().manual_seed(
                self._settings.seed + zlib.crc32(f"{self.name}.{which}".encode())
            )
            _INITS[kind](whole, generator=chance)
            if axis is not None and self.kind == "linear_fc1" and self._config.gated_linear_unit:
                gate, up = (half.chunk(self._size)[rank] for half in whole.chunk(2))
                whole = torch.cat([gate, up])
            elif axis is not None:
                whole = whole.chunk(self._size, dim=axis)[rank]
            tensor.copy_(whole)

    def _rows_taught(self) -> torch.Tensor | None:
        """Return 1 for the output rows of the parts asked for and 0 for the others; None for all."""
        parts = self._settings.targets[self.kind]
        if parts is None or parts == _ALL_PARTS[self.kind]:
            return None
        rows = self.B.shape[0]
        if self.kind == "linear_qkv":
            head = self._config.kv_channels
            queries = self._config.num_attention_heads // self._config.num_query_groups * head
            sizes = [queries, head, head]
        else:
            sizes = [rows // 2, rows // 2]
        taught = torch.cat([torch.full((size,), float(part in parts)) for part, size in enumerate(sizes)])
        return taught.repeat(rows // len(taught)).to(self.B.device, self.B.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what is added to the layer's output.

        Args:
            x: the layer's input, [sequence here, batch, input here].

        Returns:
            As the layer's output: [sequence, batch, output here] of a column-parallel layer, [sequence here,
            batch, output] of a row-parallel one.
        """
        x = self._normed(x)
        if not self._settings.is_after:
            # Parts of one tensor drop other places on each rank, copies of one the same.
            x = self._drop(x, is_part=self._is_sequence or not self._is_column)
        low = linear(x, self.A)
        if self._size > 1:
            low = self._exchanged(low)
        out = linear(low, self.B) * self._settings.scale
        if self._taught is not None:
            out = out * self._taught
        if self._settings.is_after:
            out = self._drop(out, is_part=self._is_column or self._is_sequence)
        return out

    def _exchanged(self, low: torch.Tensor) -> torch.Tensor:
        if self._is_column and self._is_sequence:
            return mappings.gather_from_sequence_parallel_region(low)
        if self._is_column:
            return mappings.copy_to_tensor_model_parallel_region(low)
        if self._is_sequence:
            return mappings.reduce_scatter_to_sequence_parallel_region(low)
        return mappings.reduce_from_tensor_model_parallel_region(low)

    def _drop(self, x: torch.Tensor, *, is_part: bool) -> torch.Tensor:
        if not self._settings.dropout or not self.training:
            return x
        with get_cuda_rng_tracker().fork() if is_part and self._size > 1 else nullcontext():
            return dropout(x, self._settings.dropout)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm that Transformer Engine has fused into the layer."""
        layer = self._layer[0]
        weight = getattr(layer, "layer_norm_weight", None)
        if weight is None:
            return x
        if self._config.layernorm_zero_centered_gamma:
            weight = 1 + weight
        if self._config.normalization == "RMSNorm":
            return rms_norm(x, weight.shape, weight, self._config.layernorm_epsilon)
        return layer_norm(x, weight.shape, weight, layer.layer_norm_bias, self._config.layernorm_epsilon)

    def sharded(self, metadata: Any) -> dict[str, Any]:
        """Return A and B as Megatron's checkpoints hold them, by their names in this adapter."""
        axes = {} if self._is_expert else {"B": 0} if self._is_column else {"A": 1}
        made = make_sharded_tensors_for_checkpoint({"A": self.A, "B": self.B}, f"{self.name}.lora.", axes, ())
        by_name = {key.rpartition(".")[2]: value for key, value in made.items()}
        if self._is_expert:
            for tensor in by_name.values():
                tensor.replica_id = (0, 0, parallel_state.get_expert_data_parallel_rank())
        elif self.kind == "linear_fc1" and self._config.gated_linear_unit:
            single = bool((metadata or {}).get("singleton_local_shards", False))
            by_name["B"] = apply_swiglu_sharded_factory(by_name["B"], (), single)
        return by_name


def _xavier(tensor: torch.Tensor, generator: torch.Generator) -> None:
    torch.nn.init.xavier_normal_(tensor, generator=generator)


def _kaiming(tensor: torch.Tensor, generator: torch.Generator) -> None:
    torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _normal(tensor: torch.Tensor, generator: torch.Generator) -> None:
    torch.nn.init.normal_(tensor, std=0.02, generator=generator)


def _zero(tensor: torch.Tensor, generator: torch.Generator) -> None:
    del generator
    torch.nn.init.zeros_(tensor)


_INITS = {"kaiming": _kaiming, "xavier": _xavier, "normal": _normal, "zero": _zero}
"""As peft initialises A (kaiming), and the names Megatron-LM-FL has for others."""


def attach(chunks: Sequence[Any], args: Any) -> Sequence[Any]:
    """Load and freeze a model, and put adapters on it; before anything is wrapped around it.

    Args:
        chunks: this rank's parts of the model, as built.
        args: Megatron's arguments.

    Returns:
        The same parts.

    Raises:
        Refusal: the model's weights are not there, or a layer that was asked for is not.
    """
    _load_weights(chunks, args)
    settings = _Settings.of(args)
    adapted = set()
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad = False
        chunk.config.moe_router_bias_update_rate = 0.0  # Megatron moves the experts' bias without a gradient
        for names, layer in list(_layers(chunk, settings)):
            if isinstance(names, str):
                layer.lora = Adapter(layer, names, settings, chunk.config)
                layer.register_forward_hook(_add)
            else:
                layer.lora = torch.nn.ModuleList(
                    Adapter(layer, name, settings, chunk.config, f"weight{number}")
                    for number, name in enumerate(names)
                )
                layer.register_forward_hook(_add_to_each)
        adapted |= {adapter.kind for _, adapter in _adapters(chunk)}
        if getattr(chunk, "embedding", None) is not None:
            # Recomputation keeps no graph from an input that needs no gradient.
            chunk.embedding.register_forward_hook(lambda _module, _given, out: out.requires_grad_())
        chunk.sharded_state_dict = partial(_sharded, chunk)
        chunk.load_state_dict = partial(_load_state, chunk)
    if missing := settings.targets.keys() - adapted:
        raise Refusal(f"lora_target_modules: {', '.join(sorted(missing))}: this model has no such layer")
    return chunks


def _layers(chunk: Any, settings: _Settings) -> Iterator[tuple[str | list[str], Any]]:
    """Yield the layers that get adapters with their names in the whole model, or those of several experts."""
    for place, module in chunk.named_modules():
        found = _LAYER.fullmatch(place) or _EXPERT.fullmatch(place)
        if found is None or found[3] not in settings.targets:
            continue
        layer = chunk.decoder.layers[int(found[1])]
        prefix = f"decoder.layers.{layer.layer_number - 1}."
        if found.re is _LAYER:
            yield f"{prefix}{found[2]}.{found[3]}", module
            continue
        names = [f"{prefix}mlp.experts.experts.{each}.{found[3]}" for each in layer.mlp.local_expert_indices]
        yield names if found[2] is None else names[int(found[2])], module


def _add(layer: Any, given: tuple[Any, ...], result: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    out, bias = result
    return out + layer.lora(given[0]), bias


def _add_to_each(
    layer: Any, given: tuple[Any, ...], result: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, Any]:
    """Add to the output of a layer of several experts, whose tokens stand one expert's behind another's."""
    x, counts = given[:2]
    out, bias = result
    parts = x.split(counts if isinstance(counts, list) else counts.tolist())
    changes = [adapter(part) for adapter, part in zip(layer.lora, parts, strict=True)]
    return out + torch.cat(changes), bias


def _adapters(chunk: Any) -> Iterator[tuple[str, Adapter]]:
    return ((place, module) for place, module in chunk.named_modules() if isinstance(module, Adapter))


def _sharded(chunk: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
    """Stand in for the model's own: what a checkpoint holds is the adapters alone."""
    del sharded_offsets
    return {
        f"{prefix}{place}.{name}": value
        for place, adapter in _adapters(chunk)
        for name, value in adapter.sharded(metadata).items()
    }


def _load_state(chunk: Any, state: dict[str, Any], strict: bool = True) -> None:  # noqa: FBT001, FBT002, ARG001
    own = {
        f"{place}.{name}": value
        for place, each in _adapters(chunk)
        for name, value in each.named_parameters()
    }
    if own.keys() != state.keys():
        raise Refusal(
            f"load: its adapters are on other layers: {', '.join(sorted(own.keys() ^ state.keys())[:4])}"
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def _load_weights(chunks: Sequence[Any], args: Any) -> None:
    """Load the model by Megatron's own way of starting from another training's weights."""
    from flagscale_train.worker.resume import chosen, same_model

    root = Path(args.pretrained_checkpoint)
    choice = chosen(root)
    if choice.path is None:
        raise Refusal(f"pretrained_checkpoint: {root}: no whole checkpoint in it")
    asked = {
        name: getattr(args, name)
        for name in ("load", "finetune", "ckpt_step", "no_load_optim", "no_load_rng")
    }
    vars(args).update(load=str(root), finetune=True, ckpt_step=None, no_load_optim=True, no_load_rng=True)
    # From here on `load` is the adapters' own, and where it is empty they start from their first values.
    args.pretrained_checkpoint = None
    try:
        same_model(choice.path)
        checkpointing.load_checkpoint(list(chunks), None, None)
    finally:
        vars(args).update(asked)
