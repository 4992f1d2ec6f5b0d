"""What runs on a chip, and how devices are selected."""

from __future__ import annotations

import json

import pytest

from flagscale_hw import DetectError, InputError, Machine, env, peak, runtime
from flagscale_hw.testing import fake_host


def test_runtimes():
    assert (runtime("cpu").torch_device, runtime("cpu").collective_backend) == ("cpu", "gloo")
    nvidia = runtime("nvidia")
    assert (nvidia.torch_device, nvidia.collective_backend) == ("cuda", "nccl")
    assert nvidia.visible_devices_variable == "CUDA_VISIBLE_DEVICES"
    with pytest.raises(DetectError, match="chip 'tpu': not known: known are cpu, nvidia"):
        runtime("tpu")


def test_fake_hosts():
    machine = fake_host("nvidia", 8)
    assert machine == fake_host("nvidia", 8)
    assert [device.index for device in machine.devices] == list(range(8))
    assert machine.visible == machine.devices
    assert len({device.uuid for device in machine.devices}) == 8
    assert fake_host("cpu").devices == ()
    json.dumps(machine.to_dict())


@pytest.mark.parametrize(("chip", "count"), [("cpu", 1), ("nvidia", 0), ("nvidia", -1)])
def test_fake_hosts_that_make_no_sense(chip, count):
    with pytest.raises(InputError, match="give 0 for `cpu`"):
        fake_host(chip, count)


def test_devices_are_selected_in_the_order_given():
    devices = fake_host("nvidia", 4).devices
    assert env((devices[2], devices[0])) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2,0"}
    assert env(()) == {}
    with pytest.raises(InputError, match="named twice"):
        env((devices[1], devices[1]))


def test_devices_by_index():
    machine = fake_host("nvidia", 2)
    assert machine.select([1, 0]) == (machine.devices[1], machine.devices[0])
    with pytest.raises(InputError, match="device 2: not on this machine: it has 0, 1"):
        machine.select([2])
    with pytest.raises(InputError, match="it has none"):
        Machine(hostname="h", num_cpus=1, memory_bytes=1).select([0])


def test_peaks_are_sourced_exact_and_never_guessed():
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
