"""Peak memory does not follow the size of the model."""

from __future__ import annotations

import pytest

MEASURE = """
import sys
from pathlib import Path
from flagscale_convert import convert, make_plan, verify

def peak_kib():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

before = peak_kib()
plan = make_plan(sys.argv[1], sys.argv[2], to=sys.argv[3])
convert(plan, workers=2)
after_convert = peak_kib()
assert verify(sys.argv[1], sys.argv[2]).is_equal
print((after_convert - before) // 1024, (peak_kib() - before) // 1024, plan.total_bytes >> 20)
"""


@pytest.mark.parametrize("to", ["torch_dist", "hf"])
def test_peak_is_bounded(make, shape, python, tmp_path, to):
    import torch

    model = shape(family="llama", layers=1, hidden=1024, ffn=1024, heads=16, head=64, vocab=40000)
    model.dtype = torch.bfloat16
    source = make.hf(model) if to == "torch_dist" else make.megatron(model)
    done = python(MEASURE, source, tmp_path / "out", to)
    assert done.returncode == 0, done.stderr
    convert_mib, verify_mib, total_mib = map(int, done.stdout.split())
    assert total_mib > 140
    assert convert_mib < 64, f"{convert_mib} MiB for {total_mib} MiB"
    assert verify_mib < 80, f"{verify_mib} MiB for {total_mib} MiB"
