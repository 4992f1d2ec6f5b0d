"""How to recognise every chip by files alone: PCI ids and the names of device nodes.

Detection reads this one table on every host, and imports a vendor's module only where its chip is.
"""

from __future__ import annotations

import re

from flagscale_hw.backend import ACCELERATORS, Backend, PciRule
from flagscale_hw.host import Host

__all__ = ["GATES"]

_KFD_NODES = "/sys/class/kfd/kfd/topology/nodes"
_COMPUTE_ONLY = frozenset({"0302", "0380", "0b40", "1200"})
_DISPLAY = frozenset({"0300", "0302", "0380"})


def _nvidia_without_bus(host: Host) -> bool:
    # WSL has neither bus nor nodes, only one paravirtual device and the library that Windows lends.
    if host.path("/dev/dxg").exists() and host.path("/usr/lib/wsl/lib/libnvidia-ml.so.1").exists():
        return True
    return host.path("/proc/driver/nvidia/version").exists() and bool(host.names("/proc/driver/nvidia/gpus"))


def _amd_without_bus(host: Host) -> bool:
    """The compute driver lists its nodes even where a container hides the bus; 4098 is 0x1002."""
    for node in host.names(_KFD_NODES) if host.path("/dev/kfd").exists() else ():
        text = host.read(f"{_KFD_NODES}/{node}/properties") or ""
        if re.search(r"^vendor_id 4098$", text, re.MULTILINE) and re.search(r"^simd_count [1-9]", text, re.M):
            return True
    return False


def _apple(host: Host) -> bool:
    if not host.is_real:
        return False
    import os

    kernel = os.uname()
    return kernel.sysname == "Darwin" and kernel.machine == "arm64"


def _vendor(module: str) -> str:
    return f"flagscale_hw.backends.{module}"


GATES = (
    Backend(
        chip="nvidia",
        module=_vendor("nvidia"),
        pci=(PciRule("0x10de", frozenset({"0300", "0302"})),),
        nodes=r"nvidia\d+",
        also=_nvidia_without_bus,
    ),
    Backend(
        chip="ascend",
        module=_vendor("ascend"),
        # The same vendor makes the display of most servers' BMC, network cards, disks and root ports.
        pci=(PciRule("0x19e5", frozenset({"1200"}), not_devices=frozenset({"0x1711"})),),
        nodes=r"davinci\d+",
    ),
    Backend(
        chip="cambricon",
        module=_vendor("cambricon"),
        pci=(PciRule("0xcabc"),),
        nodes=r"cambricon_dev\d+",
    ),
    Backend(
        chip="mthreads",
        module=_vendor("mthreads"),
        pci=(PciRule("0x1ed5"),),
        nodes=r"mtgpu\.\d+",
    ),
    Backend(
        chip="metax",
        module=_vendor("metax"),
        # Not a registered vendor id, so alone it proves little: the node decides.
        pci=(PciRule("0x9999"),),
        nodes=r"mxcd",
    ),
    Backend(
        chip="iluvatar",
        module=_vendor("iluvatar"),
        pci=(PciRule("0x1e3e"),),
        nodes=r"iluvatar\d+",
    ),
    Backend(
        chip="kunlunxin",
        module=_vendor("kunlunxin"),
        # P800 calls itself a communication controller; the same vendor's cloud disks are of other classes.
        pci=(PciRule("0x1d22", frozenset({"0780", "1200"})), PciRule("0x2057", frozenset({"1200"}))),
        nodes=r"xpuctrl",
        shared_nodes=r"xpu\d+",
    ),
    Backend(
        chip="hygon",
        module=_vendor("hygon"),
        # Every host with a Hygon processor is full of this vendor's bridges.
        pci=(PciRule("0x1d94", frozenset({"0b40", "0302", "0380"})),),
        nodes=r"mkfd",
        shared_nodes=r"kfd",
    ),
    Backend(
        chip="tsingmicro",
        module=_vendor("tsingmicro"),
        nodes=r"accel_drv_mgr",
    ),
    Backend(
        chip="enflame",
        module=_vendor("enflame"),
        pci=(PciRule("0x1e36"),),
        nodes=r"gcu\d+",  # not the codec's gcu0vid0
    ),
    Backend(
        chip="thead",
        module=_vendor("thead"),
        # On every virtual machine of that cloud the vendor's network functions are here too.
        pci=(PciRule("0x1ded", frozenset({"0302"})),),
        nodes=r"alixpu_ppu\d+",
    ),
    Backend(
        chip="gaudi",
        module=_vendor("gaudi"),
        pci=(PciRule("0x1da3"),),
        nodes=r"hl\d+",
        shared_nodes=r"accel/accel\d+",
        numbered_by="physical_index",
    ),
    Backend(
        chip="amd",
        module=_vendor("amd"),
        pci=(PciRule("0x1002", ACCELERATORS),),
        shared_nodes=r"kfd",
        also=_amd_without_bus,
    ),
    Backend(
        chip="intel",
        module=_vendor("intel"),
        # 00:02.0 is the graphics inside the processor of every desktop: no accelerator to plan for.
        pci=(
            PciRule(
                "0x8086",
                _DISPLAY,
                not_addresses=frozenset({"0000:00:02.0"}),
                drivers=frozenset({"xe", "i915"}),
            ),
        ),
        shared_nodes=r"dri/renderD\d+",
    ),
    Backend(chip="mps", module=_vendor("apple"), also=_apple),
)
"""Every built-in chip but the processor, which is what remains when none of them is here."""
