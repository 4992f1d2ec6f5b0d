"""Checkpoints made by other means than the package under test: safetensors and torch's own serialisation."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
EXPERT_NAMES = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}
Tensors = dict[str, torch.Tensor]


@dataclass
class Shape:
    """A small model; every size differs, so that a swapped axis cannot go unnoticed."""

    family: str = "qwen3"
    tied: bool = False
    layers: int = 3
    hidden: int = 48
    ffn: int = 80
    heads: int = 6
    groups: int = 2
    head: int = 20
    vocab: int = 131
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)
    experts: int = 5
    per_token: int = 2
    expert_ffn: int = 28
    renormalised: bool = True
    plain: tuple[int, ...] = ()
    """Layers without experts, in families that have experts."""

    def has_experts(self, layer: int) -> bool:
        return self.family in EXPERT_NAMES and layer not in self.plain

    @property
    def has_norm(self) -> bool:
        return self.family in ("qwen3", "qwen3_moe")

    @property
    def padded(self) -> int:
        return -(-self.vocab // 128) * 128

    def hf_config(self) -> dict[str, Any]:
        return {
            "architectures": [CLASSES[self.family]],
            "model_type": self.family,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-6,
            "rope_theta": 50000.0,
            "max_position_embeddings": 64,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            **self.hf_experts(),
            **self.config,
        }

    def hf_experts(self) -> dict[str, Any]:
        shared = {"num_experts_per_tok": self.per_token, "router_aux_loss_coef": 0.01}
        if self.family == "mixtral":
            return {**shared, "num_local_experts": self.experts, "intermediate_size": self.expert_ffn}
        if self.family == "qwen3_moe":
            return {
                **shared,
                "num_experts": self.experts,
                "moe_intermediate_size": self.expert_ffn,
                "norm_topk_prob": self.renormalised,
                "mlp_only_layers": list(self.plain),
                "decoder_sparse_step": 1,
            }
        return {}

    def args(self) -> dict[str, Any]:
        """What Megatron's trainer would save."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "group_query_attention": True,
            "num_query_groups": self.groups,
            "kv_channels": self.head,
            "vocab_size": self.vocab,
            "padded_vocab_size": self.padded,
            "layernorm_epsilon": 1e-6,
            "rotary_base": 50000,
            "max_position_embeddings": 64,
            "untie_embeddings_and_output_weights": not self.tied,
            "qk_layernorm": self.has_norm,
            "add_qkv_bias": self.family == "qwen2",
            "normalization": "RMSNorm",
            "swiglu": True,
            "add_bias_linear": False,
            "position_embedding_type": "rope",
            "init_method_std": 0.02,
            "params_dtype": self.dtype,
            "tokenizer_model": None,
            **self.args_experts(),
        }

    def trainer_args(self, *, per_layer: bool = False) -> dict[str, Any]:
        """The same as plain JSON, for a process of Megatron."""
        return {
            **{name: value for name, value in self.args().items() if name != "params_dtype"},
            "group_query_attention": self.groups != self.heads,
            "use_rope_scaling": "llama3" in str(self.config),
            "rope_scaling_factor": 8.0,
            "rotary_base": self.config.get("rope_theta", 50000),
            "rotary_seq_len_interpolation_factor": 4.0 if "linear" in str(self.config) else None,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            **({"moe_layer_freq": [1] * self.layers} if per_layer else {}),
        }

    def args_experts(self) -> dict[str, Any]:
        if self.family not in EXPERT_NAMES:
            return {"num_experts": None}
        freq = [int(self.has_experts(layer)) for layer in range(self.layers)]
        return {
            "num_experts": self.experts,
            "moe_ffn_hidden_size": self.expert_ffn,
            "moe_router_topk": self.per_token,
            "moe_router_pre_softmax": not self.renormalised,
            "moe_router_score_function": "softmax",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.01,
            "moe_layer_freq": freq if self.plain else 1,
        }

    def hf_tensors(self, seed: int = 0) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def new(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(self.dtype)

        query, kv = self.heads * self.head, self.groups * self.head
        tensors = {"model.embed_tokens.weight": new(self.vocab, self.hidden)}
        for i in range(self.layers):
            p = f"model.layers.{i}."
            tensors[p + "input_layernorm.weight"] = new(self.hidden)
            for name, rows in (("q", query), ("k", kv), ("v", kv)):
                tensors[f"{p}self_attn.{name}_proj.weight"] = new(rows, self.hidden)
                if self.family == "qwen2":
                    tensors[f"{p}self_attn.{name}_proj.bias"] = new(rows)
            if self.has_norm:
                tensors[p + "self_attn.q_norm.weight"] = new(self.head)
                tensors[p + "self_attn.k_norm.weight"] = new(self.head)
            tensors[p + "self_attn.o_proj.weight"] = new(self.hidden, query)
            tensors[p + "post_attention_layernorm.weight"] = new(self.hidden)
            if self.has_experts(i):
                self._add_experts(tensors, p, new)
                continue
            tensors[p + "mlp.gate_proj.weight"] = new(self.ffn, self.hidden)
            tensors[p + "mlp.up_proj.weight"] = new(self.ffn, self.hidden)
            tensors[p + "mlp.down_proj.weight"] = new(self.hidden, self.ffn)
        tensors["model.norm.weight"] = new(self.hidden)
        if not self.tied:
            tensors["lm_head.weight"] = new(self.vocab, self.hidden)
        return tensors

    def _add_experts(self, tensors: Tensors, p: str, new: Callable[..., torch.Tensor]) -> None:
        block, gate, up, down = EXPERT_NAMES[self.family]
        tensors[f"{p}{block}.gate.weight"] = new(self.experts, self.hidden)
        for e in range(self.experts):
            one = f"{p}{block}.experts.{e}."
            tensors[f"{one}{gate}.weight"] = new(self.expert_ffn, self.hidden)
            tensors[f"{one}{up}.weight"] = new(self.expert_ffn, self.hidden)
            tensors[f"{one}{down}.weight"] = new(self.hidden, self.expert_ffn)

    def _merged_experts(self, hf: Tensors, p: str, m: str) -> Tensors:
        block, gate, up, down = EXPERT_NAMES[self.family]

        def grouped(name: str) -> torch.Tensor:
            parts = [hf[f"{p}{block}.experts.{e}.{name}.weight"] for e in range(self.experts)]
            return torch.stack(parts)

        return {
            m + "pre_mlp_layernorm.weight": hf[p + "post_attention_layernorm.weight"],
            m + "mlp.router.weight": hf[f"{p}{block}.gate.weight"],
            m + "mlp.experts.experts.linear_fc1.weight": torch.cat([grouped(gate), grouped(up)], dim=1),
            m + "mlp.experts.experts.linear_fc2.weight": grouped(down),
        }

    def fused_tensors(self, hf: Tensors) -> Tensors:
        """The same tensors as transformers 5 keeps them in memory."""
        block = EXPERT_NAMES[self.family][0]
        out = {name: tensor for name, tensor in hf.items() if f".{block}." not in name}
        for i in range(self.layers):
            p = f"model.layers.{i}."
            merged = self._merged_experts(hf, p, "")
            out[p + "mlp.gate.weight"] = merged["mlp.router.weight"]
            out[p + "mlp.experts.gate_up_proj"] = merged["mlp.experts.experts.linear_fc1.weight"]
            out[p + "mlp.experts.down_proj"] = merged["mlp.experts.experts.linear_fc2.weight"]
        return out

    def megatron_tensors(self, hf: Tensors, *, pad: float = 0.0) -> Tensors:
        """Merge by tensor operations, as the published converters do, not by spans of rows."""

        def padded(tensor: torch.Tensor) -> torch.Tensor:
            filler = torch.full((self.padded - self.vocab, self.hidden), pad, dtype=tensor.dtype)
            return torch.cat([tensor, filler])

        def fused(prefix: str, kind: str) -> torch.Tensor:
            q, k, v = (hf[f"{prefix}self_attn.{name}_proj.{kind}"] for name in "qkv")
            parts = [part.reshape(self.groups, -1, *part.shape[1:]) for part in (q, k, v)]
            return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])

        out = {"embedding.word_embeddings.weight": padded(hf["model.embed_tokens.weight"])}
        for i in range(self.layers):
            p, m = f"model.layers.{i}.", f"decoder.layers.{i}."
            out[m + "self_attention.linear_qkv.layer_norm_weight"] = hf[p + "input_layernorm.weight"]
            out[m + "self_attention.linear_qkv.weight"] = fused(p, "weight")
            if self.family == "qwen2":
                out[m + "self_attention.linear_qkv.bias"] = fused(p, "bias")
            if self.has_norm:
                out[m + "self_attention.q_layernorm.weight"] = hf[p + "self_attn.q_norm.weight"]
                out[m + "self_attention.k_layernorm.weight"] = hf[p + "self_attn.k_norm.weight"]
            out[m + "self_attention.linear_proj.weight"] = hf[p + "self_attn.o_proj.weight"]
            if self.has_experts(i):
                out |= self._merged_experts(hf, p, m)
                continue
            out[m + "mlp.linear_fc1.layer_norm_weight"] = hf[p + "post_attention_layernorm.weight"]
            out[m + "mlp.linear_fc1.weight"] = torch.cat(
                [hf[p + "mlp.gate_proj.weight"], hf[p + "mlp.up_proj.weight"]]
            )
            out[m + "mlp.linear_fc2.weight"] = hf[p + "mlp.down_proj.weight"]
        out["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not self.tied:
            out["output_layer.weight"] = padded(hf["lm_head.weight"])
        return out


def stack(tensors: Tensors) -> Tensors:
    """Give layers one tensor with a leading axis, as Megatron saves uniform models."""
    layered: dict[str, list[torch.Tensor]] = {}
    flat: Tensors = {}
    for name, tensor in tensors.items():
        head, _, rest = name.removeprefix("decoder.layers.").partition(".")
        if name.startswith("decoder.layers."):
            assert head.isdecimal()
            layered.setdefault(f"decoder.layers.{rest}", []).append(tensor)
        else:
            flat[name] = tensor
    return flat | {name: torch.stack(parts) for name, parts in layered.items()}


def write_distcp(
    folder: Path,
    tensors: Tensors,
    objects: Mapping[str, Any],
    *,
    grid: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda _name, size: (1,) * len(size),
) -> None:
    """Save with torch.save and torch's metadata classes; `grid` tells the number of parts of each axis."""
    folder.mkdir(parents=True)
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    described: dict[str, Any] = {}
    with (folder / "__0_0.distcp").open("wb") as stream:

        def put(index: dcp.MetadataIndex, value: Any) -> None:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            storage[index] = _StorageInfo("__0_0.distcp", stream.tell(), len(buffer.getvalue()))
            stream.write(buffer.getvalue())

        for name, tensor in tensors.items():
            chunks = []
            for offsets, part in cut(tensor, grid(name, tuple(tensor.shape))):
                chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), part.shape))
                put(dcp.MetadataIndex(name, torch.Size(offsets)), part.clone())
            properties = dcp.TensorProperties(dtype=tensor.dtype)
            described[name] = dcp.TensorStorageMetadata(properties, tensor.shape, chunks)
        for name, value in objects.items():
            put(dcp.MetadataIndex(name), value)
            described[name] = dcp.BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(described, None, storage)))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def cut(tensor: torch.Tensor, parts: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    pieces = [((), tensor)]
    for axis, count in enumerate(parts):
        grown = []
        for offsets, piece in pieces:
            position = 0
            for part in torch.tensor_split(piece, count, dim=axis):
                grown.append(((*offsets, position), part))
                position += part.shape[axis]
        pieces = grown
    return pieces


def read_hf(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same(one: Tensors, other: Tensors) -> None:
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


class Maker:
    """Writes checkpoints below a temporary directory, reads and compares them."""

    Shape = Shape

    def __init__(self, root: Path) -> None:
        self.root = root

    load = staticmethod(read_hf)
    same = staticmethod(assert_same)

    def hf(
        self,
        shape: Shape,
        name: str = "hf",
        *,
        shards: int = 1,
        seed: int = 0,
        tensors: Tensors | None = None,
        **extra: torch.Tensor,
    ) -> Path:
        folder = self.root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(shape.hf_config()))
        tensors = {
            **(shape.hf_tensors(seed) if tensors is None else tensors),
            **{key.replace("__", "."): value for key, value in extra.items()},
        }
        names = list(tensors)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number::shards]
            save_file({key: tensors[key] for key in part}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    def megatron(
        self,
        shape: Shape,
        name: str = "megatron",
        *,
        iteration: int = 5,
        stacked: bool = True,
        prefix: str = "",
        rename: Callable[[str], str] = lambda key: key,
        args: Mapping[str, Any] | None = None,
        tensors: Tensors | None = None,
        common: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Path:
        """A training directory with one iteration; gives the root."""
        root = self.root / name
        if tensors is None:
            tensors = shape.megatron_tensors(shape.hf_tensors(), pad=7.0)
        tensors = {
            prefix + rename(key): value for key, value in (stack(tensors) if stacked else tensors).items()
        }
        tensors["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(shape.hidden)
        state = common or {
            "args": Namespace(**{**shape.args(), **(args or {})}),
            "iteration": iteration,
            "checkpoint_version": 3.0,
        }
        write_distcp(root / f"iter_{iteration:07d}", tensors, {"common_state/shard_0_1": [state]}, **options)
        (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        return root


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture(scope="session")
def shape() -> type[Shape]:
    return Shape


@pytest.fixture
def reference_writer() -> Callable[..., None]:
    return write_distcp


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python text in a process of its own, with this one's import path."""

    def run(code: str, *argv: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, argv)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )

    return run
