"""Variables, container options and limits that select devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flagscale_hw import CHIPS, InputError, Machine, detect, env, runtime
from flagscale_hw.environment import choose, docker_options, kubernetes_limits
from flagscale_hw.host import Host
from flagscale_hw.testing import fake_host, write_host


def test_devices_are_selected_in_the_order_given():
    devices = fake_host("nvidia", 8).devices
    assert env((devices[2], devices[0])) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2,0"}
    assert env(()) == {}
    with pytest.raises(InputError, match="named twice"):
        env((devices[1], devices[1]))
    with pytest.raises(InputError, match=r"devices of different chips \(amd, nvidia\)"):
        env((devices[0], fake_host("amd", 2).devices[1]))


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip not in ("cpu", "mps", "gaudi")])
def test_every_chip_has_its_own_variable(chip):
    devices = fake_host(chip, 8).devices
    assert env(devices[5:7])[runtime(chip).visible_devices_variable] == "5,6"


def test_gaudi_counts_modules():
    devices = fake_host("gaudi", 8).devices
    assert env(devices[:2]) == {"HABANA_VISIBLE_MODULES": "7,6"}
    with pytest.raises(InputError, match="gaudi 0: its module id is not known"):
        env([replace(devices[0], physical_index=None)])


def test_the_outer_of_two_variables_stays_in_force():
    devices = fake_host("amd", 8).devices
    assert env([devices[5]], environ={"HIP_VISIBLE_DEVICES": "0"}) == {"HIP_VISIBLE_DEVICES": "5"}
    assert env([devices[5]], environ={"ROCR_VISIBLE_DEVICES": "4,5"}) == {"HIP_VISIBLE_DEVICES": "1"}
    by_uuid = {"ROCR_VISIBLE_DEVICES": f"{devices[3].uuid},{devices[5].uuid}"}
    assert env([devices[5], devices[3]], environ=by_uuid) == {"HIP_VISIBLE_DEVICES": "1,0"}
    with pytest.raises(InputError, match="devices 0: ROCR_VISIBLE_DEVICES=4,5 hides them"):
        env([devices[0]], environ={"ROCR_VISIBLE_DEVICES": "4,5"})


def test_numbers_count_within_what_is_visible(tmp_path):
    write_host(tmp_path, "nvidia", 8)
    machine = detect(Host(tmp_path, {"CUDA_VISIBLE_DEVICES": "4,5", "PATH": "/bin:/usr/bin"}), timeout_s=60)
    assert [device.index for device in choose(machine, ["1"])] == [5]
    assert env(choose(machine, ["1"]))["CUDA_VISIBLE_DEVICES"] == "5"
    uuid = machine.devices[4].uuid
    assert [device.index for device in choose(machine, [uuid])] == [4]
    with pytest.raises(
        InputError, match="device 2: this process has 0 to 1, because the environment shows it 2 of 8"
    ):
        choose(machine, ["2"])
    with pytest.raises(InputError, match="neither a number nor the UUID"):
        choose(machine, [machine.devices[0].uuid])
    with pytest.raises(InputError, match="2 UUIDs begin so"):
        choose(machine, ["GPU-0000"])
    with pytest.raises(InputError, match="named twice"):
        choose(machine, ["0", uuid])


def test_devices_by_index():
    machine = fake_host("nvidia", 2)
    assert machine.select([1, 0]) == (machine.devices[1], machine.devices[0])
    with pytest.raises(InputError, match="device 2: not on this machine: it has 0, 1"):
        machine.select([2])
    with pytest.raises(InputError, match="it has none"):
        Machine(hostname="h", num_cpus=1, memory_bytes=1).select([0])


@pytest.mark.parametrize(
    ("chip", "words"),
    [
        ("nvidia", ["--gpus", '"device=2,3"']),
        ("ascend", ["--runtime=ascend", "-e", "ASCEND_VISIBLE_DEVICES=2,3"]),
        ("iluvatar", ["--runtime=iluvatar", "-e", "IX_VISIBLE_DEVICES=2,3"]),
        ("metax", ["--device=/dev/mxcd", "--device=/dev/dri", "-e", "CUDA_VISIBLE_DEVICES=2,3"]),
        ("cambricon", ["--device=/dev/cambricon_ctl", "--device=/dev/cambricon_dev2",
        "--device=/dev/cambricon_dev3"]), ("hygon", ["--device=/dev/kfd", "--device=/dev/mkfd",
        "--device=/dev/dri", "-e", "HIP_VISIBLE_DEVICES=2,3"]), ("gaudi", ["--runtime=habana", "-e",
        "HABANA_VISIBLE_DEVICES=5,4"]), ("intel", ["--device=/dev/dri", "-e", "ZE_AFFINITY_MASK=2,3"]),
    ],
)  # fmt: skip
def test_docker(chip, words):
    assert docker_options(fake_host(chip, 8).devices[2:4]) == words


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip not in ("cpu", "mps")])
def test_every_chip_has_a_container_form(chip):
    devices = fake_host(chip, 8).devices[:2]
    assert docker_options(devices)
    resource = runtime(chip).kubernetes_resource
    if resource is None:
        with pytest.raises(InputError, match="no Kubernetes device plug-in is known"):
            kubernetes_limits(devices)
    else:
        assert kubernetes_limits(devices) == {"limits": {resource: 2}}
    assert docker_options(()) == []
    assert kubernetes_limits(()) == {}
