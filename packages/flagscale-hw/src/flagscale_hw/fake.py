"""Hosts that are not there: a tree of files and tools that the real detection takes for a machine.

    <root>/sys/bus/pci/devices, <root>/dev, <root>/proc     what the kernel would show
    <root>/usr/bin/<tool>                                   a shell script that prints what the tool would

`FLAGSCALE_HW_ROOT=<root>` makes every program that asks `flagscale_hw` see that machine. What the tools
print is in `stubs.py`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flagscale_hw.chips import CHIPS
from flagscale_hw.errors import DetectError, InputError
from flagscale_hw.host import ROOT_VARIABLE, TIMEOUT_VARIABLE
from flagscale_hw.stubs import TOOLS, Answers, Card

__all__ = ["FAKED", "Faults", "environment", "variables", "write_host", "write_tool"]

_NUM_CPUS = 64
_MEMORY_KIB = 512 << 20
_MOST = 64
_PATIENCE_S = "60"


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How the vendor's tools misbehave."""

    hang: bool = False
    """They never answer."""
    garbage: bool = False
    """They print nonsense."""
    slow_s: float = 0.0
    """They take this many seconds."""
    exit_code: int = 0
    """They end with this code, whatever they printed."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """One chip as the kernel and its tools would show it."""

    name: str
    memory_mib: int
    vendor: str | None = None
    """PCI vendor id; None where the chip is not on the bus."""
    device: str = "0x0001"
    kind: str = "0x120000"
    """PCI class, as sysfs writes it."""
    driver: str = ""
    nodes: tuple[str, ...] = ()
    """Device nodes that there are once."""
    node_of_each: str = ""
    uuid: str = "GPU-00000000-0000-0000-0000-{:012d}"
    more: Callable[[Sequence[Card]], Mapping[str, str]] = field(default=lambda _cards: {})
    """Further files: absolute path -> text."""


def _drm(cards: Sequence[Card]) -> dict[str, str]:
    """Return what the kernel's graphics subsystem tells of each card."""
    files: dict[str, str] = {}
    for card in cards:
        folder = f"/sys/bus/pci/devices/{card.address}"
        files |= {
            f"{folder}/mem_info_vram_total": str(card.memory_mib << 20),
            f"{folder}/mem_info_vram_used": "0",
            f"{folder}/gpu_busy_percent": "0",
            f"{folder}/product_name": card.model,
            f"{folder}/unique_id": card.uuid,
            f"{folder}/hwmon/hwmon0/temp1_input": "30000",
            f"{folder}/hwmon/hwmon0/power1_average": "70000000",
        }
    return files


_MODELS: Mapping[str, _Model] = {
    "nvidia": _Model(
        name="NVIDIA H100 80GB HBM3",
        memory_mib=80 << 10,
        vendor="0x10de",
        device="0x2330",
        kind="0x030200",
        driver="nvidia",
        nodes=("nvidiactl", "nvidia-uvm"),
        node_of_each="nvidia{}",
    ),
    "amd": _Model(
        name="AMD Instinct MI300X",
        memory_mib=192 << 10,
        vendor="0x1002",
        device="0x74a1",
        driver="amdgpu",
        nodes=("kfd",),
        node_of_each="dri/renderD{128}",
        uuid="0x{:016x}",
        more=_drm,
    ),
    "ascend": _Model(
        name="910B2",
        memory_mib=64 << 10,
        vendor="0x19e5",
        device="0xd802",
        driver="devdrv_device_driver",
        nodes=("davinci_manager", "devmm_svm", "hisi_hdc"),
        node_of_each="davinci{}",
    ),
    "cambricon": _Model(
        name="MLU370-X8",
        memory_mib=23374,
        vendor="0xcabc",
        device="0x0370",
        driver="cambricon-drv",
        nodes=("cambricon_ctl",),
        node_of_each="cambricon_dev{}",
        uuid="MLU-00000000-0000-0000-0000-{:012d}",
    ),
    "mthreads": _Model(
        name="MTT S5000",
        memory_mib=80 << 10,
        vendor="0x1ed5",
        device="0x0400",
        kind="0x030200",
        driver="mtgpu",
        node_of_each="mtgpu.{}",
        uuid="00000000-0000-0000-0000-{:012d}",
    ),
    "metax": _Model(
        name="MetaX C550",
        memory_mib=64 << 10,
        vendor="0x9999",
        device="0x4001",
        kind="0x038000",
        driver="metax",
        nodes=("mxcd", "mxgd"),
    ),
    "iluvatar": _Model(
        name="Iluvatar BI-V150",
        memory_mib=32 << 10,
        vendor="0x1e3e",
        device="0x0003",
        kind="0x030200",
        driver="iluvatar-itr",
        nodes=("itrctl",),
        node_of_each="iluvatar{}",
    ),
    "kunlunxin": _Model(
        name="P800 OAM",
        memory_mib=96 << 10,
        vendor="0x1d22",
        device="0x3688",
        kind="0x078000",
        driver="kunlun",
        nodes=("xpuctrl",),
        node_of_each="xpu{}",
        uuid="02K00X{:010d}",
    ),
    "hygon": _Model(
        name="K100_AI",
        memory_mib=65520,
        vendor="0x1d94",
        device="0x6210",
        kind="0x0b4000",
        driver="hydcu",
        nodes=("kfd", "mkfd"),
        node_of_each="dri/renderD{128}",
        uuid="{:016x}",
    ),
    "tsingmicro": _Model(
        name="TX81", memory_mib=64 << 10, nodes=("accel_drv_mgr",), node_of_each="accel/dev-{}"
    ),
    "enflame": _Model(
        name="S60",
        memory_mib=42976,
        vendor="0x1e36",
        device="0xc035",
        driver="enflame",
        node_of_each="gcu{}",
        uuid="TR0000{:08d}",
    ),
    "thead": _Model(
        name="PPU-ZW810E",
        memory_mib=96 << 10,
        vendor="0x1ded",
        device="0x6001",
        kind="0x030200",
        driver="alixpu",
        nodes=("alixpu", "alixpu_ctl"),
        node_of_each="alixpu_ppu{}",
    ),
    "gaudi": _Model(
        name="HL-225",
        memory_mib=96 << 10,
        vendor="0x1da3",
        device="0x1020",
        driver="habanalabs",
        node_of_each="accel/accel{}",
    ),
    "intel": _Model(
        name="Intel(R) Data Center GPU Max 1550",
        memory_mib=128 << 10,
        vendor="0x8086",
        device="0x0bd5",
        kind="0x038000",
        driver="xe",
        node_of_each="dri/renderD{128}",
    ),
}

FAKED: tuple[str, ...] = (*(chip for chip in CHIPS if chip in _MODELS), "cpu")
"""The chips that a tree of files can show. A Mac's is told by its kernel and not by files."""


def write_host(root: Path, chip: str, count: int = 0, *, faults: Faults | None = None) -> None:
    """Write the files of a host with `count` idle, identical devices.

    Args:
        root: the directory to write into; it may be there already.
        chip: one of `FAKED`.
        count: number of devices; 0 for `cpu`.
        faults: how the vendor's tools misbehave.

    Raises:
        DetectError: the chip cannot be faked.
        InputError: the count does not fit the chip.
    """
    if chip not in FAKED:
        raise DetectError(f"chip {chip!r}: cannot be faked: use one of {', '.join(FAKED)}")
    if (chip == "cpu") != (count == 0) or not 0 <= count <= _MOST:
        raise InputError(
            f"fake host {chip!r} with {count} devices: give 0 for `cpu` and 1 to {_MOST} for other chips"
        )
    _write_computer(root)
    if chip != "cpu":
        model = _MODELS[chip]
        cards = [_card(model, index, count) for index in range(count)]
        _write_devices(root, model, cards)
        if chip in TOOLS:
            tool = TOOLS[chip]
            write_tool(root, tool.path, tool.answers(cards), faults or Faults())


def variables(root: Path, faults: Faults | None = None) -> dict[str, str]:
    """Return what makes programs see the host below `root`.

    A script that only prints cannot hang, but on a busy machine it starts slowly, so it gets longer than a
    person would wait for a real tool. Tools that are to be late are cut off as real ones are.
    """
    shown = {ROOT_VARIABLE: str(root.resolve())}
    if faults is None or not (faults.hang or faults.slow_s):
        shown[TIMEOUT_VARIABLE] = os.environ.get(TIMEOUT_VARIABLE) or _PATIENCE_S
    return shown


@contextmanager
def environment(shown: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, and so of those that it starts, until the block ends."""
    before = {name: os.environ.get(name) for name in shown}
    os.environ.update(shown)
    try:
        yield
    finally:
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


@dataclass(frozen=True)
class _Function:
    """One PCI function, as sysfs writes it."""

    address: str
    vendor: str
    device: str
    kind: str
    driver: str
    numa_node: int


def _write_devices(root: Path, model: _Model, cards: Sequence[Card]) -> None:
    for card in cards if model.vendor else ():
        ids = (model.vendor or "", model.device, model.kind)
        _write_function(root, _Function(card.address, *ids, model.driver, card.numa_node))
    for node in model.nodes:
        _write(root, f"/dev/{node}", "")
    for card in cards if model.node_of_each else ():
        _write(root, f"/dev/{_node(model.node_of_each, card.index)}", "")
    for path, text in model.more(cards).items():
        _write(root, path, text)


def _card(model: _Model, index: int, count: int) -> Card:
    """Return one of `count` cards: the first half sits on one NUMA node, the rest on another."""
    half = (count + 1) // 2
    bus = index + 1 if index < half else index - half + 0x81
    return Card(
        index=index,
        model=model.name,
        memory_mib=model.memory_mib,
        address=f"0000:{bus:02x}:00.0",
        uuid=model.uuid.format(index),
        numa_node=0 if index < half else 1,
    )


def _node(form: str, index: int) -> str:
    """Fill in the number of a device; the graphics subsystem begins at 128."""
    return form.replace("{128}", str(128 + index)).replace("{}", str(index))


def _write(root: Path, absolute: str, text: str) -> None:
    path = root / absolute.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _write_computer(root: Path) -> None:
    cpus = "".join(f"processor\t: {number}\nmodel name\t: Fake CPU\n\n" for number in range(_NUM_CPUS))
    files = {
        "/etc/hostname": "fake\n",
        "/etc/os-release": 'PRETTY_NAME="Faked Linux"\n',
        "/proc/cpuinfo": cpus,
        "/proc/meminfo": f"MemTotal:       {_MEMORY_KIB} kB\n",
        "/proc/sys/kernel/osrelease": "6.1.0-fake\n",
        "/sys/devices/system/node/node0/cpulist": "0-31\n",
        "/sys/devices/system/node/node1/cpulist": "32-63\n",
        "/dev/null": "",
    }
    for path, text in files.items():
        _write(root, path, text)
    for node, address in enumerate(("0000:20:00.0", "0000:a0:00.0")):
        _write_function(root, _Function(address, "0x15b3", "0x101b", "0x020700", "mlx5_core", node))
        _link(root, f"/sys/class/infiniband/mlx5_{node}/device", f"../../../bus/pci/devices/{address}")


def _write_function(root: Path, function: _Function) -> None:
    """Write one PCI function, behind a bridge of its own."""
    bus, cpus = (0, "0-31") if function.numa_node == 0 else (0x80, "32-63")
    slot = int(function.address[5:7], 16) % 32
    folder = f"/sys/devices/pci0000:{bus:02x}/0000:{bus:02x}:{slot:02x}.0/{function.address}"
    texts = {
        "vendor": function.vendor,
        "device": function.device,
        "class": function.kind,
        "numa_node": str(function.numa_node),
        "local_cpulist": cpus,
    }
    for name, text in texts.items():
        _write(root, f"{folder}/{name}", f"{text}\n")
    _link(root, f"{folder}/driver", f"../../../../bus/pci/drivers/{function.driver}")
    _link(
        root,
        f"/sys/bus/pci/devices/{function.address}",
        f"../../../devices{folder.removeprefix('/sys/devices')}",
    )


def _link(root: Path, absolute: str, target: str) -> None:
    path = root / absolute.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


_GARBAGE = "\\377\\376{{{ ===|||=== 0x9999999999999999 %%%% NaN NaN -1 -1\\n"


def write_tool(root: Path, absolute: str, answers: Answers, faults: Faults) -> None:
    """Write a shell script that answers as a vendor's tool does.

    Args:
        root: of the host.
        absolute: where the tool is installed.
        answers: what it says to which words.
        faults: how it misbehaves.
    """
    name = Path(absolute).name
    kept = f"/usr/share/flagscale-hw-fake/{name}"
    lines = ["#!/bin/sh", "# made by `flagscale-hw fake`", f'here="${{0%{absolute}}}{kept}"']
    if faults.hang:
        lines.append("exec sleep 86400")
    if faults.slow_s:
        lines.append(f"sleep {faults.slow_s:g}")
    if faults.garbage:
        lines += [f"printf {shlex.quote(_GARBAGE)}", f"exit {faults.exit_code}"]
    lines += [
        'case "$*" in',
        *_cases(root, kept, answers),
        '*) echo "unknown words: $*" >&2; exit 2 ;;',
        "esac",
    ]
    _write(root, absolute, "\n".join([*lines, f"exit {faults.exit_code}"]) + "\n")
    (root / absolute.lstrip("/")).chmod(0o755)


def _cases(root: Path, kept: str, answers: Answers) -> list[str]:
    cases = []
    for number, (words, text) in enumerate(answers.fixed.items()):
        _write(root, f"{kept}/{number}", text)
        # A star stands for any other words, which a quoted pattern would not allow.
        pattern = words if words.startswith("*") else shlex.quote(words)
        cases.append(f'{pattern}) cat "$here/{number}" ;;')
    for words, (file_name, text) in (answers.writes or {}).items():
        _write(root, f"{kept}/{file_name}", text)
        cases.append(f'{shlex.quote(words)}) cp "$here/{file_name}" {shlex.quote(file_name)} ;;')
    if answers.columns:
        cases.append(_query_case(root, kept, answers))
    return cases


def _query_case(root: Path, kept: str, answers: Answers) -> str:
    """Return the case that prints the columns which are asked for, in that order, as NVIDIA's tool does."""
    for title, cells in (answers.columns or {}).items():
        unit = {"memory.total": " [MiB]", "memory.used": " [MiB]", "power.draw": " [W]"}.get(title, "")
        _write(root, f"{kept}/column.{title}", "\n".join([f"{title}{unit}", *cells]) + "\n")
    return f"""{answers.query}=*)
  asked=$(printf '%s' "$1" | cut -d= -f2 | tr ',' ' ')
  files=
  for column in $asked; do
    if [ ! -f "$here/column.$column" ]; then
      echo "Field \\"$column\\" is not a valid field to query."
      exit 2
    fi
    files="$files $here/column.$column"
  done
  table=$(paste -d '#' $files | sed 's/#/, /g')
  case "$*" in *noheader*) table=$(printf '%s\\n' "$table" | sed 1d) ;; esac
  case "$*" in *nounits*) table=$(printf '%s\\n' "$table" | sed 's/ \\(MiB\\|W\\|%\\)\\(,\\|$\\)/\\2/g') ;;
  esac
  printf '%s\\n' "$table" ;;"""
