"""A family that another package brings: found by its entry point, both ways, refused when it is none."""

from __future__ import annotations

import json
import zipfile

import pytest

MODULE = '''
"""Llama with other tensor names, as somebody's in-house model has them."""
from flagscale_convert.families import Family
from flagscale_convert.rules import Copy, Gated, Qkv, Rule, Vocab

LAYER, MEGATRON = "blocks.{i}.", "decoder.layers.{i}."


def hidden(arch):
    return arch.hidden_size


FAMILY = Family(
    "inhouse",
    "InhouseForCausalLM",
    "inhouse",
    "models of this house",
    "this package's own tests",
    like="llama",
    rules=(
        Rule(("wte",), "embedding.word_embeddings.weight", Vocab(), hidden),
        Rule((LAYER + "norm_1",), MEGATRON + "self_attention.linear_qkv.layer_norm_weight", Copy(hidden)),
        Rule(
            (LAYER + "q", LAYER + "k", LAYER + "v"),
            MEGATRON + "self_attention.linear_qkv.weight",
            Qkv(),
            hidden,
        ),
        Rule(
            (LAYER + "o",),
            MEGATRON + "self_attention.linear_proj.weight",
            Copy(hidden),
            lambda arch: arch.context_size,
        ),
        Rule((LAYER + "norm_2",), MEGATRON + "mlp.linear_fc1.layer_norm_weight", Copy(hidden)),
        Rule(
            (LAYER + "gate", LAYER + "up"),
            MEGATRON + "mlp.linear_fc1.weight",
            Gated(lambda arch: arch.ffn_size),
            hidden,
        ),
        Rule((LAYER + "down",), MEGATRON + "mlp.linear_fc2.weight", Copy(hidden), lambda arch: arch.ffn_size),
        Rule(("norm",), "decoder.final_layernorm.weight", Copy(hidden)),
        Rule(("head",), "output_layer.weight", Vocab(), hidden, when=lambda arch: not arch.is_tied),
    ),
)
'''
NAMES = {
    "input_layernorm": "norm_1",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "norm_2",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
SESSION = """
import sys
sys.path.insert(0, sys.argv[1])
from flagscale_convert.cli import main
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.fixture
def install(tmp_path):
    """Build a wheel of one module and unpack it into a directory of its own, which is what installing is."""

    def built(module, entry="inhouse = inhouse:FAMILY"):
        wheel = tmp_path / "inhouse-1.0-py3-none-any.whl"
        info = "inhouse-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("inhouse.py", module)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: inhouse\nVersion: 1.0\n")
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/entry_points.txt", f"[flagscale_convert.families]\n{entry}\n")
            archive.writestr(f"{info}/RECORD", "")
        site = tmp_path / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        return site

    return built


def other_names(tensors):
    out = {}
    for name, tensor in tensors.items():
        short = name.removesuffix(".weight").removeprefix("model.")
        head, _, rest = short.removeprefix("layers.").partition(".")
        renamed = f"blocks.{head}.{NAMES[rest]}" if short.startswith("layers.") else None
        out[renamed or {"embed_tokens": "wte", "norm": "norm", "lm_head": "head"}[short]] = tensor
    return out


def test_a_family_of_another_package_both_ways(make, shape, tmp_path, python, install):
    site = install(MODULE)
    listed = python(SESSION, site, "families", "--json")
    assert json.loads(listed.stdout)["inhouse"]["proven_by"] == "this package's own tests"
    model = shape(family="llama")
    tensors = other_names(model.hf_tensors())
    source = make.hf(model, tensors=tensors)
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["InhouseForCausalLM"], "model_type": "inhouse"}
    (source / "config.json").write_text(json.dumps(config))
    for words in (
        ("run", source, tmp_path / "mc", "--to", "torch_dist"),
        ("run", tmp_path / "mc", tmp_path / "back", "--to", "hf"),
        ("verify", source, tmp_path / "mc"),
    ):
        done = python(SESSION, site, *words)
        assert done.returncode == 0, done.stderr
    make.same(make.load(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [
        "InhouseForCausalLM"
    ]
    trained = make.megatron(model, tensors=model.megatron_tensors(model.hf_tensors()))
    done = python(SESSION, site, "run", trained, tmp_path / "out", "--to", "hf", "--family", "inhouse")
    assert done.returncode == 0, done.stderr
    make.same(make.load(tmp_path / "out"), tensors)
    missing = python(SESSION, tmp_path, "run", tmp_path / "mc", tmp_path / "none", "--to", "hf")
    assert missing.returncode == 2
    assert "family (inhouse): the configuration is that of llama" in missing.stderr


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("FAMILY = 3", "is a int: a flagscale_convert.Family is needed"),
        (MODULE.replace('"inhouse",\n    "Inhouse', '"llama",\n    "Inhouse'), "its name must be new"),
        (MODULE.replace('like="llama"', 'like="gpt2"'), "must be like one of llama"),
    ],
)
def test_what_is_no_family_is_refused(python, install, module, text):
    done = python(SESSION, install(module), "families")
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
