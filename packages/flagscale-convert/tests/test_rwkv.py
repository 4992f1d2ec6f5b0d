"""RWKV-7: fla's tensors against FlagScale's nested dictionaries, and what both sides' formulas compute."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional

from flagscale_convert import ParallelLayout, Unsupported, config, convert, inspect, make_plan, verify
from flagscale_convert.families import FAMILIES
from flagscale_convert.hf_config import read_config
from flagscale_convert.published import published_like
from flagscale_convert.rules import bind

HEAD = 64
PUBLISHED = {
    "0.1b": (12, 768, (64, 64, 32, 128), 191_034_624),
    "0.4b": (24, 1024, (64, 64, 32, 128), 450_767_872),
    "1.5b": (24, 2048, (96, 96, 64, 256), 1_527_404_544),
    "2.9b": (32, 2560, (96, 96, 64, 320), 2_947_735_040),
    "7.2b": (32, 4096, (128, 128, 96, 480), 7_199_141_888),
}
"""Layers, width, low ranks (decay, rate, value, gate) and parameters."""
FIXTURES = Path(*Path(__file__).parts[:-5], "shared/fixtures/models")
UNUSED = ("v0", "v1", "v2")
PROJECTIONS = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}


@dataclass
class Model:
    """A small model; low ranks differ from each other."""

    layers: int = 2
    hidden: int = 2 * HEAD
    ranks: tuple[int, ...] = (5, 6, 7, 9)
    vocab: int = 131
    dtype: torch.dtype = torch.float32

    def config(self, **changed):
        decay, rate, value, gate = self.ranks
        return {
            "architectures": ["RWKV7ForCausalLM"],
            "model_type": "rwkv7",
            "auto_map": {"AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM"},
            "attn": None,
            "attn_mode": "chunk",
            "fuse_norm": True,
            "head_dim": HEAD,
            "hidden_act": "sqrelu",
            "hidden_ratio": 4.0,
            "hidden_size": self.hidden,
            "initializer_range": 0.006,
            "intermediate_size": 4 * self.hidden,
            "max_position_embeddings": 2048,
            "norm_bias": True,
            "norm_eps": 1e-5,
            "norm_first": True,
            "num_heads": None,
            "num_hidden_layers": self.layers,
            "tie_word_embeddings": False,
            "value_dim": [self.hidden] * self.layers,
            "vocab_size": self.vocab,
            "decay_low_rank_dim": decay,
            "a_low_rank_dim": rate,
            "v_low_rank_dim": value,
            "gate_low_rank_dim": gate,
            **changed,
        }

    def shapes(self):
        h = self.hidden
        out = {"model.embeddings.weight": (self.vocab, h), "lm_head.weight": (self.vocab, h)}
        norms = ["model.norm", "model.layers.0.pre_norm"]
        for i in range(self.layers):
            p = f"model.layers.{i}."
            norms += [p + "attn_norm", p + "ffn_norm", p + "attn.g_norm"]
            out |= {f"{p}attn.x_{letter}": (1, 1, h) for letter in "rwkvag"}
            out |= {p + "attn.k_k": (h,), p + "attn.k_a": (h,), p + "attn.r_k": (h // HEAD, HEAD)}
            out |= {f"{p}attn.{letter}_proj.weight": (h, h) for letter in "rkvo"}
            for letter, rank in zip("wavg", self.ranks, strict=True):
                if (letter, i) == ("v", 0):
                    continue
                lora = f"{p}attn.{letter}_lora.lora."
                out |= {lora + "0.weight": (rank, h), lora + "2.weight": (h, rank)}
                if letter != "g":
                    out[lora + "2.bias"] = (h,)
            out |= {p + "ffn.x_k": (h,), p + "ffn.key.weight": (4 * h, h), p + "ffn.value.weight": (h, 4 * h)}
        return out | {f"{norm}.{kind}": (h,) for norm in norms for kind in ("weight", "bias")}

    def tensors(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (0.3 * torch.randn(*size, generator=generator)).to(self.dtype)
            for name, size in self.shapes().items()
        }

    def write(self, folder, tensors=None, **changed):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config(**changed)))
        save_file(self.tensors() if tensors is None else tensors, folder / "model.safetensors")
        return folder

    def state(self, hf, *, fill=0.0):
        """What FlagScale's class saves; `fill` is in the pair of its first layer that nothing uses."""

        def padded(tensor):
            return functional.pad(tensor, (0, 0, 0, -self.vocab % 128))

        blocks = OrderedDict()
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            part = {name.removeprefix(layer): tensor for name, tensor in hf.items() if name.startswith(layer)}
            blocks[f"block_{i}"] = OrderedDict(self.renamed(*item) for item in part.items())
        unused = {
            "v0": (1, 1, self.hidden),
            "v1": (self.hidden, self.ranks[2]),
            "v2": (self.ranks[2], self.hidden),
        }
        blocks["block_0"] |= {
            f"att.{name}": torch.full(size, fill, dtype=self.dtype) for name, size in unused.items()
        }
        return {
            "embeddings.word_embeddings": OrderedDict(weight=padded(hf["model.embeddings.weight"])),
            "blocks": blocks,
            "ln_out": OrderedDict(weight=hf["model.norm.weight"], bias=hf["model.norm.bias"]),
            "head": OrderedDict(weight=padded(hf["lm_head.weight"])),
        }

    @staticmethod
    def renamed(name, tensor):
        """A tensor of a layer as FlagScale's class has it."""
        if "_lora" in name:
            letter, part = name[5], name.partition(".lora.")[2]
            number = {"2.bias": 0, "0.weight": 1, "2.weight": 2}[part]
            return f"att.{letter}{number}", tensor.T.contiguous() if number else tensor.view(1, 1, -1)
        module, _, rest = name.partition(".")
        module = {"attn": "att", "pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2"}.get(module, module)
        for ours, theirs in PROJECTIONS.items():
            rest = rest.replace(theirs, ours)
        is_mixing = name in ("attn.k_k", "attn.k_a", "ffn.x_k")
        return f"{module}.{rest}", tensor.view(1, 1, -1) if is_mixing else tensor

    def trained(self, root, state, **changed):
        """A checkpoint as Megatron's trainer saves one of FlagScale's class: arguments of any other model."""
        args = {
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "num_attention_heads": 8,
            "ffn_hidden_size": 4 * self.hidden,
            "max_position_embeddings": 2048,
            "normalization": "LayerNorm",
            "position_embedding_type": "learned_absolute",
            "swiglu": False,
            "padded_vocab_size": self.vocab + -self.vocab % 128,
            "vocab_size": self.vocab,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            **changed,
        }
        folder = root / "iter_0000007" / "mp_rank_00"
        folder.mkdir(parents=True)
        saved = {"args": Namespace(**args), "iteration": 7, "checkpoint_version": 3.0, "model": state}
        torch.save(saved, folder / "model_optim_rng.pt")
        (root / "latest_checkpointed_iteration.txt").write_text("7")
        return root


def load(root):
    file = root / "release" / "mp_rank_00" / "model_optim_rng.pt"
    return torch.load(file, weights_only=False)


def same(one, other):
    assert list(one) == list(other) or sorted(one) == sorted(other)
    for name, value in one.items():
        if isinstance(value, dict):
            same(value, other[name])
            continue
        assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(value, other[name]), name


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 2),
    ranks=st.tuples(*[st.integers(1, 12)] * 4),
    vocab=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_there_and_back(tmp_path_factory, layers, heads, ranks, vocab, dtype):
    root = tmp_path_factory.mktemp("sizes")
    model = Model(layers, heads * HEAD, ranks, vocab, dtype)
    tensors = model.tensors()
    source = model.write(root / "hf", tensors)
    convert(make_plan(source, root / "torch", to="torch"))
    same(load(root / "torch")["model"], model.state(tensors))
    convert(make_plan(root / "torch", root / "back", to="hf"))
    assert verify(source, root / "back").is_equal
    same(load_file(root / "back" / "model.safetensors"), tensors)
    convert(make_plan(root / "torch", root / "again", to="torch"))
    same(load(root / "again")["model"], model.state(tensors))


def test_a_trained_checkpoint_is_told_by_its_tensors(tmp_path):
    model = Model()
    tensors = model.tensors(3)
    root = model.trained(tmp_path / "trained", model.state(tensors, fill=0.73))
    found = inspect(root)
    assert found.family == "rwkv7"
    assert not found.suspicions
    assert found.architecture["recurrence_gate_rank"] == 9
    assert found.architecture["num_heads"] == 2
    assert any("low ranks" in note and "gate 9 (built 64)" in note for note in found.notes)
    convert(make_plan(root, tmp_path / "hf", to="hf"))
    same(load_file(tmp_path / "hf" / "model.safetensors"), tensors)
    source = model.write(tmp_path / "source", tensors)
    assert verify(source, root).is_equal
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = model.config()
    for name in ("auto_map", "fuse_norm", "num_heads", "value_dim", "initializer_range"):
        expected.pop(name)
    assert {name: written[name] for name in expected} == expected
    assert json.loads(config(root).text)["gate_low_rank_dim"] == 9


def group_norm(x, weight, bias, heads):
    return functional.group_norm(x, heads, weight, bias, eps=64e-5)


def layer_norm(x, block, name):
    return functional.layer_norm(x, x.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"])


def shifted(x):
    return functional.pad(x, (0, 0, 1, -1)) - x


def recurrence(r, decay, k, v, kk, a):
    """The state of equation 16 of the paper, token by token: S = S (diag(w) - kk^T (a kk)) + v^T k."""
    state = r.new_zeros(r.shape[1], HEAD, HEAD)
    out = []
    for t in range(len(r)):
        removed = torch.einsum("hij,hj->hi", state, -kk[t])
        state = (
            state * decay[t][:, None, :]
            + removed[:, :, None] * (kk[t] * a[t])[:, None, :]
            + v[t][:, :, None] * k[t][:, None, :]
        )
        out.append(torch.einsum("hij,hj->hi", state, r[t]))
    return torch.stack(out)


def mixed(vectors, parts, heads):
    """What both sides do behind their projections."""
    r, decay, k, v, a, g = vectors
    k_k, k_a, r_k, weight, bias, output = parts
    kk = functional.normalize((k * k_k).unflatten(-1, (heads, HEAD)), dim=-1)
    k = k * (1 + (a - 1) * k_a)
    r, decay, k, v, a = (x.unflatten(-1, (heads, HEAD)) for x in (r, decay, k, v, a))
    x = group_norm(recurrence(r, decay, k, v, kk, a).flatten(1), weight, bias, heads)
    return ((x + ((r * k * r_k).sum(-1, keepdim=True) * v).flatten(1)) * g) @ output.T


def logits_of_fla(t, layers, heads, tokens):
    """The formula of `fla.models.rwkv7`: low-rank pairs are linear layers, the decay a scaled sigmoid."""
    x = functional.layer_norm(
        t["model.embeddings.weight"][tokens],
        (heads * HEAD,),
        t["model.layers.0.pre_norm.weight"],
        t["model.layers.0.pre_norm.bias"],
    )
    first = None
    for i in range(layers):
        p = f"model.layers.{i}."
        block = {name.removeprefix(p): tensor for name, tensor in t.items() if name.startswith(p)}

        def lora(letter, x, inner, block=block):
            name = f"attn.{letter}_lora.lora."
            low = inner(functional.linear(x, block[name + "0.weight"]))
            return functional.linear(low, block[name + "2.weight"], block.get(name + "2.bias"))

        y = layer_norm(x, block, "attn_norm")
        delta = shifted(y)
        mix = {letter: y + delta * block[f"attn.x_{letter}"][0, 0] for letter in "rwkvag"}
        r, k, v = (functional.linear(mix[n], block[f"attn.{n}_proj.weight"]) for n in "rkv")
        decay = torch.exp(-0.6065306597126334 * lora("w", mix["w"], torch.tanh).sigmoid())
        first = v if first is None else first
        if i:
            v = torch.lerp(v, first, lora("v", mix["v"], lambda low: low).sigmoid())
        a = lora("a", mix["a"], lambda low: low).sigmoid()
        g = lora("g", mix["g"], torch.sigmoid)
        names = ("k_k", "k_a", "r_k", "g_norm.weight", "g_norm.bias", "o_proj.weight")
        x = x + mixed((r, decay, k, v, a, g), [block[f"attn.{name}"] for name in names], heads)
        y = layer_norm(x, block, "ffn_norm")
        inner = functional.linear(y + shifted(y) * block["ffn.x_k"], block["ffn.key.weight"])
        x = x + functional.linear(inner.relu() ** 2, block["ffn.value.weight"])
    x = functional.layer_norm(x, x.shape[-1:], t["model.norm.weight"], t["model.norm.bias"])
    return x @ t["lm_head.weight"].T


def logits_of_flagscale(state, heads, tokens):
    """The formula of FlagScale's class: low-rank matrices from the right, the decay by softplus."""
    x = state["embeddings.word_embeddings"]["weight"][tokens]
    first = None
    for i, block in enumerate(state["blocks"].values()):
        x = x if i else layer_norm(x, block, "ln0")
        y = layer_norm(x, block, "ln1")
        att = {name.removeprefix("att."): tensor for name, tensor in block.items()}
        delta = shifted(y)
        xr, xw, xk, xv, xa, xg = (y + delta * att[f"x_{letter}"][0, 0] for letter in "rwkvag")
        r, k, v = xr @ att["receptance.weight"].T, xk @ att["key.weight"].T, xv @ att["value.weight"].T
        w = -functional.softplus(-(att["w0"][0, 0] + torch.tanh(xw @ att["w1"]) @ att["w2"])) - 0.5
        if i:
            v = v + (first - v) * torch.sigmoid(att["v0"][0, 0] + xv @ att["v1"] @ att["v2"])
        else:
            first = v
        a = torch.sigmoid(att["a0"][0, 0] + xa @ att["a1"] @ att["a2"])
        g = torch.sigmoid(xg @ att["g1"]) @ att["g2"]
        names = ("k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias", "output.weight")
        parts = [att[name][0, 0] if name in ("k_k", "k_a") else att[name] for name in names]
        x = x + mixed((r, torch.exp(-torch.exp(w)), k, v, a, g), parts, heads)
        y = layer_norm(x, block, "ln2")
        y = torch.relu((y + shifted(y) * block["ffn.x_k"][0, 0]) @ block["ffn.key.weight"].T) ** 2
        x = x + y @ block["ffn.value.weight"].T
    x = layer_norm(x, {f"ln_out.{kind}": tensor for kind, tensor in state["ln_out"].items()}, "ln_out")
    return x @ state["head"]["weight"].T


def test_both_sides_compute_the_same(tmp_path):
    model = Model(layers=3)
    tensors = model.tensors(5)
    convert(make_plan(model.write(tmp_path / "hf", tensors), tmp_path / "torch", to="torch"))
    tokens = torch.randint(0, model.vocab, (17,), generator=torch.Generator().manual_seed(1))
    theirs = logits_of_fla({name: t.double() for name, t in tensors.items()}, 3, 2, tokens)
    state = load(tmp_path / "torch")["model"]
    doubled = {
        "embeddings.word_embeddings": {"weight": state["embeddings.word_embeddings"]["weight"].double()},
        "blocks": {
            name: {n: t.double() for n, t in block.items()} for name, block in state["blocks"].items()
        },
        "ln_out": {name: t.double() for name, t in state["ln_out"].items()},
        "head": {"weight": state["head"]["weight"].double()},
    }
    ours = logits_of_flagscale(doubled, 2, tokens)[:, : model.vocab]
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_counts(size):
    layers, hidden, ranks, parameters = PUBLISHED[size]
    model = Model(layers, hidden, ranks, 65536)
    arch = read_config(model.config(), where="config.json").architecture
    bindings = bind(FAMILIES["rwkv7"].rules, arch)
    shapes = [shape for binding in bindings for shape in binding.part_shapes]
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters
    repository = published_like(arch)
    assert repository is not None
    assert repository[1] == parameters
    file = FIXTURES / f"rwkv7-{size}.json"
    if not file.exists():
        return
    facts = json.loads(file.read_text())
    assert facts["params"]["meta_device_total"] == parameters
    assert facts["text"]["hidden_size"] == hidden
    assert facts["text"]["num_hidden_layers"] == layers
    names = ("decay", "a", "v", "gate")
    assert tuple(facts["rwkv"][f"{name}_low_rank_dim"] for name in names) == ranks


@pytest.mark.parametrize(("size", "is_told"), [("0.1b", False), ("0.4b", True), ("1.5b", True)])
def test_low_ranks_that_flagscale_would_not_build_are_told(size, is_told):
    layers, hidden, ranks, _ = PUBLISHED[size]
    notes = read_config(Model(layers, hidden, ranks, 65536).config(), where="config.json").notes
    assert any("low ranks" in note for note in notes) is is_told
    if size == "1.5b":
        built = "decay 96 (built 128), rate 96 (built 128), gate 256 (built 224)"
        assert any(built in note for note in notes)


P = "model.layers.1."
FAULTS = {
    "decay and rate swapped": lambda t: swap(t, P + "attn.w_lora.lora.2.bias", P + "attn.a_lora.lora.2.bias"),
    "mixing factors swapped": lambda t: swap(t, P + "attn.x_r", P + "attn.x_k"),
    "key and value swapped": lambda t: swap(t, P + "attn.k_proj.weight", P + "attn.v_proj.weight"),
    "projection transposed": lambda t: change(t, P + "attn.o_proj.weight", lambda m: m.T.contiguous()),
    "low rank not transposed": lambda t: change(
        t, P + "attn.g_lora.lora.0.weight", lambda m: m.T.contiguous().view(m.shape)
    ),
    "layers swapped": lambda t: swap(t, "model.layers.0.ffn.key.weight", P + "ffn.key.weight"),
    "heads swapped": lambda t: change(t, P + "attn.r_k", lambda m: m.flip(0)),
    "norms swapped": lambda t: swap(t, "model.layers.0.pre_norm.bias", "model.layers.0.attn_norm.bias"),
    "head for embedding": lambda t: swap(t, "model.embeddings.weight", "lm_head.weight"),
    "one bit": lambda t: change(t, P + "ffn.x_k", flipped),
}


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


def change(tensors, name, how):
    tensors[name] = how(tensors[name]).contiguous()


def flipped(tensor):
    bits = tensor.clone().view(torch.int32)
    bits[-1] ^= 1
    return bits.view(torch.float32)


def test_verify_catches_planted_faults(tmp_path):
    model = Model()
    right = model.tensors()
    convert(make_plan(model.write(tmp_path / "hf"), tmp_path / "torch", to="torch"))
    file = tmp_path / "hf" / "model.safetensors"
    for fault, plant in FAULTS.items():
        tensors = dict(right)
        plant(tensors)
        changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, right[name])}
        save_file(tensors, file)
        report = verify(tmp_path / "hf", tmp_path / "torch")
        assert {difference.tensor for difference in report.differences} == changed, fault
        assert changed, fault


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.layers.1.attn.v_lora.lora.0.weight"), "`{}` is missing"),
        (lambda t: t.pop("model.layers.0.pre_norm.bias"), "`{}` is missing"),
        (lambda t: t.update({"model.layers.1.pre_norm.bias": torch.ones(3)}), "model.layers.1.pre_norm.bias"),
        (lambda t: t.update({"model.layers.0.attn.r_k": torch.ones(1, 128)}), "needs [2, 64]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, text):
    tensors = Model().tensors()
    change(tensors)
    gone = (set(Model().tensors()) - set(tensors)) or {""}
    source = Model().write(tmp_path / "hf", tensors)
    problems = make_plan(source, tmp_path / "out", to="torch").problems
    assert any(text.format(*gone) in problem for problem in problems)
    with pytest.raises(Unsupported, match="rwkv7 family"):
        convert(make_plan(source, tmp_path / "out", to="torch"))
    assert not (tmp_path / "out").exists()


def test_trained_tensors_that_do_not_fit_are_named(tmp_path):
    model = Model()
    state = model.state(model.tensors())
    del state["blocks"]["block_1"]["att.w0"]
    state["blocks"]["block_1"]["att.extra"] = torch.ones(2)
    state["ln_out"]["weight"] = torch.ones(5)
    problems = make_plan(model.trained(tmp_path / "trained", state), tmp_path / "out", to="hf").problems
    assert len(problems) == 3
    for name in (
        "blocks.block_1.att.w0` is missing",
        "att.extra` has no rule",
        "`ln_out.weight` has shape [5]",
    ):
        assert any(name in problem for problem in problems), name


def test_a_dictionary_within_itself_is_not_followed_endlessly(tmp_path):
    model = Model()
    state = model.state(model.tensors())
    state["blocks"]["block_1"] = state["blocks"]
    problems = make_plan(model.trained(tmp_path / "trained", state), tmp_path / "out", to="hf").problems
    assert any("`blocks.block_1.ln1.weight` is missing" in problem for problem in problems)


def test_the_first_layers_pair_may_be_absent_and_is_dropped(tmp_path):
    """BlinkDL's class keeps a pair there that nothing uses, and so did early conversions of it."""
    model = Model()
    tensors = model.tensors()
    state = model.state(tensors)
    for name in UNUSED:
        del state["blocks"]["block_0"][f"att.{name}"]
    root = model.trained(tmp_path / "trained", state)
    unused = {
        f"model.layers.0.attn.v_lora.lora.{part}": torch.ones(*size)
        for part, size in (("0.weight", (7, 128)), ("2.weight", (128, 7)), ("2.bias", (128,)))
    }
    source = model.write(tmp_path / "hf", tensors | unused)
    assert verify(root, source).is_equal
    plan = make_plan(source, tmp_path / "out", to="torch")
    assert any("model.layers.0.attn.v_lora" in note for note in plan.notes)
    convert(plan)
    same(load(tmp_path / "out")["model"], model.state(tensors))


def test_mixing_factors_in_one_tensor_are_read(tmp_path):
    model = Model()
    tensors = model.tensors()
    joined = {name: tensor for name, tensor in tensors.items() if ".attn.x_" not in name}
    for i in range(model.layers):
        parts = [tensors[f"model.layers.{i}.attn.x_{letter}"].flatten() for letter in "rwkvag"]
        joined[f"model.layers.{i}.attn.x_x"] = torch.stack(parts)
    old = model.write(tmp_path / "old", joined)
    assert verify(old, model.write(tmp_path / "hf")).is_equal


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"head_dim": 128}, "head_dim (128): only 64"),
        ({"num_heads": 4}, "num_heads (4)"),
        ({"hidden_size": 100}, "hidden_size (100): must be a multiple of 64, the size of a head"),
        ({"intermediate_size": 300}, "intermediate_size (300)"),
        ({"intermediate_size": None, "hidden_ratio": 3.5}, "hidden_ratio (3.5)"),
        ({"value_dim": [256, 256]}, "value_dim ([256, 256])"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "attn ("),
        ({"hidden_act": "relu"}, "hidden_act (relu): only sqrelu"),
        ({"norm_eps": 1e-6}, "norm_eps (1e-06)"),
        ({"norm_first": False}, "norm_first (False)"),
        ({"norm_bias": False}, "norm_bias (False)"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings (True)"),
        ({"v_low_rank_dim": None}, "v_low_rank_dim (None): a positive integer"),
        ({"auto_map": {"AutoModel": "modeling_other.Model"}}, "auto_map"),
        ({"architectures": ["Rwkv7ForCausalLM"]}, "Rwkv7ForCausalLM"),
        ({"architectures": ["Rwkv6ForCausalLM"], "model_type": "rwkv6"}, "Rwkv6ForCausalLM"),
    ],
)
def test_configurations_without_an_equal_are_refused(changed, text):
    with pytest.raises(Unsupported) as refused:
        read_config(Model().config(**changed), where="config.json")
    assert text in str(refused.value)


def test_unknown_fields_are_told():
    notes = read_config(Model().config(rope_theta=3, _name_or_path="x"), where="config.json").notes
    assert [note for note in notes if "low ranks" not in note] == ["rope_theta (3): unknown field, left out"]


def test_layouts_its_class_has_not_are_refused(tmp_path):
    model = Model()
    source = model.write(tmp_path / "hf")
    with pytest.raises(Unsupported, match="use --to torch"):
        make_plan(source, tmp_path / "out", to="torch_dist")
    for sizes in ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}):
        with pytest.raises(Unsupported, match="both must be 1"):
            make_plan(source, tmp_path / "out", to="torch", parallel=ParallelLayout(**sizes))
    state = model.state(model.tensors())
    two = model.trained(tmp_path / "two", state, tensor_model_parallel_size=2)
    shutil.copytree(two / "iter_0000007" / "mp_rank_00", two / "iter_0000007" / "mp_rank_01")
    with pytest.raises(Unsupported, match="tensor_model_parallel_size"):
        make_plan(two, tmp_path / "out", to="hf")
    wrong = model.trained(tmp_path / "wrong", state, hidden_size=100)
    with pytest.raises(Unsupported, match="multiple of 64"):
        make_plan(wrong, tmp_path / "out", to="hf")


def test_configuration_as_yaml(tmp_path):
    source = Model(12, 768, PUBLISHED["0.1b"][2], 65536).config()
    (tmp_path / "config.json").write_text(json.dumps(source))
    written = config(tmp_path, to="yaml")
    options = yaml.safe_load(written.text)["model"]
    assert (options["num_layers"], options["hidden_size"], options["ffn_hidden_size"]) == (12, 768, 3072)
    assert options["squared_relu"] is True
    assert options["position_embedding_type"] == "none"
    assert options["untie_embeddings_and_output_weights"] is True


def test_its_tokenizer_goes_along(tmp_path):
    source = Model().write(tmp_path / "hf")
    for name in ("rwkv_vocab_v20230424.txt", "hf_rwkv_tokenizer.py", "tokenizer_config.json"):
        (source / name).write_text("{}")
    convert(make_plan(source, tmp_path / "torch", to="torch"))
    convert(make_plan(tmp_path / "torch", tmp_path / "back", to="hf"))
    assert (tmp_path / "back" / "rwkv_vocab_v20230424.txt").exists()
    assert (tmp_path / "back" / "hf_rwkv_tokenizer.py").exists()
