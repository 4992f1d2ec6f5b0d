"""Whose chips these are: decided by the bus and the device nodes, and never by the tool that answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flagscale_hw.backend import backends
from flagscale_hw.detection import FORCED_VARIABLE, detect, presence
from flagscale_hw.host import ROOT_VARIABLE

CAPTURES = Path(__file__).parent / "captures"
NVIDIA_SHIM = (CAPTURES / "nvidia-query.txt").read_text()


def _pci(vendor, kind, device="0x0001", driver="", address="0000:3b:00.0"):
    return (address, vendor, kind, device, driver)


@pytest.mark.parametrize(
    ("functions", "nodes", "seen"),
    [
        # Hardware and driver.
        ([_pci("0x10de", "0x030200")], ["nvidia0", "nvidiactl"], {"nvidia": "usable"}),
        ([_pci("0x19e5", "0x120000", "0xd802")], ["davinci0"], {"ascend": "usable"}),
        ([_pci("0xcabc", "0x120000")], ["cambricon_dev0"], {"cambricon": "usable"}),
        ([_pci("0x1ed5", "0x030200")], ["mtgpu.0"], {"mthreads": "usable"}),
        ([_pci("0x9999", "0x030200")], ["mxcd"], {"metax": "usable"}),
        ([_pci("0x1e3e", "0x030200", "0x0003")], ["iluvatar0"], {"iluvatar": "usable"}),
        ([_pci("0x1d22", "0x078000", "0x3688")], ["xpuctrl", "xpu0"], {"kunlunxin": "usable"}),
        ([_pci("0x2057", "0x120000", "0xa000")], ["xpu0"], {"kunlunxin": "usable"}),
        ([_pci("0x1d94", "0x0b4000", "0x6210")], ["kfd", "mkfd"], {"hygon": "usable"}),
        ([], ["accel_drv_mgr", "accel/dev-0"], {"tsingmicro": "usable"}),
        ([_pci("0x1e36", "0x120000", "0xc035")], ["gcu0", "gcu0vid0"], {"enflame": "usable"}),
        ([_pci("0x1ded", "0x030200", "0x6001")], ["alixpu_ppu0"], {"thead": "usable"}),
        ([_pci("0x1da3", "0x120000", "0x1020")], ["accel/accel0"], {"gaudi": "usable"}),
        ([_pci("0x1002", "0x038000", "0x74a1")], ["kfd", "dri/renderD128"], {"amd": "usable"}),
        ([_pci("0x8086", "0x030000", "0xe20b", "xe")], ["dri/renderD128"], {"intel": "usable"}),
        # Nodes alone, as in a container.
        ([], ["davinci7", "davinci_manager"], {"ascend": "usable"}),
        ([], ["alixpu_ctl", "alixpu_ppu3"], {"thead": "usable"}),
        # Hardware alone: reported, not dropped.
        ([_pci("0x10de", "0x030200", driver="vfio-pci")], [], {"nvidia": "bus_only"}),
        ([_pci("0x19e5", "0x120000")], ["davinci_manager"], {"ascend": "bus_only"}),
        ([_pci("0x9999", "0x030200")], [], {"metax": "bus_only"}),
        ([_pci("0x1d94", "0x0b4000")], [], {"hygon": "bus_only"}),
        ([_pci("0x1002", "0x038000", "0x73ae")], [], {"amd": "bus_only"}),
        # The vendor's other products.
        ([_pci("0x10de", "0x040300", address="0000:3b:00.1")], [], {}),
        ([_pci("0x10de", "0x068000")], [], {}),
        ([_pci("0x19e5", "0x030000", "0x1711")], [], {}),  # the display of a BMC
        ([_pci("0x19e5", "0x020000", "0x1822"), _pci("0x19e5", "0x060400", address="0000:01:00.0")], [], {}),
        ([_pci("0x1d94", "0x060000"), _pci("0x1d94", "0x0c0330", address="0000:02:00.0")], ["kfd"], {}),
        ([_pci("0x1ded", "0x020000", "0x107f")], [], {}),  # elastic RDMA on every machine of that cloud
        ([_pci("0x1d22", "0x010802", "0x1380")], ["xpu0"], {}),  # a cloud disk
        ([_pci("0x1d22", "0x020000")], [], {}),
        ([_pci("0x8086", "0x030000", "0x4680", "i915", "0000:00:02.0")], ["dri/renderD128"], {}),
        ([_pci("0x8086", "0x030000", "0xe20b")], ["dri/renderD128"], {}),  # nobody drives it
        ([_pci("0x8086", "0x120000", "0x7d1d")], ["accel/accel0"], {}),  # the NPU of a laptop
        ([_pci("0x1002", "0x040300")], ["kfd"], {}),
        # Ids and names that look like somebody else's.
        ([_pci("0x1002", "0x030000", "0x9999")], ["kfd"], {"amd": "usable"}),  # MetaX's number as a device id
        ([], ["gcu0vid0"], {}),  # a codec
        ([], ["accel/accel0"], {}),  # the kernel's own class
        ([], ["kfd"], {}),
        ([], ["dri/renderD128"], {}),
        ([], ["nvidiactl", "nvidia-uvm", "nvidia-modeset"], {}),
        ([], ["dxg"], {}),  # WSL without the library that Windows lends
    ],
)
def test_who_is_here(tree, functions, nodes, seen):
    for function in functions:
        tree.pci(*function)
    for node in nodes:
        tree.write(f"dev/{node}", "")
    assert tree.seen() == seen
    assert tree.presence() == ([chip for chip, state in seen.items() if state == "usable"] or ["cpu"])


def test_amd_and_hygon_share_a_node_and_not_a_vendor(tree):
    tree.write("dev/kfd", "")
    tree.pci("0000:01:00.0", "0x1002", "0x038000")
    assert tree.seen() == {"amd": "usable"}
    tree.pci("0000:02:00.0", "0x1d94", "0x0b4000")
    assert tree.seen() == {"amd": "usable", "hygon": "usable"}


def test_a_virtual_function_counts_where_its_card_cannot_be_seen(tree):
    tree.write("dev/nvidia0", "")
    tree.pci("0000:3b:00.0", "0x10de", "0x030200")
    tree.pci("0000:3b:00.4", "0x10de", "0x030200")
    (tree.root / "sys/bus/pci/devices/0000:3b:00.4/physfn").symlink_to("../0000:3b:00.0")
    assert tree.detect().vendors[0].on_bus == 1
    tree.pci("0000:af:00.4", "0x10de", "0x030200")
    (tree.root / "sys/bus/pci/devices/0000:af:00.4/physfn").symlink_to("../0000:af:00.0")
    assert tree.detect().vendors[0].on_bus == 2


def test_wsl_has_neither_bus_nor_nodes(tree):
    tree.write("dev/dxg", "")
    tree.write("usr/lib/wsl/lib/libnvidia-ml.so.1", "")
    assert tree.seen() == {"nvidia": "usable"}


def test_amd_in_a_container_that_hides_the_bus(tree):
    tree.write("dev/kfd", "")
    tree.write(
        "sys/class/kfd/kfd/topology/nodes/0/properties", "cpu_cores_count 32\nvendor_id 4098\nsimd_count 0\n"
    )
    assert tree.seen() == {}
    tree.write("sys/class/kfd/kfd/topology/nodes/1/properties", "simd_count 1216\nvendor_id 4098\n")
    assert tree.seen() == {"amd": "usable"}


@pytest.mark.parametrize("chip", ["metax", "iluvatar", "kunlunxin", "hygon", "thead", "ascend", "mthreads"])
def test_a_shim_called_nvidia_smi_makes_no_chip_an_nvidia(tree, chip):
    tree.device(chip)
    tree.prints(*NVIDIA_SHIM.splitlines())
    machine = tree.detect()
    assert [vendor.chip for vendor in machine.vendors] == [chip]
    assert not [device for device in (*machine.devices, *machine.others) if device.chip == "nvidia"]


@pytest.mark.parametrize(
    ("chip", "tool", "capture"),
    [
        ("intel", "xpu-smi", "kunlunxin-report.txt"),
        ("kunlunxin", "xpu-smi", "intel-discovery.txt"),
        ("hygon", "rocm-smi", None),
    ],
)
def test_a_tool_of_the_same_name_decides_nothing(tree, chip, tool, capture):
    if chip == "intel":
        tree.pci("0000:03:00.0", "0x8086", "0x030000", "0xe20b", "xe")
        tree.write("dev/dri/renderD128", "")
    else:
        tree.device(chip)
    text = (CAPTURES / capture).read_text() if capture else (CAPTURES / "amd-rocm-smi.json").read_text()
    tree.prints(*text.splitlines(), name=tool)
    machine = tree.detect()
    assert {device.chip for device in (*machine.devices, *machine.others)} <= {chip}
    assert {vendor.chip for vendor in machine.vendors} == {chip}


def test_all_vendors_of_a_mixed_host_are_listed_and_the_big_one_is_used(tree):
    tree.device("nvidia")
    tree.device("cambricon")
    tree.prints("index, name, memory.total [MiB]", "0, Tesla T4, 15360 MiB")
    tree.prints(*(CAPTURES / "cambricon-table.txt").read_text().splitlines(), name="cnmon")
    machine = tree.detect()
    assert (machine.chip, len(machine.devices)) == ("cambricon", 2)
    assert [(device.chip, device.name) for device in machine.others] == [("nvidia", "Tesla T4")]
    assert [vendor.chip for vendor in machine.vendors] == ["cambricon", "nvidia"]


def test_an_operator_decides_what_is_here(tree):
    tree.device("nvidia")
    tree.prints(*NVIDIA_SHIM.splitlines())
    tree.prints(*(CAPTURES / "metax-list.txt").read_text().splitlines(), name="mx-smi")
    tree.environ[FORCED_VARIABLE] = "metax"
    machine = tree.detect()
    assert (machine.chip, machine.vendors[0].is_forced) == ("metax", True)
    tree.environ[FORCED_VARIABLE] = "cpu"
    assert (tree.detect().chip, tree.detect().vendors) == ("cpu", ())
    tree.environ[FORCED_VARIABLE] = "nvdia"
    (problem,) = tree.detect().problems
    assert str(problem).startswith(
        "FLAGSCALE_HW_VENDOR: chip 'nvdia' is not known: known are nvidia, ascend,"
    )


def test_another_root_is_looked_at_when_the_environment_says_so(tree, monkeypatch):
    tree.device("thead")
    monkeypatch.setenv(ROOT_VARIABLE, str(tree.root))
    assert presence() == ["thead"]
    assert detect().hostname == "testhost"


def test_the_order_of_preference_is_the_order_of_the_table():
    chips = [backend.chip for backend in backends()]
    assert chips[0] == "nvidia"
    assert len(chips) == len(set(chips)) == 15


QUIET = """
import sys
seen = []
names = {"subprocess.Popen", "ctypes.dlopen", "os.fork", "os.posix_spawn", "os.exec", "os.system"}
sys.addaudithook(lambda name, args: seen.append(name) if name in names else None)
import flagscale_hw
from flagscale_hw.host import Host
from pathlib import Path
machine = flagscale_hw.detect(Host(Path(sys.argv[1])))
assert (machine.chip, machine.devices) == ("cpu", ()), machine
slow = {"subprocess", "ctypes", "xml.etree.ElementTree", "importlib.metadata", "flagscale_hw.backends.nvidia"}
print(seen, sorted(slow & set(sys.modules)))
"""


@pytest.mark.parametrize("count", [0, 400])
def test_a_host_without_accelerators_starts_nothing_and_loads_nothing(tree, count):
    for number in range(count):
        tree.pci(f"0000:{number // 32:02x}:{number % 32:02x}.0", "0x8086", "0x060000")
    code = [sys.executable, "-I", "-c", QUIET, str(tree.root)]
    said = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    # `Host` imports subprocess, and does not use it here.
    assert said.stdout.strip() in ("[] []", "[] ['subprocess']"), said.stderr
