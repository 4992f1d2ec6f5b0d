"""What software runs on a chip: one row per chip.

What does not live here: finding chips (`detection.py`), selecting devices (`environment.py`), the variables
of the FlagOS plug-ins (`flagos.py`).

Where the rows come from: gpustack-runtime `envs.py` and its container recipes (variables and nodes), the
platform classes of flagos-ai/Megatron-LM-FL, TransformerEngine-FL, vllm-plugin-FL and sglang-plugin-FL (their
names of vendors), FlagCX's adaptors, accelerate (torch devices), Ray's "Accelerator Support" page, the device
plug-ins of the vendors and Project-HAMi (Kubernetes resources), and the entry points that the vLLM plug-ins
declare. A name that no source gives is None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from flagscale_hw.errors import DetectError

__all__ = ["CHIPS", "Container", "Runtime", "Vllm", "runtime"]


@dataclass(frozen=True, kw_only=True)
class Vllm:
    """How vLLM comes to run on a chip."""

    comes_from: Literal["vllm", "plug-in", "vendor build"]
    """`vllm`: its own platform; `plug-in`: an installed entry point; `vendor build`: a vLLM patched by the
    vendor.
    """
    entry_point: str | None = None
    """Name in the entry-point group `vllm.platform_plugins`."""
    distribution: str | None = None
    """What to install for it."""

    @property
    def plugins(self) -> str | None:
        """Return what `VLLM_PLUGINS` must be; None: leave it alone.

        It names the plug-ins of every group that may load. A vendor's platform needs its further plug-ins
        (operators, models) too, so only FlagOS', which is one, is named.
        """
        return self.entry_point if self.entry_point == "fl" else None


@dataclass(frozen=True, kw_only=True)
class Container:
    """What gives a container its devices."""

    variable: str | None = None
    """Variable that the vendor's container runtime reads. None: there is none, or sources contradict each
    other.
    """
    runtime: str | None = None
    """Name of that runtime, for `docker run --runtime`."""
    uses_gpus_option: bool = False
    """Whether `docker run --gpus` is the way."""
    nodes: tuple[str, ...] = ()
    """Device nodes to pass by hand where there is no runtime."""
    node_of_each: str | None = None
    """Node of one device, with `{}` for its number, where devices can be passed one by one."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How frameworks call one chip. None: there is no such thing, or no source names it."""

    chip: str
    title: str
    """For people: `Huawei Ascend`."""
    torch_device: str
    """Device type in torch: `cpu`, `cuda`, `npu`, ..."""
    torch_module: str | None = None
    """Module whose import registers the device type; None where torch itself has it."""
    collective_backend: str
    """Backend of torch.distributed: `gloo`, `nccl`, ..."""
    collective_library: str | None = None
    """The library behind that name: several bring their own under the name `nccl`."""
    flagcx_adaptor: str | None = None
    """Value of `FLAGCX_ADAPTOR` when FlagCX is built for the chip."""
    vllm: Vllm
    vllm_fl_vendor: str | None = None
    """The chip in vllm-plugin-FL's dispatch; None where that plug-in does not run."""
    sglang_fl_vendor: str | None = None
    """The chip in sglang-plugin-FL's dispatch."""
    megatron_vendor: str | None = None
    """The chip in Megatron-LM-FL, as `MG_FL_PREFER` takes it."""
    te_vendor: str | None = None
    """The chip in TransformerEngine-FL, as `TE_FL_ALLOW_VENDORS` takes it."""
    te_prefer: Literal["flagos", "vendor", "reference"] = "flagos"
    """Which kind of operators FlagOS itself prefers for the chip."""
    ray_resource: str | None = None
    kubernetes_resource: str | None = None
    visible_devices_variable: str | None = None
    """Environment variable that selects devices for a process; None where there is nothing to select."""
    outer_devices_variable: str | None = None
    """Variable that is applied first: numbers in the other one then count within its selection."""
    device_order: tuple[str, str] | None = None
    """Variable and value that make the runtime number devices as the driver does."""
    settings: tuple[tuple[str, str], ...] = ()
    """Further variables that FlagOS sets wherever it runs on this chip."""
    container: Container = Container()

    @property
    def trains_with(self) -> Literal["megatron-core", "megatron-lm-fl"] | None:
        """Tell which Megatron has a platform for the chip; None when neither has one."""
        if self.torch_device in ("cpu", "cuda"):
            return "megatron-core"
        return "megatron-lm-fl" if self.megatron_vendor else None

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return {**asdict(self), "settings": dict(self.settings), "trains_with": self.trains_with}


_DRI = "/dev/dri"
_KFD = "/dev/kfd"
_IN_VLLM = Vllm(comes_from="vllm")
_VENDOR_BUILD = Vllm(comes_from="vendor build")

_ROWS = (
    Runtime(
        chip="nvidia",
        title="NVIDIA",
        torch_device="cuda",
        collective_backend="nccl",
        collective_library="NCCL",
        flagcx_adaptor="nvidia",
        vllm=_IN_VLLM,
        vllm_fl_vendor="cuda",
        sglang_fl_vendor="cuda",
        megatron_vendor="cuda",
        te_vendor="cuda",
        ray_resource="GPU",
        kubernetes_resource="nvidia.com/gpu",
        visible_devices_variable="CUDA_VISIBLE_DEVICES",
        # CUDA's own order is fastest first, which differs from the driver's on mixed hosts.
        device_order=("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        container=Container(variable="NVIDIA_VISIBLE_DEVICES", runtime="nvidia", uses_gpus_option=True),
    ),
    Runtime(
        chip="amd",
        title="AMD",
        torch_device="cuda",
        collective_backend="nccl",
        collective_library="RCCL",
        flagcx_adaptor="amd",
        vllm=_IN_VLLM,
        te_prefer="reference",
        ray_resource="GPU",
        kubernetes_resource="amd.com/gpu",
        visible_devices_variable="HIP_VISIBLE_DEVICES",
        outer_devices_variable="ROCR_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        container=Container(variable="AMD_VISIBLE_DEVICES", runtime="amd", nodes=(_KFD, _DRI)),
    ),
    Runtime(
        chip="ascend",
        title="Huawei Ascend",
        torch_device="npu",
        torch_module="torch_npu",
        collective_backend="hccl",
        collective_library="HCCL",
        flagcx_adaptor="ascend",
        vllm=Vllm(comes_from="plug-in", entry_point="ascend", distribution="vllm-ascend"),
        vllm_fl_vendor="ascend",
        sglang_fl_vendor="ascend",
        megatron_vendor="npu",
        te_vendor="npu",
        ray_resource="NPU",
        kubernetes_resource="huawei.com/Ascend910",
        visible_devices_variable="ASCEND_RT_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        container=Container(
            variable="ASCEND_VISIBLE_DEVICES",
            runtime="ascend",
            nodes=("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"),
            node_of_each="/dev/davinci{}",
        ),
    ),
    Runtime(
        chip="cambricon",
        title="Cambricon MLU",
        torch_device="mlu",
        torch_module="torch_mlu",
        collective_backend="cncl",
        collective_library="CNCL",
        flagcx_adaptor="cambricon",
        vllm=Vllm(comes_from="plug-in", distribution="vllm-mlu"),
        sglang_fl_vendor="cambricon",
        megatron_vendor="mlu",
        ray_resource="GPU",
        kubernetes_resource="cambricon.com/mlu",
        visible_devices_variable="MLU_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        container=Container(
            variable="CAMBRICON_VISIBLE_DEVICES",
            nodes=("/dev/cambricon_ctl",),
            node_of_each="/dev/cambricon_dev{}",
        ),
    ),
    Runtime(
        chip="mthreads",
        title="Moore Threads",
        torch_device="musa",
        torch_module="torch_musa",
        collective_backend="mccl",
        collective_library="MUSACCL",
        flagcx_adaptor="musa",
        vllm=Vllm(comes_from="plug-in", entry_point="musa", distribution="vllm-musa"),
        vllm_fl_vendor="musa",
        sglang_fl_vendor="musa",
        megatron_vendor="musa",
        te_vendor="musa",
        ray_resource="GPU",
        kubernetes_resource="mthreads.com/gpu",
        visible_devices_variable="MUSA_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        container=Container(
            variable="MTHREADS_VISIBLE_DEVICES",
            runtime="mthreads",
            nodes=(_DRI,),
            node_of_each="/dev/mtgpu.{}",
        ),
    ),
    Runtime(
        chip="metax",
        title="MetaX",
        torch_device="cuda",
        collective_backend="nccl",
        collective_library="MCCL",
        flagcx_adaptor="metax",
        vllm=Vllm(comes_from="plug-in", entry_point="metax", distribution="vllm-metax"),
        vllm_fl_vendor="metax",
        sglang_fl_vendor="metax",
        megatron_vendor="metax",
        te_vendor="metax",
        ray_resource="GPU",
        kubernetes_resource="metax-tech.com/gpu",
        visible_devices_variable="CUDA_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        # METAX_VISIBLE_DEVICES is set by one public project and banned by another: nodes are what both
        # accept.
        container=Container(nodes=("/dev/mxcd", _DRI)),
    ),
    Runtime(
        chip="iluvatar",
        title="Iluvatar CoreX",
        torch_device="cuda",
        collective_backend="nccl",
        collective_library="IXCCL",
        flagcx_adaptor="iluvatar_corex",
        vllm=_VENDOR_BUILD,
        vllm_fl_vendor="iluvatar",
        sglang_fl_vendor="iluvatar",
        megatron_vendor="iluvatar",
        te_vendor="iluvatar",
        ray_resource="GPU",
        kubernetes_resource="iluvatar.com/gpu",
        visible_devices_variable="CUDA_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        container=Container(
            variable="IX_VISIBLE_DEVICES",
            runtime="iluvatar",
            nodes=("/dev/itrctl",),
            node_of_each="/dev/iluvatar{}",
        ),
    ),
    Runtime(
        chip="kunlunxin",
        title="Kunlunxin XPU",
        torch_device="cuda",
        torch_module="torch_xmlir",
        collective_backend="nccl",
        collective_library="XCCL",
        flagcx_adaptor="klx",
        vllm=Vllm(comes_from="plug-in", entry_point="kunlun", distribution="vllm-kunlun"),
        vllm_fl_vendor="kunlunxin",
        sglang_fl_vendor="kunlunxin",
        megatron_vendor="kunlunxin",
        te_vendor="kunlunxin",
        kubernetes_resource="kunlunxin.com/xpu",
        # The stack that torch runs on imitates CUDA and reads its variable (FlagScale, Megatron-LM-FL);
        # what the driver itself reads selects before it.
        visible_devices_variable="CUDA_VISIBLE_DEVICES",
        outer_devices_variable="XPU_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        container=Container(
            variable="CXPU_VISIBLE_DEVICES",
            runtime="xpu",
            nodes=("/dev/xpuctrl",),
            node_of_each="/dev/xpu{}",
        ),
    ),
    Runtime(
        chip="hygon",
        title="Hygon DCU",
        torch_device="cuda",
        collective_backend="nccl",
        collective_library="RCCL",
        flagcx_adaptor="du",
        vllm=_VENDOR_BUILD,
        vllm_fl_vendor="hygon",
        sglang_fl_vendor="hygon",
        te_vendor="hygon",
        ray_resource="GPU",
        kubernetes_resource="hygon.com/dcu",
        visible_devices_variable="HIP_VISIBLE_DEVICES",
        outer_devices_variable="ROCR_VISIBLE_DEVICES",
        settings=(("HSA_FORCE_FINE_GRAIN_PCIE", "1"), ("TE_FL_SKIP_CUDA", "1")),
        # Sources give DCU_VISIBLE_DEVICES and HYGON_VISIBLE_DEVICES: nodes are what both runtimes accept.
        container=Container(nodes=(_KFD, "/dev/mkfd", _DRI)),
    ),
    Runtime(
        chip="tsingmicro",
        title="Tsingmicro",
        torch_device="txda",
        torch_module="torch_txda",
        collective_backend="tccl",
        collective_library="TCCL",
        flagcx_adaptor="tsm",
        vllm=Vllm(comes_from="plug-in", entry_point="fl", distribution="vllm-plugin-fl"),
        vllm_fl_vendor="tsingmicro",
        sglang_fl_vendor="tsingmicro",
        megatron_vendor="txda",
        te_vendor="tsingmicro",
        visible_devices_variable="TXDA_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        container=Container(
            variable="TSINGMICRO_VISIBLE_DEVICES",
            runtime="tsingmicro",
            nodes=("/dev/accel_drv_mgr",),
            node_of_each="/dev/accel/dev-{}",
        ),
    ),
    Runtime(
        chip="enflame",
        title="Enflame GCU",
        torch_device="gcu",
        torch_module="torch_gcu",
        collective_backend="eccl",
        collective_library="ECCL",
        flagcx_adaptor="enflame",
        vllm=Vllm(comes_from="plug-in", entry_point="register_platform_plugins", distribution="vllm-gcu"),
        vllm_fl_vendor="gcu",
        sglang_fl_vendor="enflame",
        megatron_vendor="enflame",
        te_vendor="enflame",
        kubernetes_resource="enflame.com/gcu",
        visible_devices_variable="TOPS_VISIBLE_DEVICES",
        settings=(("TE_FL_SKIP_CUDA", "1"),),
        container=Container(variable="ENFLAME_VISIBLE_DEVICES", node_of_each="/dev/gcu{}"),
    ),
    Runtime(
        chip="thead",
        title="T-Head PPU",
        torch_device="cuda",
        collective_backend="nccl",
        collective_library="PCCL",
        flagcx_adaptor="ppu",
        vllm=_VENDOR_BUILD,
        te_prefer="reference",
        ray_resource="GPU",
        kubernetes_resource="alibabacloud.com/ppu",
        visible_devices_variable="CUDA_VISIBLE_DEVICES",
        settings=(
            ("NVTE_FLASH_ATTN", "0"),
            ("NVTE_FUSED_ATTN", "0"),
            ("NVTE_UNFUSED_ATTN", "1"),
            ("TE_FL_SKIP_CUDA", "1"),
        ),
        container=Container(
            variable="NVIDIA_VISIBLE_DEVICES",
            nodes=("/dev/alixpu", "/dev/alixpu_ctl"),
            node_of_each="/dev/alixpu_ppu{}",
        ),
    ),
    Runtime(
        chip="gaudi",
        title="Intel Gaudi",
        torch_device="hpu",
        torch_module="habana_frameworks.torch",
        collective_backend="hccl",
        collective_library="HCCL",
        vllm=Vllm(comes_from="plug-in", entry_point="hpu", distribution="vllm-gaudi"),
        te_prefer="reference",
        ray_resource="HPU",
        kubernetes_resource="habana.ai/gaudi",
        visible_devices_variable="HABANA_VISIBLE_MODULES",
        container=Container(variable="HABANA_VISIBLE_DEVICES", runtime="habana"),
    ),
    Runtime(
        chip="intel",
        title="Intel GPU",
        torch_device="xpu",
        collective_backend="xccl",
        collective_library="oneCCL",
        vllm=_IN_VLLM,
        te_prefer="reference",
        ray_resource="GPU",
        kubernetes_resource="gpu.intel.com/xe",
        visible_devices_variable="ZE_AFFINITY_MASK",
        container=Container(nodes=(_DRI,)),
    ),
    Runtime(
        chip="mps",
        title="Apple GPU",
        torch_device="mps",
        collective_backend="gloo",
        vllm=Vllm(comes_from="plug-in", entry_point="metal", distribution="vllm-metal"),
        te_prefer="reference",
    ),
    Runtime(
        chip="cpu",
        title="CPU",
        torch_device="cpu",
        collective_backend="gloo",
        vllm=_IN_VLLM,
        te_prefer="reference",
        ray_resource="CPU",
        kubernetes_resource="cpu",
    ),
)
_BY_CHIP = {row.chip: row for row in _ROWS}

CHIPS: tuple[str, ...] = tuple(_BY_CHIP)
"""Every chip that this version knows, the CPU last."""


def runtime(chip: str) -> Runtime:
    """Return how frameworks call a chip.

    Raises:
        DetectError: this version does not know the chip.
    """
    row = _BY_CHIP.get(chip) or _of_plugin(chip)
    if row is None:
        raise DetectError(f"chip {chip!r}: not known: known are {', '.join(sorted(_BY_CHIP))}")
    return row


def _of_plugin(chip: str) -> Runtime | None:
    """Return the row that an installed plug-in gives for its chip; None when there is none.

    Raises:
        DetectError: the plug-in's row cannot be read.
    """
    from flagscale_hw.backend import backends

    given = next((backend.runtime for backend in backends() if backend.chip == chip), None)
    if not given:
        return None
    try:
        return Runtime(
            **{
                "title": chip,
                "te_prefer": "reference",
                **given,
                "chip": chip,
                "vllm": Vllm(**given.get("vllm", {"comes_from": "vendor build"})),
                "container": Container(**given.get("container", {})),
            }
        )
    except TypeError as error:
        raise DetectError(f"chip {chip!r}: the plug-in's `runtime` is not understood: {error}") from None
