"""What a machine has, on hosts made of a few files and stub tools."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flagscale_hw import detect
from flagscale_hw.host import Host

HEADER = (
    "index, uuid, name, memory.total [MiB], memory.used [MiB], utilization.gpu [%], temperature.gpu, "
    "power.draw [W], pci.bus_id, driver_version, compute_cap"
)
GOOD = "0, GPU-a1, NVIDIA H20, 97871, 4, 0, 31, 70.52, 00000000:3B:00.0, 570.133.20, 9.0"
SECOND = "1, GPU-b2, NVIDIA H20, 97871, 90112, 87, 64, 480.10, 00000001:D8:00.0, 570.133.20, 9.0"


@pytest.fixture
def nvidia(tree):
    for number in range(2):
        tree.write(f"dev/nvidia{number}", "")
    tree.write("dev/nvidiactl", "")
    return tree


def test_a_plain_host(tree):
    machine = tree.detect()
    assert (machine.hostname, machine.num_cpus, machine.memory_bytes) == ("testhost", 2, 16 << 20)
    assert (machine.cpu_name, machine.chip, machine.devices, machine.problems) == (
        "Test CPU 9000",
        "cpu",
        (),
        (),
    )
    assert tree.presence() == ["cpu"]


def test_a_host_that_tells_nothing(tmp_path):
    machine = detect(Host(root=tmp_path))
    assert (machine.num_cpus, machine.memory_bytes, machine.cpu_name, machine.chip) == (1, 0, None, "cpu")


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2, 16 << 20),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1, 16 << 20),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, 2, 16 << 20),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "4096"}, 2, 4096),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max"}, 2, 16 << 20),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "8192",
            },
            1,
            8192,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n3:memory:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            2,
            16 << 20,
        ),
    ],
)
def test_the_limits_of_a_container_count(tree, files, cpus, memory):
    for path, text in files.items():
        tree.write(path, text)
    machine = tree.detect()
    assert (machine.num_cpus, machine.memory_bytes) == (cpus, memory)


def test_two_good_cards(nvidia):
    nvidia.prints(HEADER, GOOD, SECOND)
    machine = nvidia.detect()
    assert (machine.chip, machine.problems, machine.visible_indices) == ("nvidia", (), None)
    assert machine.visible == machine.devices
    first, second = machine.devices
    assert (first.index, first.uuid, first.name) == (0, "GPU-a1", "NVIDIA H20")
    assert (first.memory_total_bytes, first.memory_used_bytes) == (97871 << 20, 4 << 20)
    assert (first.utilisation_percent, first.temperature_c, first.power_w) == (0.0, 31.0, 70.52)
    assert (first.pci_bus, first.driver, first.compute_capability) == ("0000:3b:00.0", "570.133.20", "9.0")
    assert second.pci_bus == "0001:d8:00.0"


@pytest.mark.parametrize(
    "unknown",
    ["[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", "[Unknown Error]", "ERR!", "-", ""],
)
def test_unknown_is_none_and_never_zero(nvidia, unknown):
    nvidia.prints(
        HEADER, f"0, GPU-a, NVIDIA X, 100, {unknown}, {unknown}, {unknown}, {unknown}, {unknown}, 1.2, 9.0"
    )
    device = nvidia.detect().devices[0]
    assert device.memory_total_bytes == 100 << 20
    unknown_fields = (device.memory_used_bytes, device.utilisation_percent, device.temperature_c)
    assert (*unknown_fields, device.power_w, device.pci_bus) == (None,) * 5


def test_a_lost_card_keeps_the_others(nvidia):
    lost = "Unable to determine the device handle for GPU1: 0000:D8:00.0: GPU is lost.  Reboot the system"
    nvidia.prints(HEADER, GOOD, lost, code=15)
    machine = nvidia.detect()
    assert [device.index for device in machine.devices] == [0]
    assert [problem.text for problem in machine.problems] == [f"nvidia-smi: {lost}"]


def test_names_with_commas_units_and_another_order_of_columns(nvidia):
    nvidia.prints(
        "name, index, memory.total [MiB], power.draw [W]",
        "NVIDIA A, rev. 2, mobile, 3, 24576 MiB, 12.5 W",
        "",
    )
    (device,) = nvidia.detect().devices
    assert (device.name, device.index, device.memory_total_bytes) == (
        "NVIDIA A, rev. 2, mobile",
        3,
        24576 << 20,
    )
    assert device.power_w == 12.5


def test_an_old_driver_is_asked_for_what_it_knows(nvidia):
    nvidia.tool(
        'case "$1" in *compute_cap*)\n'
        "    echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;; esac\n"
        "printf 'index, name, memory.total [MiB]\\n0, Tesla T4, 15360\\n'\n"
    )
    machine = nvidia.detect()
    assert (machine.devices[0].name, machine.devices[0].compute_capability) == ("Tesla T4", None)
    assert machine.problems == ()


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (["No devices were found"], 6, "No devices were found"),
        (
            ["Failed to initialize NVML: Driver/library version mismatch", "NVML library: 570.124"],
            18,
            "mismatch",
        ),
        ([""], 9, "ended with code 9 and no message"),
    ],
)
@pytest.mark.parametrize(
    "version",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 22:23:56 UTC 2024\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC: 12",
    ],
)
def test_a_tool_that_fails_leaves_what_the_driver_says(nvidia, lines, code, said, version):
    nvidia.prints(*lines, code=code)
    nvidia.write("proc/driver/nvidia/version", version)
    info = "Model: \t\t NVIDIA L20\nIRQ: 1\nGPU UUID: \t GPU-77\nBus Location: 0000:3b:00.0\n"
    nvidia.write("proc/driver/nvidia/gpus/0000:3b:00.0/information", info)
    nvidia.write(
        "proc/driver/nvidia/gpus/0000:86:00.0/information", "Model: Unknown\nGPU UUID: GPU-????????\n"
    )
    machine = nvidia.detect()
    assert any(said in problem.text for problem in machine.problems)
    first, second = machine.devices
    assert (first.index, first.name, first.uuid, first.driver) == (0, "NVIDIA L20", "GPU-77", "550.54.15")
    assert (second.index, second.uuid, second.memory_total_bytes) == (1, None, None)


def test_a_tool_that_hangs_costs_the_timeout_and_leaves_nothing(nvidia, keeper):
    nvidia.tool("trap '' TERM\necho started > $0.seen\nsleep 600 & sleep 600\n")
    nvidia.pci("0000:3b:00.0", "0x10de", "0x030200")
    started = time.monotonic()
    machine = nvidia.detect(timeout_s=1.0)
    assert time.monotonic() - started < 30
    assert [problem.text for problem in machine.problems] == [
        "nvidia-smi: no answer within 1 s; it was killed"
    ]
    assert [(device.index, device.pci_bus) for device in machine.devices] == [(0, "0000:3b:00.0")]
    keeper.until(lambda: keeper.carrying(str(nvidia.root / "usr/bin/nvidia-smi")) == [])


@pytest.mark.parametrize(
    "noise", ["\0\0", "a,b,c\n1,2", HEADER, HEADER + "\n1", HEADER + "\n" + "9," * 50, "index\nx\n-1"]
)
def test_garbage_raises_nothing_and_invents_nothing(nvidia, noise):
    nvidia.prints(noise)
    machine = nvidia.detect()
    assert (machine.chip, machine.devices) == ("cpu", ())
    assert machine.problems


def test_no_tool_is_said(nvidia):
    assert [problem.text for problem in nvidia.detect().problems] == ["nvidia-smi: not found"]


def test_hardware_without_a_driver_is_reported_and_not_used(tree):
    tree.pci("0000:3b:00.0", "0x10de", "0x030200")
    tree.prints(HEADER, GOOD)
    machine = tree.detect()
    assert (machine.chip, machine.devices) == ("cpu", ())
    (problem,) = map(str, machine.problems)
    assert problem.startswith("nvidia: the bus shows such devices but no driver has them: load the driver")
    assert tree.presence() == ["cpu"]


@pytest.mark.parametrize(
    ("address", "vendor", "kind"),
    [
        ("0000:3b:00.1", "0x10de", "0x040300"),  # its audio function
        ("0000:3b:00.0", "0x10de", "0x068000"),  # a bridge of NVSwitch
        ("0000:3b:00.0", "0x1ded", "0x030200"),  # another vendor's accelerator
    ],
)
def test_other_hardware_is_not_nvidia_even_when_a_tool_answers(tree, address, vendor, kind):
    tree.pci(address, vendor, kind)
    tree.prints(HEADER, GOOD)
    machine = tree.detect()
    assert (machine.chip, machine.devices) == ("cpu", ())
    assert {problem.where for problem in machine.problems} <= {"thead"}


@pytest.mark.parametrize(
    ("value", "indices", "doubt"),
    [
        ("1", (1,), None),
        ("1,0", (1, 0), None),
        ("", (), None),
        ("-1", (), None),
        ("NoDevFiles", (), None),
        ("GPU-b2,GPU-a", (1, 0), None),
        ("0,7,1", (0,), "'7' names no device"),
        ("0,0", (), "'0' is named twice"),
        ("GPU-", (), "'GPU-' names no device"),
        ("MIG-1", (), "'MIG-1' names no device"),
    ],
)
def test_the_environment_restricts_as_cuda_does(nvidia, value, indices, doubt):
    nvidia.prints(HEADER, GOOD, SECOND)
    nvidia.environ["CUDA_VISIBLE_DEVICES"] = value
    machine = nvidia.detect()
    assert machine.visible_indices == indices
    assert tuple(device.index for device in machine.visible) == indices
    assert len(machine.devices) == 2
    assert [doubt in problem.text for problem in machine.problems] == ([True] if doubt else [])


def test_a_tool_sees_the_environment_and_an_empty_folder_of_its_own(nvidia):
    nvidia.environ["ANSWER"] = GOOD
    nvidia.tool(f'test "$LC_ALL" = C || exit 9\necho left > behind\necho \'{HEADER}\'\necho "$ANSWER"\n')
    before = set(Path().iterdir())
    assert nvidia.detect().devices[0].uuid == "GPU-a1"
    assert set(Path().iterdir()) == before


def test_this_machine_is_described():
    machine = detect()
    assert machine.num_cpus >= 1
    assert machine.memory_bytes > 1 << 20
    assert machine.chip in {"cpu", "nvidia"}


def test_a_host_without_accelerators_costs_milliseconds(tree):
    for number in range(400):
        tree.pci(f"0000:{number // 32:02x}:{number % 32:02x}.0", "0x8086", "0x060000")
    best = min(_seconds(tree.detect) for _ in range(10))
    assert best < 0.2  # 20 ms on an idle machine; this one may be busy


def _seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
