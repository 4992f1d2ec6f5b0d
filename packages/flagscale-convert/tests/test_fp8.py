"""Block-scaled fp8 weights: bit-equal to torch's arithmetic, at every edge, a few rows at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale_convert import Unsupported, convert, make_plan
from flagscale_convert.fp8 import Dequantised
from flagscale_convert.tensors import TensorInfo

BLOCK = [128, 128]
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def reference(codes, scales, dtype, block=BLOCK):
    """The published formula (`weight_dequant`): multiply block by block in float32, round once."""
    wide = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (codes.view(torch.float8_e4m3fn).float() * wide[: codes.shape[0], : codes.shape[1]]).to(dtype)


class InMemory:
    """A source of two tensors."""

    def __init__(self, codes, scales):
        self.data = {"w.weight": codes, "w.weight_scale_inv": scales}

    def tensors(self):
        dtypes = {torch.uint8: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}
        return {name: TensorInfo(dtypes[t.dtype], tuple(t.shape)) for name, t in self.data.items()}

    def read_rows(self, name, start, out):
        rows = self.data[name][start : start + len(out)].contiguous()
        out[...] = rows.view(torch.uint8).numpy().reshape(out.shape)


def dequantised(codes, scales, dtype, start, rows, block=BLOCK):
    source = Dequantised(InMemory(codes, scales), tuple(block), dtype, where="m")
    out = np.empty((rows, source.tensors()["w.weight"].row_bytes), np.uint8)
    source.read_rows("w.weight", start, out)
    return torch.from_numpy(out).view(TYPES[dtype])


def same_bits(ours, theirs):
    """Equal bit by bit; any NaN equals any other."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    integer = torch.int16 if ours.element_size() == 2 else torch.int32
    keep = ~theirs.isnan()
    assert torch.equal(ours.contiguous().view(integer)[keep], theirs.contiguous().view(integer)[keep])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_every_code_with_many_scales(dtype, scale_dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(512, 5)
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(4, 10, generator=generator) * 10 ** torch.randint(-9, 3, (4, 10), generator=generator)
    scales = scales.to(scale_dtype)
    same_bits(dequantised(codes, scales, dtype, 0, 512), reference(codes, scales, TYPES[dtype]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_any_rows(data):
    block = data.draw(st.sampled_from([[128, 128], [1, 128], [3, 5], [64, 1]]))
    rows, columns = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    start = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - start))
    dtype = data.draw(st.sampled_from(sorted(TYPES)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator)
    ours = dequantised(codes, scales, dtype, start, count, block)
    same_bits(ours, reference(codes, scales, TYPES[dtype], block)[start : start + count])


def test_more_blocks_than_two_bytes_count():
    codes = torch.randint(0, 256, (2, 600), dtype=torch.uint8)
    scales = torch.rand(1, 600)
    same_bits(
        dequantised(codes, scales, "F32", 0, 2, [2, 1]), reference(codes, scales, torch.float32, [2, 1])
    )


def quantise(tensors, *, missing=(), extra=()):
    """Replace the projections by random codes and scales, as published weights have them."""
    generator = torch.Generator().manual_seed(4)
    out, expected = {}, {}
    for name, tensor in tensors.items():
        is_kept = tensor.dim() != 2 or "_proj" not in name or "eh_proj" in name
        out[name] = expected[name] = tensor
        if is_kept:
            continue
        codes = torch.randint(0, 127, tensor.shape, dtype=torch.uint8, generator=generator)
        scales = torch.rand(*(-(-size // 128) for size in tensor.shape), generator=generator)
        out[name] = codes.view(torch.float8_e4m3fn)
        out[name + "_scale_inv"] = scales
        expected[name] = (codes, scales)
    for name in missing:
        del out[name]
    return out | {name: torch.ones(1, 1) for name in extra}, expected


CONFIG = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": BLOCK,
    }
}


@pytest.fixture
def model(shape):
    return shape(
        family="deepseek_v3", hidden=160, ffn=200, plain=(0,), mtp=1, dtype=torch.bfloat16, config=CONFIG
    )


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_a_whole_model_is_dequantised_while_it_is_read(make, model, tmp_path, dtype, to):
    stored, expected = quantise(model.hf_tensors())
    source = make.hf(model, tensors=stored)
    plan = make_plan(source, tmp_path / "out", to=to, dtype=dtype)
    code = {None: "BF16", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    assert f"quantization_config: fp8 weights are dequantised to {code}" in plan.notes
    convert(plan)
    convert(make_plan(tmp_path / "out", tmp_path / "back", to="hf"))
    target = TYPES[code]
    found = make.load(tmp_path / "back")
    for name, value in expected.items():
        if isinstance(value, tuple):
            wanted = reference(*value, target)
        else:
            wanted = value if "e_score" in name or dtype is None else value.to(target)
        assert found[name].dtype == wanted.dtype, name
        assert torch.equal(found[name], wanted), name
    assert sorted(found) == sorted(expected)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


Q = "model.layers.1.self_attn.q_b_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"missing": [Q + "_scale_inv"]}, r"q_b_proj\.weight` is fp8 without `.*_scale_inv`"),
        ({"missing": [Q]}, r"q_b_proj\.weight_scale_inv` belongs to no fp8 weight"),
        ({"extra": ["model.norm.weight_scale_inv"]}, r"norm\.weight_scale_inv` belongs to no fp8 weight"),
    ],
)
def test_scales_and_weights_belong_together(make, model, tmp_path, change, text):
    stored, _ = quantise(model.hf_tensors(), **change)
    with pytest.raises(Unsupported, match=text):
        make_plan(make.hf(model, tensors=stored), tmp_path / "out", to="hf")


def test_scales_of_another_shape_are_refused(make, model, tmp_path):
    stored, _ = quantise(model.hf_tensors())
    stored["model.layers.0.mlp.gate_proj.weight_scale_inv"] = torch.ones(1, 2)
    with pytest.raises(Unsupported, match=r"in blocks of 128 x 128, F32 or BF16 \[2, 2\] is needed"):
        make_plan(make.hf(model, tensors=stored), tmp_path / "out", to="hf")


def test_codes_without_quantization_config_are_refused(make, model, tmp_path):
    model.config = {}
    stored, _ = quantise(model.hf_tensors())
    with pytest.raises(Unsupported, match="has no rule"):
        convert(make_plan(make.hf(model, tensors=stored), tmp_path / "out", to="hf"))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": BLOCK, "fmt": "e5m2"},
    ],
)
def test_other_quantisations_are_refused(make, model, tmp_path, config):
    model.config = {"quantization_config": config}
    with pytest.raises(Unsupported, match="quantization_config"):
        make_plan(make.hf(model), tmp_path / "out", to="hf")
