"""Published figures: sourced, graded, and given for exactly one name."""

from __future__ import annotations

import math

import pytest

from flagscale_hw import CHIPS, peak
from flagscale_hw.peaks import DTYPES, specification, specifications


def test_a_figure_is_for_exactly_one_name():
    found = peak("NVIDIA H20", "bf16")
    assert found is not None
    assert found.flops_per_s == 148e12
    assert found.source
    assert peak("NVIDIA H200", "torch.bfloat16").flops_per_s == 989e12
    assert peak("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak("NVIDIA A100-SXM4-80GB", "int8").flops_per_s == 624e12
    for name in ("H200", "NVIDIA H2", "nvidia h200", "NVIDIA H200 NVL", "", None):
        assert peak(name, "bf16") is None
    assert peak("NVIDIA H200", "float128") is None


# The mistakes that other tables make: see the chip reference, rules 2 and 5.
@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H800", "bf16", 989), ("NVIDIA H800 PCIe", "bf16", 756), ("AMD Instinct MI300X", "bf16",
        1307.4), ("NVIDIA L40S", "bf16", 362.05), ("AMD Instinct MI250X", "bf16", 191.5), ("PPU-ZW810E",
        "bf16", 123), ("NVIDIA B200", "fp8", 4500), ("K100_AI", "int8", 392), ("HL-225", "fp8", 865),
        ("MLU590", "bf16", 330),
    ],
)  # fmt: skip
def test_known_mistakes_are_not_repeated(name, dtype, tera):
    assert peak(name, dtype).flops_per_s == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Iluvatar BI-V150", "bf16"),  # of a board with two chips
        ("MLU370-X8", "int8"),
        ("910B3", "fp16"),  # only a table without sources
        ("MetaX C500", "fp16"),
        ("910B2", "bf16"),  # published for the family, not for this model
        ("HL-325L", "bf16"),  # sources contradict each other
        ("AMD Instinct MI308X", "fp16"),
    ],
)
def test_doubtful_figures_are_not_given(name, dtype):
    assert specification(name) is not None
    assert peak(name, dtype) is None


def test_suffixes_decide_about_memory():
    gib = 1 << 30
    sizes = {
        name: specification(name).memory_bytes.value / gib for name in ("910B4", "910B4-1", "NVIDIA H20")
    }
    assert sizes == {"910B4": 32, "910B4-1": 64, "NVIDIA H20": 96}
    assert specification("AMD Instinct MI300X").memory_bytes is None


def test_the_table_is_sound():
    rows = specifications()
    assert len(rows) > 90
    names = [name for row in rows for name in row.names]
    assert len(names) == len(set(names))
    for row in rows:
        assert row.chip in CHIPS
        for figure in (row.memory_bytes, row.memory_bytes_per_s, row.tdp_w, *row.tera_per_s.values()):
            if figure is not None:
                assert figure.sources
                assert math.isfinite(figure.value)
                assert figure.value > 0
        assert set(row.to_dict()["tera_per_s"]) == set(DTYPES)
