"""Families with towers: tensors against merges made by tensor operations, every layout there and back.

The models are written down here by names and shapes; the tests marked `transformers` compare those with
transformers' own classes and what the classes compute.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from flagscale_convert import ParallelLayout, Unsupported, config, convert, inspect, make_plan, verify
from flagscale_convert.families import FAMILIES as FAMILIES_KNOWN
from flagscale_convert.published import published_like
from flagscale_convert.rules import bind

OMNI = "qwen3_omni_thinker"
FAMILIES = ["qwen2_5_vl", "llava", "llava_onevision", "qwen3_vl", "qwen3_vl_moe", OMNI]
TEXT = {
    "qwen2_5_vl": "qwen2",
    "llava": "llama",
    "llava_onevision": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    OMNI: "qwen3_moe",
}
CLASSES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    OMNI: "Qwen3OmniMoeThinkerForConditionalGeneration",
}
IDS = {"image_token_id": 128, "video_token_id": 129, "vision_start_token_id": 126, "vision_end_token_id": 127}
LAYER = "vision_model.decoder.layers.{i}."


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, size, has_bias=True):
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if has_bias else {})}


@dataclass
class Model:
    """A small model with a tower; sizes differ where they can."""

    shape: type
    family: str
    tied: bool = False
    depth: int = 3
    width: int = 32
    ffn: int = 20
    heads: int = 4
    patch: int = 4
    side: int = 3
    """Patches along an image's edge, for towers with a position for each."""
    merge: int = 2
    deepstack: tuple[int, ...] = (0, 1)
    text_sizes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        sizes = {"layers": 2, "head": 8, **self.text_sizes}
        self.text = self.shape(family=TEXT[self.family], tied=self.tied, **sizes)
        if self.family == "qwen2_5_vl" and "hidden" not in self.text_sizes:
            self.text.head = self.text.hidden // self.text.heads

    @property
    def is_qwen(self):
        return self.family.startswith("qwen")

    @property
    def is_omni(self):
        return self.family == OMNI

    @property
    def is_third(self):
        """With learned positions, norms with bias and features from between the layers."""
        return self.family in ("qwen3_vl", "qwen3_vl_moe", OMNI)

    @property
    def prefix(self):
        """What stands before Megatron's names."""
        return "thinker." if self.is_omni else ""

    @property
    def layer(self):
        return self.prefix + LAYER

    @property
    def has_class_token(self):
        return self.family == "llava"

    @property
    def mrope(self):
        half = self.text.head // 2
        return [half - 2 * (half // 3), half // 3, half // 3]

    def config(self):
        text = self.text.hf_config()
        for name in ("architectures", "model_type", "rope_theta", "tie_word_embeddings"):
            text.pop(name)
        text["rope_theta"] = 50000.0
        if self.family == "qwen2_5_vl":
            text |= {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": self.mrope}}
        if self.is_third:
            scaling = {"mrope_interleaved": True, "rope_type": "default", "mrope_section": self.mrope}
            text |= {"rope_scaling": scaling}
        types = {"llava": "llama", "llava_onevision": "qwen2", OMNI: "qwen3_omni_moe_text"}
        return {
            "architectures": [CLASSES[self.family]],
            "model_type": "qwen3_omni_moe_thinker" if self.is_omni else self.family,
            "tie_word_embeddings": self.tied,
            "text_config": {**text, "model_type": types.get(self.family, f"{self.family}_text")},
            "vision_config": self.vision_config(),
            **({"audio_config": self.audio_config()} if self.is_omni else {}),
            **self.outer(),
        }

    def audio_config(self):
        return {
            "model_type": "qwen3_omni_moe_audio_encoder",
            "d_model": 40,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 36,
            "num_mel_bins": 16,
            "output_dim": self.text.hidden,
            "downsample_hidden_size": 10,
            "max_source_positions": 40,
        }

    def outer(self):
        if self.is_qwen:
            return IDS
        if self.family == "llava":
            # Features are taken behind the last layer, as Megatron's tower gives them.
            return {"image_token_index": 128, "image_seq_length": self.side**2, "vision_feature_layer": -1}
        size = self.patch * self.side + 1
        return {
            "image_token_index": 128,
            "video_token_index": 129,
            "image_grid_pinpoints": [[size, size], [size, 2 * size]],
        }

    def vision_config(self):
        if self.is_qwen:
            own = {"window_size": 16, "fullatt_block_indexes": [1]}
            if self.is_third:
                own = {
                    "num_position_embeddings": self.side**2,
                    "deepstack_visual_indexes": list(self.deepstack),
                }
            return {
                "model_type": "qwen3_omni_moe_vision_encoder" if self.is_omni else f"{self.family}_vision",
                "depth": self.depth,
                "hidden_size": self.width,
                "intermediate_size": self.ffn,
                "num_heads": self.heads,
                "patch_size": self.patch,
                "spatial_merge_size": self.merge,
                "out_hidden_size": self.text.hidden,
                **own,
            }
        kind = "clip" if self.has_class_token else "siglip"
        return {
            "model_type": f"{kind}_vision_model",
            "num_hidden_layers": self.depth,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "patch_size": self.patch,
            # An image of the second kind has a pixel more than its patches cover.
            "image_size": self.patch * self.side + (not self.has_class_token and self.patch > 1),
            **({"projection_dim": 24} if self.has_class_token else {"vision_use_head": False}),
        }

    def args(self):
        """What Megatron's trainer would save beyond the language model's: next to nothing."""
        mrope = {"position_embedding_type": "mrope", "mrope_section": self.mrope}
        return mrope if self.is_qwen else {}

    def hf(self, seed=0):
        """Tensors under the names the hub's files have."""
        text = self.text.hf_tensors(seed)
        if self.family.startswith("qwen3_vl"):
            text = {name.replace("model.", "model.language_model.", 1): t for name, t in text.items()}
        if not self.is_qwen:
            text = {f"language_model.{name}": tensor for name, tensor in text.items()}
        if self.family == "qwen3_vl_moe":
            text = self.fused(text)
        generator = torch.Generator().manual_seed(seed + 1)
        return text | {
            name: torch.randn(*size, generator=generator).to(self.text.dtype)
            for name, size in self.tower_shapes().items()
        }

    def fused(self, text):
        """Experts as the hub's files have them: (experts, inputs, outputs)."""
        out = {name: tensor for name, tensor in text.items() if ".experts." not in name}
        for i in range(self.text.layers):
            p = f"model.language_model.layers.{i}.mlp.experts."
            gate, up, down = (
                torch.stack([text[f"{p}{e}.{part}_proj.weight"].T for e in range(self.text.experts)])
                for part in ("gate", "up", "down")
            )
            out |= {
                p + "gate_up_proj": torch.cat([gate, up], dim=-1).contiguous(),
                p + "down_proj": down.contiguous(),
            }
        return out

    def unfused(self, hf):
        out = {name: tensor for name, tensor in hf.items() if ".mlp.experts." not in name}
        for name in set(hf) - set(out):
            kind = name.rpartition(".")[2]
            for e, matrix in enumerate(hf[name]):
                one = name.removesuffix(kind) + f"{e}."
                parts = matrix.T.chunk(2) if kind == "gate_up_proj" else [matrix.T]
                names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                out |= {f"{one}{n}.weight": part for n, part in zip(names, parts, strict=True)}
        return out

    def tower_shapes(self):
        if not self.is_qwen:
            return self.clip_shapes()
        return self.qwen_shapes() | (self.audio_shapes() if self.is_omni else {})

    def audio_shapes(self):
        a, sizes = "audio_tower.", self.audio_config()
        w, f, c = sizes["d_model"], sizes["encoder_ffn_dim"], sizes["downsample_hidden_size"]
        out = {f"{a}conv_out.weight": (w, 2 * c)}
        for number, before in ((1, 1), (2, c), (3, c)):
            out |= {f"{a}conv2d{number}.weight": (c, before, 3, 3), f"{a}conv2d{number}.bias": (c,)}
        for i in range(sizes["encoder_layers"]):
            b = f"{a}layers.{i}."
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                out |= linear(f"{b}self_attn.{part}", w, w)
            out |= norm(b + "self_attn_layer_norm", w) | norm(b + "final_layer_norm", w)
            out |= linear(b + "fc1", f, w) | linear(b + "fc2", w, f)
        out |= norm(a + "ln_post", w) | linear(a + "proj1", w, w)
        return out | linear(a + "proj2", self.text.hidden, w)

    def qwen_shapes(self):
        is_third, w, f, h = self.is_third, self.width, self.ffn, self.text.hidden
        v, merged = self.visual, self.width * self.merge**2
        out = {v + "patch_embed.proj.weight": (w, 3, 2, self.patch, self.patch)}
        if is_third:
            out |= {v + "patch_embed.proj.bias": (w,), v + "pos_embed.weight": (self.side**2, w)}
        for i in range(self.depth):
            b = f"{v}blocks.{i}."
            out |= norm(b + "norm1", w, is_third) | norm(b + "norm2", w, is_third)
            out |= linear(b + "attn.qkv", 3 * w, w) | linear(b + "attn.proj", w, w)
            if is_third:
                out |= linear(b + "mlp.linear_fc1", f, w) | linear(b + "mlp.linear_fc2", w, f)
            else:
                out |= linear(b + "mlp.gate_proj", f, w) | linear(b + "mlp.up_proj", f, w)
                out |= linear(b + "mlp.down_proj", w, f)
        mergers = [("merger.", w)]
        if is_third:
            many = "merger_list" if self.is_omni else "deepstack_merger_list"
            mergers += [(f"{many}.{k}.", merged) for k in range(len(self.deepstack))]
        before, first, second = self.merger_names
        for m, size in mergers:
            out |= norm(v + m + before, size, is_third)
            out |= linear(v + m + first, merged, merged) | linear(v + m + second, h, merged)
        return out

    @property
    def visual(self):
        return "model.visual." if self.family.startswith("qwen3_vl") else "visual."

    @property
    def merger_names(self):
        return (
            ("norm", "linear_fc1", "linear_fc2")
            if self.family.startswith("qwen3_vl")
            else ("ln_q", "mlp.0", "mlp.2")
        )

    def clip_shapes(self):
        v, w, f, h = "vision_tower.vision_model.", self.width, self.ffn, self.text.hidden
        out = {
            v + "embeddings.patch_embedding.weight": (w, 3, self.patch, self.patch),
            v + "embeddings.position_embedding.weight": (self.side**2 + self.has_class_token, w),
        }
        if self.has_class_token:
            out |= {v + "embeddings.class_embedding": (w,), **norm(v + "pre_layrnorm", w)}
        else:
            out |= {v + "embeddings.patch_embedding.bias": (w,), "image_newline": (h,)}
            out |= norm(v + "post_layernorm", w)
        for i in range(self.depth):
            b = f"{v}encoder.layers.{i}."
            out |= norm(b + "layer_norm1", w) | norm(b + "layer_norm2", w)
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                out |= linear(f"{b}self_attn.{part}", w, w)
            out |= linear(b + "mlp.fc1", f, w) | linear(b + "mlp.fc2", w, f)
        out |= linear("multi_modal_projector.linear_1", h, w)
        return out | linear("multi_modal_projector.linear_2", h, h)

    def megatron(self, hf):
        """The same under Megatron's names, merged by tensor operations."""
        if self.family == "qwen3_vl_moe":
            hf = self.unfused(hf)
        text = {
            name.replace("model.language_model.", "model.", 1).removeprefix("language_model."): tensor
            for name, tensor in hf.items()
        }
        out = {
            f"{self.prefix}language_model.{name}": tensor
            for name, tensor in self.text.megatron_tensors(text).items()
        }
        audio = {
            name.replace("audio_tower", "thinker.audio_model"): t for name, t in hf.items() if "audio" in name
        }
        return out | audio | (self.qwen_tower(hf) if self.is_qwen else self.clip_tower(hf))

    def by_head(self, qkv):
        """From (3, heads, size) to (heads, 3, size)."""
        return qkv.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)

    def qwen_tower(self, hf):
        is_third, v, p = self.is_third, self.visual, self.prefix
        heads = (v + "patch_embed", v + "pos_embed")
        out = {n.replace(v, p + "vision_model."): t for n, t in hf.items() if n.startswith(heads)}
        for i in range(self.depth):
            b, m = f"{v}blocks.{i}.", self.layer.format(i=i)
            names = {
                "self_attention.linear_qkv.layer_norm_{}": "norm1.{}",
                "self_attention.linear_proj.{}": "attn.proj.{}",
                "mlp.linear_fc1.layer_norm_{}": "norm2.{}",
                "mlp.linear_fc1.{}": "mlp.linear_fc1.{}",
                "mlp.linear_fc2.{}": "mlp.linear_fc2.{}" if is_third else "mlp.down_proj.{}",
            }
            for kind in ("weight", "bias"):
                out[f"{m}self_attention.linear_qkv.{kind}"] = self.by_head(hf[f"{b}attn.qkv.{kind}"])
                found = {ours.format(kind): b + theirs.format(kind) for ours, theirs in names.items()}
                out |= {m + ours: hf[theirs] for ours, theirs in found.items() if theirs in hf}
                if not is_third:
                    gated = [hf[f"{b}mlp.{part}_proj.{kind}"] for part in ("gate", "up")]
                    out[f"{m}mlp.linear_fc1.{kind}"] = torch.cat(gated)
        return out | self.mergers(hf)

    def mergers(self, hf):
        v, p = self.visual, self.prefix + "vision_model."
        places = {"merger.": (f"{p}decoder.final_layernorm", f"{p}projection.encoder")}
        if self.is_omni:
            places = {"merger.": (f"{p}merger.patch_norm", f"{p}merger")}
        for k in range(len(self.deepstack)):
            if self.is_omni:
                m = f"{p}decoder.deepstack_merger_list.{k}"
                places[f"merger_list.{k}."] = (f"{m}.patch_norm", m)
                continue
            places[f"deepstack_merger_list.{k}."] = (
                f"{p}decoder.deepstack_norm_list.{k}",
                f"{p}decoder.deepstack_merger_list.{k}.encoder",
            )
        return {
            f"{ours}.{kind}": hf[f"{v}{theirs}{name}.{kind}"]
            for theirs, (before, encoder) in places.items()
            for ours, name in zip(
                (before, f"{encoder}.linear_fc1", f"{encoder}.linear_fc2"), self.merger_names, strict=True
            )
            for kind in ("weight", "bias")
            if f"{v}{theirs}{name}.{kind}" in hf
        }

    def clip_tower(self, hf):
        v = "vision_tower.vision_model."
        names = {
            "vision_model.conv1.weight": v + "embeddings.patch_embedding.weight",
            "vision_model.conv1.bias": v + "embeddings.patch_embedding.bias",
            "vision_model.position_embeddings.weight": v + "embeddings.position_embedding.weight",
            "image_newline": "image_newline",
        }
        for kind in ("weight", "bias"):
            names |= {
                f"vision_model.ln_pre.{kind}": f"{v}pre_layrnorm.{kind}",
                f"vision_model.ln_post.{kind}": f"{v}post_layernorm.{kind}",
                f"vision_projection.encoder.linear_fc1.{kind}": f"multi_modal_projector.linear_1.{kind}",
                f"vision_projection.encoder.linear_fc2.{kind}": f"multi_modal_projector.linear_2.{kind}",
            }
        out = {ours: hf[theirs] for ours, theirs in names.items() if theirs in hf}
        if self.has_class_token:
            out["vision_model.class_token"] = hf[v + "embeddings.class_embedding"][None, None]
        for i in range(self.depth):
            b, m = f"{v}encoder.layers.{i}.", LAYER.format(i=i)
            for kind in ("weight", "bias"):
                qkv = torch.cat([hf[f"{b}self_attn.{part}_proj.{kind}"] for part in "qkv"])
                out |= {
                    f"{m}self_attention.linear_qkv.layer_norm_{kind}": hf[f"{b}layer_norm1.{kind}"],
                    f"{m}self_attention.linear_qkv.{kind}": self.by_head(qkv),
                    f"{m}self_attention.linear_proj.{kind}": hf[f"{b}self_attn.out_proj.{kind}"],
                    f"{m}mlp.linear_fc1.layer_norm_{kind}": hf[f"{b}layer_norm2.{kind}"],
                    f"{m}mlp.linear_fc1.{kind}": hf[f"{b}mlp.fc1.{kind}"],
                    f"{m}mlp.linear_fc2.{kind}": hf[f"{b}mlp.fc2.{kind}"],
                }
        return out

    def write(self, folder, tensors=None, rename=lambda name: name):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        tensors = self.hf() if tensors is None else tensors
        held = {rename(name): tensor.contiguous() for name, tensor in tensors.items()}
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        return folder


@pytest.fixture
def small(shape):
    return lambda family, **sizes: Model(shape, family, **sizes)


def save_megatron(make, model, tensors, name="megatron", args=None):
    """A training directory as Megatron itself would leave it, layers one by one."""
    saved = {**model.args(), **(args or {})}
    return make.megatron(model.text, name, stacked=False, tensors=dict(tensors), args=saved)


def same_but(one, other, ignored=()):
    assert sorted(set(one) - set(ignored)) == sorted(other)
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype, name
        assert torch.equal(one[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_equal(make, small, tmp_path, family, tied):
    model = small(family, tied=tied)
    source = model.write(tmp_path / "hf")
    convert(make_plan(source, tmp_path / "dist", to="torch_dist"))
    sizes = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    convert(make_plan(tmp_path / "dist", tmp_path / "ranks", to="torch", parallel=sizes))
    plan = make_plan(tmp_path / "ranks", tmp_path / "back", to="hf")
    convert(plan)
    same_but(model.hf(), make.load(tmp_path / "back"))
    assert plan.num_parameters == sum(tensor.numel() for tensor in model.hf().values())
    for side in ("dist", "ranks", "back"):
        assert verify(source, tmp_path / side).is_equal
        found = inspect(tmp_path / side, values=True)
        assert (found.family, found.suspicions) == (family, ())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("family", FAMILIES)
def test_written_tensors_are_megatrons(small, tmp_path, family):
    model = small(family)
    convert(make_plan(model.write(tmp_path / "hf"), tmp_path / "dist", to="torch_dist", layers="per-layer"))
    expected = model.megatron(model.hf())
    state = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(state, checkpoint_id=tmp_path / "dist" / "release", no_dist=True)
    same_but(expected, state)
    convert(make_plan(tmp_path / "hf", tmp_path / "stacked", to="torch_dist"))
    name = "mlp.linear_fc2.weight"
    stack = {
        f"{model.prefix}vision_model.decoder.layers.{name}": torch.empty(model.depth, model.width, model.ffn)
    }
    dcp.load(stack, checkpoint_id=tmp_path / "stacked" / "release", no_dist=True)
    for i, layer in enumerate(stack.popitem()[1]):
        assert torch.equal(layer, expected[model.layer.format(i=i) + name])


def is_tower(name):
    return name.removeprefix("thinker.").startswith(("vision_", "audio_"))


def cut(name, tensor, rank, *, is_gated):
    """What tensor parallelism of 2 leaves a rank."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(2, dim=1)[rank]
    if "linear_fc1." in name and "norm" not in name and is_gated:
        return torch.cat([half.chunk(2)[rank] for half in tensor.chunk(2)])
    is_cut = ("linear_fc1.", "linear_qkv.", "word_embeddings", "output_layer")
    return tensor.chunk(2)[rank] if any(part in name for part in is_cut) and "norm" not in name else tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_towers_are_on_the_first_stage(small, tmp_path, family):
    model = small(family)
    sizes = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    convert(make_plan(model.write(tmp_path / "hf"), tmp_path / "ranks", to="torch", parallel=sizes))
    whole = {name: tensor for name, tensor in model.megatron(model.hf()).items() if is_tower(name)}
    for stage in range(2):
        for rank in range(2):
            file = tmp_path / "ranks" / "release" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            state = torch.load(file, weights_only=False)["model"]
            found = {name: t for name, t in state.items() if is_tower(name) and t is not None}
            assert ("image_newline" in state) is (family == "llava_onevision")
            if stage:
                assert not found
                continue
            gated = family == "qwen2_5_vl"
            assert sorted(found) == sorted(whole)
            for name, tensor in whole.items():
                is_gated = gated and ".layers." in name
                assert torch.equal(found[name], cut(name, tensor, rank, is_gated=is_gated)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_tells_nothing_of_its_tower_is_measured(make, small, tmp_path, family):
    """Trainers save no sizes of towers; heads and the like are then the published ones."""
    sizes = {"heads": 16, "depth": 6, "deepstack": (2, 5)} if family.startswith("qwen3") else {"heads": 16}
    model = small(family, **sizes)
    hf = model.hf()
    root = save_megatron(make, model, model.megatron(hf))
    plan = make_plan(root, tmp_path / "out", to="hf", vocab_size=model.text.vocab)
    assert any("vision tower: not among the arguments" in note for note in plan.notes)
    convert(plan)
    same_but(hf, make.load(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = model.vision_config()
    measured = set(wanted) - {
        "window_size",
        "fullatt_block_indexes",
        "projection_dim",
        "deepstack_visual_indexes",
    }
    if not model.is_qwen:
        wanted["image_size"] = model.patch * model.side
    assert {name: written["vision_config"][name] for name in measured} == {
        name: wanted[name] for name in measured
    }


def test_arguments_of_flagscales_converter_tell_nothing_of_three_axes(make, small, tmp_path):
    """It saves `rope`, as its command line says, and no sections; only published ones can be meant."""
    model = small("qwen2_5_vl", heads=16, text_sizes={"head": 128, "heads": 2, "groups": 1, "hidden": 48})
    hf = model.hf()
    silent = {"position_embedding_type": "rope", "mrope_section": None}
    root = save_megatron(make, model, model.megatron(hf), args=silent)
    plan = make_plan(root, tmp_path / "out", to="hf")
    assert any("mrope_section: not among the saved arguments, (16, 24, 24) assumed" in n for n in plan.notes)
    convert(plan)
    same_but(hf, make.load(tmp_path / "out"))
    small_heads = small("qwen2_5_vl", heads=16)
    other = save_megatron(make, small_heads, small_heads.megatron(small_heads.hf()), "other", silent)
    with pytest.raises(Unsupported, match=r"mrope_section \(16, 24, 24\): must make up half a head"):
        make_plan(other, tmp_path / "none", to="hf")


def test_parts_that_carry_nothing_are_left_out(make, small, tmp_path):
    model = small("llava")
    extra = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
        "vision_tower.vision_model.post_layernorm.weight": torch.ones(model.width),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    source = model.write(tmp_path / "hf", {**model.hf(), **extra})
    plan = make_plan(source, tmp_path / "out", to="hf")
    assert sum("left out" in note for note in plan.notes) == 2
    convert(plan)
    same_but(model.hf(), make.load(tmp_path / "out"))


OTHER_NAMES = {
    "qwen2_5_vl": lambda n: (
        n.replace("visual.", "model.visual.", 1)
        if n.startswith("visual.")
        else n.replace("model.", "model.language_model.", 1)
    ),
    "llava": lambda n: (
        n.replace("language_model.lm_head", "lm_head")
        .replace("language_model.model.", "model.language_model.")
        .replace("vision_tower.vision_model.", "model.vision_tower.")
        .replace("multi_modal_projector.", "model.multi_modal_projector.")
        .replace("image_newline", "model.image_newline")
    ),
}
OTHER_NAMES["llava_onevision"] = OTHER_NAMES["llava"]


@pytest.mark.parametrize("family", sorted(OTHER_NAMES))
def test_names_of_other_versions_are_read(make, small, tmp_path, family):
    model = small(family)
    source = model.write(tmp_path / "hf", rename=OTHER_NAMES[family])
    assert set(make.load(source)).isdisjoint(name for name in model.hf() if "vis" in name)
    convert(make_plan(source, tmp_path / "out", to="hf"))
    same_but(model.hf(), make.load(tmp_path / "out"))


def test_names_of_megatron_bridge_are_read(make, small, tmp_path):
    model = small("qwen3_vl")
    hf = model.hf()
    names = {
        "vision_model.decoder.final_layernorm": "vision_model.merger.patch_norm",
        "vision_model.projection.encoder": "vision_model.merger",
    }
    for k in range(2):
        merger = f"vision_model.decoder.deepstack_merger_list.{k}"
        names |= {f"vision_model.decoder.deepstack_norm_list.{k}": f"{merger}.patch_norm"}
        names |= {f"{merger}.encoder": merger}

    def renamed(name):
        return next((name.replace(a, b) for a, b in names.items() if name.startswith(a + ".")), name)

    tensors = {renamed(name): tensor for name, tensor in model.megatron(hf).items()}
    carried = {"vision": {**model.vision_config(), "in_channels": 3, "temporal_patch_size": 2}}
    root = save_megatron(make, model, tensors, args={"flagscale_convert_towers": carried})
    convert(make_plan(root, tmp_path / "out", to="hf"))
    same_but(hf, make.load(tmp_path / "out"))


def test_the_thinker_of_a_whole_omni_model_is_taken_and_the_rest_is_told(make, small, tmp_path):
    model = small(OMNI)
    whole = {f"thinker.{name}": tensor for name, tensor in model.hf().items()}
    others = {"talker.model.norm.weight": torch.ones(6), "code2wav.pre_conv.bias": torch.ones(4)}
    source = model.write(tmp_path / "hf", {**whole, **others})
    outside = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "thinker_config": model.config(),
        "talker_config": {},
    }
    (source / "config.json").write_text(json.dumps(outside))
    plan = make_plan(source, tmp_path / "dist", to="torch_dist")
    assert any("code2wav, talker: 2 tensors (40 B) left out" in note for note in plan.notes)
    assert any("talker_config: not a part of thinker_config" in note for note in plan.notes)
    convert(plan)
    convert(make_plan(tmp_path / "dist", tmp_path / "back", to="hf"))
    same_but(model.hf(), make.load(tmp_path / "back"))


def test_experts_fused_as_transformers_writes_them_are_read_too(make, small, tmp_path):
    model = small("qwen3_vl_moe")
    hf = model.hf()
    turned = {name: t.transpose(1, 2) if ".experts." in name else t for name, t in hf.items()}
    convert(make_plan(model.write(tmp_path / "hf", turned), tmp_path / "dist", to="torch_dist"))
    convert(make_plan(tmp_path / "dist", tmp_path / "back", to="hf"))
    same_but(hf, make.load(tmp_path / "back"))
    assert verify(tmp_path / "hf", tmp_path / "back").is_equal
    wrong = {name: t[:, :-1] if name.endswith("gate_up_proj") else t for name, t in hf.items()}
    source = model.write(tmp_path / "wrong", wrong)
    with pytest.raises(Unsupported, match=r"experts\.0\.gate_proj\.weight` is missing"):
        convert(make_plan(source, tmp_path / "out", to="torch_dist"))


def test_a_configuration_with_text_at_the_top_is_read(small, tmp_path):
    """As the files of the hub have it."""
    model = small("qwen2_5_vl")
    source = model.write(tmp_path / "hf")
    nested = json.loads((source / "config.json").read_text())
    text = nested.pop("text_config")
    text.pop("model_type")
    (source / "config.json").write_text(json.dumps({**text, **nested}))
    model.write(tmp_path / "other")
    assert verify(source, tmp_path / "other").is_equal


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_survives_the_way(small, tmp_path, family):
    model = small(family)
    source = model.write(tmp_path / "hf")
    convert(make_plan(source, tmp_path / "dist", to="torch_dist"))
    before, after = config(source), config(tmp_path / "dist")
    assert after.architecture == before.architecture
    written = json.loads(after.text)
    wanted = model.config()
    for section in {"vision_config", "audio_config", "text_config"} & set(wanted):
        got, want = written.pop(section), wanted.pop(section)
        want.pop("rope_scaling", None)
        assert {name: got[name] for name in want} == want
    assert {name: written[name] for name in wanted} == wanted
    options = config(source, to="yaml").text
    assert ("mrope_section" in options) is model.is_qwen


FAULTS = {
    "queries and keys of a head swapped": lambda t: t.__setitem__(
        LAYER.format(i=1) + "self_attention.linear_qkv.weight",
        t[LAYER.format(i=1) + "self_attention.linear_qkv.weight"]
        .unflatten(0, (4, 3, 8))[:, [1, 0, 2]]
        .flatten(0, 2),
    ),
    "heads left in the other side's order": lambda t: t.__setitem__(
        LAYER.format(i=0) + "self_attention.linear_qkv.bias",
        t[LAYER.format(i=0) + "self_attention.linear_qkv.bias"]
        .unflatten(0, (4, 3, 8))
        .transpose(0, 1)
        .flatten(0, 2),
    ),
    "layers of the tower swapped": lambda t: t.update(
        {
            LAYER.format(i=a) + "mlp.linear_fc2.weight": t[
                LAYER.format(i=b) + "mlp.linear_fc2.weight"
            ].clone()
            for a, b in ((0, 2), (2, 0))
        }
    ),
    "norms of a layer swapped": lambda t: t.update(
        {
            LAYER.format(i=1) + one: t[LAYER.format(i=1) + other].clone()
            for one, other in (
                ("mlp.linear_fc1.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight"),
                ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
            )
        }
    ),
    "one bit of a bias": lambda t: (
        t[LAYER.format(i=2) + "mlp.linear_fc2.bias"].view(torch.int32)[-1:].bitwise_xor_(1)
    ),
    "a patch turned": lambda t: next(
        t.__setitem__(name, t[name].transpose(-1, -2).contiguous())
        for name in t
        if "conv1.w" in name or "embed.proj.w" in name
    ),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_fault_is_found(make, small, tmp_path, family, fault):
    model = small(family)
    source = model.write(tmp_path / "hf")
    convert(make_plan(source, tmp_path / "dist", to="torch_dist"))
    saved = {"vision": model.vision_config(), "outer": model.outer()}
    if model.is_omni:
        saved["audio"] = model.audio_config()
    tensors = {name: tensor.clone() for name, tensor in model.megatron(model.hf()).items()}
    good = save_megatron(make, model, tensors, "good", {"flagscale_convert_towers": saved})
    assert verify(source, good).is_equal
    bare = {name.removeprefix(model.prefix): tensor for name, tensor in tensors.items()}
    FAULTS[fault](bare)
    tensors = {model.prefix + name: tensor for name, tensor in bare.items()}
    bad = save_megatron(make, model, tensors, "bad", {"flagscale_convert_towers": saved})
    found = verify(source, bad)
    assert found.differences
    assert all("vis" in difference.tensor for difference in found.differences)


def test_gate_and_up_of_a_tower_swapped_are_found(make, small, tmp_path):
    model = small("qwen2_5_vl")
    tensors = model.megatron(model.hf())
    name = LAYER.format(i=0) + "mlp.linear_fc1.weight"
    tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])
    saved = {"vision": model.vision_config(), "outer": model.outer()}
    root = save_megatron(make, model, tensors, args={"flagscale_convert_towers": saved})
    found = verify(model.write(tmp_path / "hf"), root)
    assert [difference.tensor.rsplit(".", 2)[-2] for difference in found.differences] == [
        "gate_proj",
        "up_proj",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_missing_and_misshaped_tensors_are_named(small, tmp_path, family):
    model = small(family)
    good = model.hf()
    name = next(name for name in good if "vis" in name and name.endswith("weight"))
    for number, (tensors, said) in enumerate(
        [
            ({**good, "visual.surprise": torch.zeros(2)}, r"`visual\.surprise` has no rule"),
            ({key: value for key, value in good.items() if key != name}, f"`{name}` is missing"),
            ({**good, name: good[name][:-1]}, f"`{name}` has shape"),
        ]
    ):
        source = model.write(tmp_path / str(number), tensors)
        with pytest.raises(Unsupported, match=said):
            convert(make_plan(source, tmp_path / f"{number}-out", to="torch_dist"))


@pytest.mark.parametrize(
    ("family", "section", "change", "said"),
    [
        ("qwen2_5_vl", "vision_config", {"hidden_act": "relu"}, r"hidden_act \(relu\): only silu"),
        ("qwen2_5_vl", "vision_config", {"num_heads": 5}, r"heads \(5\): must divide the width \(32\)"),
        ("qwen2_5_vl", "text_config", {"rope_scaling": {"mrope_section": [1]}}, "three counts"),
        (
            "qwen3_vl",
            "text_config",
            {"rope_scaling": {"mrope_section": [2, 1, 1], "mrope_interleaved": False}},
            "mrope_interleaved",
        ),
        ("llava", "vision_config", {"model_type": "siglip_vision_model"}, "only clip_vision_model"),
        ("llava", None, {"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ("llava", None, {"vision_feature_layer": [-2, -5]}, "only one layer's features"),
        ("llava_onevision", "vision_config", {"vision_use_head": True}, "vision_use_head"),
        ("qwen3_vl", None, {"vision_config": None}, "the section is missing"),
    ],
)
def test_what_megatrons_towers_do_not_compute_is_refused(small, tmp_path, family, section, change, said):
    source = small(family).write(tmp_path / "hf")
    changed = json.loads((source / "config.json").read_text())
    (changed if section is None else changed[section]).update(change)
    (source / "config.json").write_text(json.dumps(changed))
    with pytest.raises(Unsupported, match=said):
        make_plan(source, tmp_path / "out", to="torch_dist")


def test_heads_of_a_tower_must_divide(small, tmp_path):
    source = small("llava", heads=2).write(tmp_path / "hf")
    sizes = ParallelLayout(tensor_model_parallel_size=3)
    with pytest.raises(Unsupported, match="2 attention heads of the vision tower"):
        make_plan(source, tmp_path / "out", to="torch", parallel=sizes)


def test_a_layer_of_features_before_the_last_is_told(small, tmp_path):
    source = small("llava").write(tmp_path / "hf")
    changed = json.loads((source / "config.json").read_text()) | {"vision_feature_layer": -2}
    (source / "config.json").write_text(json.dumps(changed))
    notes = make_plan(source, tmp_path / "out", to="torch_dist").notes
    assert any("build it with 2 of its 3 layers" in note for note in notes)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_size_and_layout_round_trips(make, small, tmp_path_factory, data):
    tensor, pipeline = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2]))
    heads, merge = tensor * data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    depth = data.draw(st.integers(1, 3))
    model = small(
        data.draw(st.sampled_from(FAMILIES)),
        tied=data.draw(st.booleans()),
        depth=depth,
        heads=heads,
        width=heads * data.draw(st.integers(1, 3)),
        ffn=tensor * data.draw(st.integers(1, 5)),
        patch=data.draw(st.integers(1, 3)),
        side=data.draw(st.integers(1, 3)),
        merge=merge,
        deepstack=tuple(range(data.draw(st.integers(0, depth)))),
        text_sizes={
            "heads": 2 * tensor,
            "groups": tensor,
            "hidden": 2 * tensor * data.draw(st.integers(1, 3)),
            "ffn": 6,
        },
    )
    root = tmp_path_factory.mktemp("any")
    source = model.write(root / "hf")
    sizes = ParallelLayout(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    convert(make_plan(source, root / "ranks", to="torch", parallel=sizes))
    convert(make_plan(root / "ranks", root / "dist", to="torch_dist"))
    convert(make_plan(root / "dist", root / "back", to="hf"))
    same_but(model.hf(), make.load(root / "back"))
    assert verify(source, root / "back").is_equal


QWEN_TEXT = {"max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
MROPE = {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"}
PUBLISHED = {
    # As the hub has it: the language model at the top, and fields of old versions.
    "Qwen2.5-VL-3B": (
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
            **QWEN_TEXT,
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "in_chans": 3,
                "intermediate_size": 3420,
                "out_hidden_size": 2048,
                "spatial_patch_size": 14,
                "tokens_per_second": 2,
            },
        },
        3_754_622_976,
    ),
    "llava-1.5-7b": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": 32000,
            "pad_token_id": 32001,
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "vocab_size": 32064,
            },
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000,
            },
        },
        # Without the norm behind the tower, which nothing passes.
        7_063_427_072 - 2048,
    ),
    "llava-onevision-0.5b": (
        {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "text_config": {
                "hidden_size": 896,
                "intermediate_size": 4864,
                "max_position_embeddings": 32768,
                "model_type": "qwen2",
                "num_attention_heads": 14,
                "num_hidden_layers": 24,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
                "vocab_size": 152000,
            },
            "tie_word_embeddings": False,
            "vision_config": {
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 26,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        893_675_552,
    ),
    "Qwen3-VL-4B": (
        {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "text_config": {
                **QWEN_TEXT,
                "head_dim": 128,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_attention_heads": 32,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "rope_scaling": MROPE,
                "tie_word_embeddings": True,
                "vocab_size": 151936,
            },
            "tie_word_embeddings": True,
            "vision_config": {
                "deepstack_visual_indexes": [5, 11, 17],
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "out_hidden_size": 2560,
            },
        },
        4_437_815_808,
    ),
    "Qwen3-Omni-30B-A3B": (
        {
            "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
            "thinker_config": {
                "audio_config": {"n_window": 50, "output_dim": 2048},
                "text_config": {
                    **QWEN_TEXT,
                    "head_dim": 128,
                    "hidden_size": 2048,
                    "intermediate_size": 768,
                    "moe_intermediate_size": 768,
                    "norm_topk_prob": True,
                    "num_attention_heads": 32,
                    "num_experts": 128,
                    "num_experts_per_tok": 8,
                    "num_hidden_layers": 48,
                    "num_key_value_heads": 4,
                    "rope_scaling": MROPE,
                    "vocab_size": 152064,
                },
                "vision_config": {"out_hidden_size": 2048},
            },
        },
        31_719_205_488,
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configurations_have_the_published_number_of_parameters(tmp_path, name):
    """Counts are those of transformers' classes, and `inspect` knows them."""
    published, count = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    arch = config(tmp_path).architecture
    bindings = bind(FAMILIES_KNOWN[arch.family].rules, arch)
    assert sum(math.prod(shape) for binding in bindings for shape in binding.part_shapes) == count
    assert published_like(arch)[1] == count


def logits_with_an_image(folder, model):
    """What transformers computes from an image and text, and which weights it had no use for or missed."""
    import transformers

    loaded, told = getattr(transformers, CLASSES[model.family]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    generator = torch.Generator().manual_seed(3)
    if model.is_qwen:
        merged, channels = model.merge, 3 * 2 * model.patch**2
        side = 2 * merged
        inputs = {
            "pixel_values": torch.randn(side * side, channels, generator=generator),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
        tokens = [3, 126, 128, 128, 128, 128, 127, 5]
        inputs["mm_token_type_ids"] = torch.tensor([[int(token == 128) for token in tokens]])
    else:
        size = model.vision_config()["image_size"]
        inputs = {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
        tokens = [3, *[128] * model.side**2, 5]
        if model.family == "llava_onevision":
            # One image of one tile: the whole, the tile, and a new line behind each of its rows.
            inputs = {
                "pixel_values": torch.randn(1, 2, 3, size, size, generator=generator),
                "image_sizes": torch.tensor([[size, size]]),
            }
            tokens = [3, *[128] * (2 * model.side**2 + model.side), 5]
    with torch.no_grad():
        found = loaded.eval()(input_ids=torch.tensor([tokens]), **inputs).logits
    missing = {name for name in told["missing_keys"] if "rotary" not in name}
    return found, missing, set(told["unexpected_keys"])


@pytest.mark.transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_and_computes_the_same(small, tmp_path, family):
    model = small(family)
    weights = {
        name: tensor / 8 if "norm" not in name and "ln" not in name else tensor
        for name, tensor in model.hf().items()
    }
    source = model.write(tmp_path / "hf", weights)
    sizes = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    convert(make_plan(source, tmp_path / "ranks", to="torch", parallel=sizes))
    convert(make_plan(tmp_path / "ranks", tmp_path / "back", to="hf"))
    before, missing, unexpected = logits_with_an_image(source, model)
    # The class has a norm behind the tower that its own features never pass.
    assert {name.rsplit(".", 2)[-2] for name in missing} == (
        {"post_layernorm"} if family == "llava" else set()
    )
    assert not unexpected
    after, *told = logits_with_an_image(tmp_path / "back", model)
    assert told == [missing, unexpected]
    assert before.abs().max() > 0.1
    assert torch.equal(before, after)
    weights[
        next(name for name in weights if name.endswith(("patch_embedding.weight", "patch_embed.proj.weight")))
    ] *= 2
    changed, *_ = logits_with_an_image(model.write(tmp_path / "changed", weights), model)
    assert not torch.equal(before, changed)


@pytest.mark.megatron
def test_megatrons_own_llava_loads_and_computes_what_transformers_does(small, tmp_path):
    """From both formats, nothing missing, nothing superfluous."""
    from transformers import AutoModelForImageTextToText

    model = small("llava", side=2)
    weights = {
        name: tensor / 8 if "norm" not in name and "pre_layrnorm" not in name else tensor
        for name, tensor in model.hf().items()
    }
    source = model.write(tmp_path / "hf", weights)
    convert(make_plan(source, tmp_path / "dist", to="torch_dist"))
    convert(make_plan(source, tmp_path / "ranks", to="torch", transformer_impl="local"))
    size, count = model.vision_config()["image_size"], model.side**2
    inputs = {
        "image": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(4)),
        "tokens": torch.tensor([[3, 128, 7, 5]]),
        "length": torch.tensor(3 + count),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")
    request = {
        "dist": str(tmp_path / "dist"),
        "ranks": str(tmp_path / "ranks" / "release" / "mp_rank_00" / "model_optim_rng.pt"),
        "inputs": str(tmp_path / "inputs.safetensors"),
        "answers": str(tmp_path / "answers.safetensors"),
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("megatron_llava.py"), tmp_path / "request.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reference = AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        wanted = reference(
            input_ids=torch.tensor([[3, *[128] * count, 7, 5]]), pixel_values=inputs["image"]
        ).logits
    answers = load_file(request["answers"])
    for kind, found in answers.items():
        difference = (found[..., : model.text.vocab] - wanted).abs().max()
        assert difference < 1e-5 * max(1, wanted.abs().max()), kind
