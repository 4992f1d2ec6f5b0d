"""What runs on a chip: one row per chip, and a plug-in's."""

from __future__ import annotations

import json

import pytest

from flagscale_hw import CHIPS, DetectError, runtime

FIFTEEN = {
    "nvidia", "amd", "ascend", "cambricon", "mthreads", "metax", "iluvatar", "kunlunxin", "hygon",
    "tsingmicro", "enflame", "thead", "gaudi", "intel", "mps",
}  # fmt: skip
# Written down a second time on purpose, from the table of the chip reference.
TORCH = {
    "nvidia": ("cuda", "nccl"), "amd": ("cuda", "nccl"), "ascend": ("npu", "hccl"),
    "cambricon": ("mlu", "cncl"), "mthreads": ("musa", "mccl"),
    "metax": ("cuda", "nccl"), "iluvatar": ("cuda", "nccl"),
    "kunlunxin": ("cuda", "nccl"), "hygon": ("cuda", "nccl"), "tsingmicro": ("txda", "tccl"),
    "enflame": ("gcu", "eccl"), "thead": ("cuda", "nccl"), "gaudi": ("hpu", "hccl"), "intel": ("xpu", "xccl"),
    "mps": ("mps", "gloo"), "cpu": ("cpu", "gloo"),
}  # fmt: skip
VISIBLE = {
    "nvidia": "CUDA_VISIBLE_DEVICES", "amd": "HIP_VISIBLE_DEVICES", "ascend": "ASCEND_RT_VISIBLE_DEVICES",
    "cambricon": "MLU_VISIBLE_DEVICES", "mthreads": "MUSA_VISIBLE_DEVICES", "metax": "CUDA_VISIBLE_DEVICES",
    "iluvatar": "CUDA_VISIBLE_DEVICES", "kunlunxin": "CUDA_VISIBLE_DEVICES", "hygon": "HIP_VISIBLE_DEVICES",
    "tsingmicro": "TXDA_VISIBLE_DEVICES", "enflame": "TOPS_VISIBLE_DEVICES", "thead": "CUDA_VISIBLE_DEVICES",
    "gaudi": "HABANA_VISIBLE_MODULES", "intel": "ZE_AFFINITY_MASK", "mps": None, "cpu": None,
}  # fmt: skip


def test_every_chip_has_a_row():
    assert set(CHIPS) == FIFTEEN | {"cpu"}
    assert CHIPS[-1] == "cpu"
    assert {chip: (runtime(chip).torch_device, runtime(chip).collective_backend) for chip in CHIPS} == TORCH
    assert {chip: runtime(chip).visible_devices_variable for chip in CHIPS} == VISIBLE
    json.dumps([runtime(chip).to_dict() for chip in CHIPS])


def test_what_imitates_cuda_needs_its_own_library_or_variable():
    for chip, (device, backend) in TORCH.items():
        row = runtime(chip)
        assert (row.collective_library is None) == (backend == "gloo")
        assert row.title
        if device not in ("cuda", "cpu", "xpu", "mps"):
            assert row.torch_module, chip


def test_who_trains_a_chip():
    assert {chip for chip in CHIPS if runtime(chip).trains_with is None} == {"gaudi", "intel", "mps"}
    assert {chip for chip in CHIPS if runtime(chip).trains_with == "megatron-lm-fl"} == {
        "ascend", "cambricon", "mthreads", "tsingmicro", "enflame",
    }  # fmt: skip


def test_only_the_plug_in_of_flagos_is_told_by_name():
    assert {chip: runtime(chip).vllm.plugins for chip in CHIPS if runtime(chip).vllm.plugins} == {
        "tsingmicro": "fl"
    }


def test_an_unknown_chip():
    with pytest.raises(DetectError, match=r"chip 'tpu': not known: known are amd, ascend, .*, tsingmicro"):
        runtime("tpu")
