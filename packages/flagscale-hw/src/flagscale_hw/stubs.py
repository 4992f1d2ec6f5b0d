"""What the tools of each vendor print on a faked host: written here in the form of the real ones.

Each function gets the cards and returns the answers of one tool. What does not live here: where a faked
host's files lie (`fake.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["TOOLS", "Answers", "Card", "Tool", "matrix"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One invented device, idle."""

    index: int
    model: str
    memory_mib: int
    address: str
    """On the bus, as the kernel writes it."""
    uuid: str
    numa_node: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one tool says."""

    fixed: Mapping[str, str]
    """Words of the command line, as one text -> what is printed."""
    columns: Mapping[str, Sequence[str]] | None = None
    """For a query of columns: title -> one cell per card."""
    query: str = ""
    """The option of that query, such as `--query-gpu`."""
    writes: Mapping[str, tuple[str, str]] | None = None
    """Words of the command line -> name and text of a file that is written where the tool stands."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool of a vendor."""

    path: str
    answers: Callable[[Sequence[Card]], Answers]


_DRIVER = "580.00"


def matrix(cards: Sequence[Card], link: str, *, island: int = 8) -> str:
    """Return the matrix of links that many tools print: `link` within an island, else by NUMA node."""
    names = [f"GPU{card.index}" for card in cards]
    lines = ["\t".join(["", *names, "CPU Affinity", "NUMA Affinity"])]
    for one in cards:
        cells = [_link(one, other, link, island) for other in cards]
        cpus = "0-31" if one.numa_node == 0 else "32-63"
        lines.append("\t".join([f"GPU{one.index}", *cells, cpus, str(one.numa_node)]))
    return "\n".join([*lines, "", "Legend:", "", "  X    = Self"]) + "\n"


def _link(one: Card, other: Card, link: str, island: int) -> str:
    if one is other:
        return "X"
    if one.index // island == other.index // island:
        return link
    return "NODE" if one.numa_node == other.numa_node else "SYS"


def _long(card: Card) -> str:
    """Write the bus id with eight digits of domain, as NVIDIA's and other tools do."""
    return f"0000{card.address.upper()}"


def _csv_columns(cards: Sequence[Card]) -> dict[str, Sequence[str]]:
    return {
        "index": [str(card.index) for card in cards],
        "uuid": [card.uuid for card in cards],
        "name": [card.model for card in cards],
        "memory.total": [f"{card.memory_mib} MiB" for card in cards],
        "memory.used": ["0 MiB" for _ in cards],
        "utilization.gpu": ["0 %" for _ in cards],
        "temperature.gpu": ["30" for _ in cards],
        "power.draw": ["70.00 W" for _ in cards],
        "power.limit": ["700.00 W" for _ in cards],
        "pci.bus_id": [_long(card) for card in cards],
        "driver_version": [_DRIVER for _ in cards],
        "compute_cap": ["9.0" for _ in cards],
        "serial": [f"{1650000000000 + card.index}" for card in cards],
    }


def _nvidia(cards: Sequence[Card]) -> Answers:
    return Answers(
        fixed={"topo -m": matrix(cards, "NV18"), "-L": _list(cards, "GPU {0}: {1} (UUID: {2})")},
        columns=_csv_columns(cards),
        query="--query-gpu",
    )


def _list(cards: Sequence[Card], form: str) -> str:
    return "".join(form.format(card.index, card.model, card.uuid) + "\n" for card in cards)


def _box(head: Sequence[str], titles: Sequence[str], records: Sequence[Sequence[str]]) -> str:
    """Draw the table that nearly every tool draws after nvidia-smi's."""
    width = max(map(len, [*head, *titles, *(line for record in records for line in record)]))
    rule, double = f"+{'-' * width}+", f"+{'=' * width}+"

    def inside(lines: Sequence[str]) -> list[str]:
        return [f"|{line.ljust(width)}|" for line in lines]

    body = [line for record in records for line in (*inside(record), rule)]
    return "\n".join([rule, *inside(head), rule, *inside(titles), double, *body]) + "\n"


def _like_nvidia(unit: str, name: str) -> Callable[[Sequence[Card]], str]:
    """Return a drawer of the table with the titles of nvidia-smi and this vendor's word for a device."""

    def draw(cards: Sequence[Card]) -> str:
        titles = [
            f" {unit:<4} Name        Persistence-M| Bus-Id        Disp.A | Volatile Uncorr. ECC ",
            f" Fan  Temp  Perf  Pwr:Usage/Cap|         Memory-Usage | {unit}-Util  Compute M. ",
        ]
        records = [
            (
                f" {card.index:<4} {card.model:<19} N/A | {_long(card):<17} N/A |                   0  ",
                f" N/A   30C   N/A    70W / 350W | {0:>7}MiB / {card.memory_mib}MiB |     0%           N/A ",
            )
            for card in cards
        ]
        return _box([f" {name}   Driver Version: {_DRIVER} "], titles, records)

    return draw


def _iluvatar(cards: Sequence[Card]) -> Answers:
    titles = [
        " GPU  Name                     | Bus-Id               | Clock-SM  Clock-Mem  ",
        " Fan  Temp  Perf  Pwr:Usage/Cap|      Memory-Usage    | GPU-Util  Compute M. ",
    ]
    records = [
        (
            f" {card.index:<4} {card.model:<24} | {_long(card):<20} | 1500MHz   1600MHz    ",
            f" N/A  30C   P0    70W / 350W    | 0MiB / {card.memory_mib}MiB       | 0%        Default    ",
        )
        for card in cards
    ]
    drawn = _box([f" IX-ML: {_DRIVER}   Driver Version: {_DRIVER} "], titles, records)
    return Answers(
        fixed={"": drawn, "topo -m": matrix(cards, "PHB")}, columns=_csv_columns(cards), query="--query-gpu"
    )


def _thead(cards: Sequence[Card]) -> Answers:
    drawn = _like_nvidia("PPU", "PPU-SMI")(cards)
    columns = _csv_columns(cards)
    return Answers(fixed={"": drawn, "topo -m": matrix(cards, "ICN")}, columns=columns, query="--query-ppu")


def _gaudi(cards: Sequence[Card]) -> Answers:
    drawn = _like_nvidia("AIP", "HL-SMI Version: hl-1.20")(cards)
    asked = "-Q index,module_id,bus_id,memory.used,temperature.aip -f csv,noheader"
    # Modules are not numbered as devices are: here the other way round.
    rows = [f"{card.index}, {len(cards) - 1 - card.index}, {card.address}, 0 MiB, 30 C\n" for card in cards]
    return Answers(fixed={"": drawn, asked: "".join(rows)})


def _ascend(cards: Sequence[Card]) -> Answers:
    titles = [
        " NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)",
        " Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        ",
    ]
    records = [
        (
            (
                f" {card.index:<5} {card.model:<19} | OK            "
                "| 90.0        40                0    / 0             "
            ),
            (
                f" 0                         | {card.address.upper()}  "
                f"| 0           0    / 0          0    / {card.memory_mib}         "
            ),
        )
        for card in cards
    ]
    mapping = [f"{'NPU ID':<30} {'Chip ID':<30} {'Chip Logic ID':<30} Chip Name"]
    for card in cards:
        mapping += [
            f"{card.index:<30} 0                              {card.index:<30} Ascend {card.model}",
            f"{card.index:<30} 1                              -                              Mcu",
        ]
    topo = matrix(cards, "HCCS").replace("GPU", "NPU")
    return Answers(
        fixed={
            "info": _box([" npu-smi 25.2.0                   Version: 25.2.0 "], titles, records),
            "info -m": "\n".join(mapping) + "\n",
            "info -t topo": topo,
        }
    )


def _cambricon(cards: Sequence[Card]) -> Answers:
    titles = [
        " Card  VF  Name       Firmware |               Bus-Id | Util        Ecc-Error ",
        " Fan   Temp      Pwr:Usage/Cap |         Memory-Usage | SR-IOV   Compute-Mode ",
    ]
    records = [
        (
            (
                f" {card.index}     /   {card.model}    v1.1.6 |         {card.address.upper()} "
                "| 0%                  0 "
            ),
            f"  0%   30C         70 W/ 250 W |     0 MiB/ {card.memory_mib} MiB | N/A           Default ",
        )
        for card in cards
    ]
    written = {
        "CnmonInfo": [
            {
                "CardNum": card.index,
                "ProductName": card.model,
                "UUID": card.uuid,
                "PhysicalMemUsage": {"Total": card.memory_mib, "Used": 0},
                "Temperature": {"Chip": 30},
                "Utilization": {"MLUAverage": 0},
            }
            for card in cards
        ]
    }
    return Answers(
        fixed={"": _box([" CNMON v5.10.22                    Driver v5.10.22 "], titles, records)},
        writes={"info -e -m -u -j": ("cnmon_info.json", json.dumps(written))},
    )


def _mthreads(cards: Sequence[Card]) -> Answers:
    rule = "+" + "-" * 67 + "+"
    lines = [
        "-" * 69,
        f"    mthreads-gmi:2.4.1           Driver Version:{_DRIVER}",
        "-" * 69,
        "ID   Name                 |PCIe                |%GPU  Mem",
        "     Device Type   Perf   |Pcie Lane Width     |Temp  MPC Capable",
        "                                               |      ECC Mode",
    ]
    for card in cards:
        lines += [
            rule,
            f"{card.index:<4} {card.model:<21}|{_long(card).lower():<20}|0%    0MiB({card.memory_mib}MiB)",
            "     Physical      P0     |16x(16x)            |30C   YES",
            "                                               |      On-die, EDC",
        ]
    listed = _list(cards, "GPU {0}: {1} (UUID : {2})")
    return Answers(fixed={"": "\n".join([*lines, "-" * 69]) + "\n", "--list-gpus": listed})


def _metax(cards: Sequence[Card]) -> Answers:
    titles = [
        " Board       Name | GPU   Persist-M | Bus-id              | GPU-Util      sGPU-M ",
        " Pwr:Usage/Cap    | Temp       Perf | Memory-Usage        | GPU-State            ",
    ]
    records = [
        (
            (
                f" {card.index}     {card.model} | {card.index}           Off | {card.address}        "
                "| 0%          Disabled "
            ),
            f" 70W / 350W       | 30C          P0 | 0/{card.memory_mib} MiB         | Available            ",
        )
        for card in cards
    ]
    head = [f" MX-SMI 2.2.9         Kernel Mode Driver Version: {_DRIVER} ", " MACA Version: 3.3.0.15 "]
    listed = "".join(
        f"GPU#{card.index}    {card.model.split()[-1]}      {card.address}   Available (UUID: {card.uuid})\n"
        for card in cards
    )
    links = matrix(cards, "MX", island=4)
    return Answers(fixed={"": _box(head, titles, records), "-L": listed, "topo -n": links, "topo -m": links})


def _kunlunxin(cards: Sequence[Card]) -> Answers:
    rows = [
        f"0000{card.address} {card.index} {card.index} {card.uuid} 36 0 0 0 86 1450 1450 1450 1450 1450 1450 "
        f'0 96 0 {card.memory_mib} 0 1.0:2.6:1.39.1.7 "{card.model}" 0 0 0 0 0 0 0 0 0 0\n'
        for card in cards
    ]
    return Answers(fixed={"-m": "".join(rows)})


def _rocm_json(cards: Sequence[Card], *, use: str, is_in_mib: bool) -> str:
    unit, factor = ("MiB", 1) if is_in_mib else ("B", 1 << 20)
    return json.dumps(
        {
            f"card{card.index}": {
                "Device Name": card.model,
                "Card Series": card.model,
                "Unique ID": card.uuid,
                "PCI Bus": card.address.upper(),
                "Average Graphics Package Power (W)": "70.0",
                "Temperature (Sensor edge) (C)": "30.0",
                "Temperature (Sensor junction) (C)": "30.0",
                use: "0",
                f"{'vram' if is_in_mib else 'VRAM'} Total Memory ({unit})": str(card.memory_mib * factor),
                f"{'vram' if is_in_mib else 'VRAM'} Total Used Memory ({unit})": "0",
            }
            for card in cards
        }
    )


def _amd(cards: Sequence[Card]) -> Answers:
    everything = _rocm_json(cards, use="GPU use (%)", is_in_mib=False)
    return Answers(fixed={"--showtopo": _rocm_topology(cards), "*--json*": everything})


def _rocm_topology(cards: Sequence[Card]) -> str:
    heading = "=============================== Link Type between two GPUs ===============================\n"
    return heading + matrix(cards, "XGMI").replace("\tX", "\t0").split("\nLegend", maxsplit=1)[0]


def _hygon(cards: Sequence[Card]) -> Answers:
    return Answers(fixed={"*--json*": _rocm_json(cards, use="DCU use (%)", is_in_mib=True)})


def _tsingmicro(cards: Sequence[Card]) -> Answers:
    lines = ["+-----------------------------------------------+", "| TSM-SMI 1.0   Driver Version: 1.0 |"]
    lines += ["| ID  Name | Bus-Id  Temp  Pwr:Usage/Cap  Memory-Usage  Util |"]
    for card in cards:
        figures = f"{card.address} 30C 70W / 350W 0M / {card.memory_mib}M 0%"
        lines += ["+---------+-------------+", f"| {card.index} {card.model} | {figures} |"]
    return Answers(fixed={"": "\n".join(lines) + "\n"})


def _enflame(cards: Sequence[Card]) -> Answers:
    blocks = []
    for card in cards:
        domain, bus, rest = card.address.split(":")
        device, _, function = rest.partition(".")
        blocks.append(
            f"DEV ID {card.index}\n"
            "    Driver Info\n        Ver                     : 1.4.3.4\n"
            "    Device Info\n"
            f"        Dev Name                : {card.model}\n        Dev UUID                : {card.uuid}\n"
            "        Health                  : True\n"
            "    PCIe Info\n"
            "        Vendor ID               : 1e36\n        Device ID               : c035\n"
            f"        Domain                  : {domain}\n        Bus                     : {bus}\n"
            f"        Dev                     : {device}\n        Func                    : {function}\n"
            "    Power Info\n"
            "        Power Capa              : 300 W\n        Cur Power               : 70 W\n"
            "    Device Mem Info\n"
            f"        Total Size              : {card.memory_mib} MiB\n"
            "        Used Size               : 0 MiB\n"
            "    Temperature Info\n        GCU Temp                : 30 C\n"
        )
    return Answers(fixed={"-q": "".join(blocks)})


def _intel(cards: Sequence[Card]) -> Answers:
    rule = "+-----------+------------------------------------------------------------+"
    head = [rule, "| Device ID | Device Information                                         |", rule]

    def report(card: Card, *, is_whole: bool) -> list[str]:
        facts = [
            "Device Type: GPU",
            f"Device Name: {card.model}",
            "Device State: normal",
            f"SOC UUID: {card.uuid}",
            f"PCI BDF Address: {card.address}",
            *([f"Memory Physical Size: {card.memory_mib}.00 MiB"] if is_whole else []),
        ]
        numbers = [str(card.index), *[""] * (len(facts) - 1)]
        return [*(f"| {number:<9} | {fact:<58} |" for number, fact in zip(numbers, facts, strict=True)), rule]

    fixed = {f"discovery -d {card.index}": _lines([*head, *report(card, is_whole=True)]) for card in cards}
    fixed["discovery"] = _lines([*head, *(line for card in cards for line in report(card, is_whole=False))])
    return Answers(fixed=fixed)


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


TOOLS: Mapping[str, Tool] = {
    "nvidia": Tool(path="/usr/bin/nvidia-smi", answers=_nvidia),
    "amd": Tool(path="/usr/bin/rocm-smi", answers=_amd),
    "ascend": Tool(path="/usr/local/bin/npu-smi", answers=_ascend),
    "cambricon": Tool(path="/usr/bin/cnmon", answers=_cambricon),
    "mthreads": Tool(path="/usr/bin/mthreads-gmi", answers=_mthreads),
    "metax": Tool(path="/usr/bin/mx-smi", answers=_metax),
    "iluvatar": Tool(path="/usr/bin/ixsmi", answers=_iluvatar),
    "kunlunxin": Tool(path="/usr/local/bin/xpu_smi", answers=_kunlunxin),
    "hygon": Tool(path="/usr/bin/hy-smi", answers=_hygon),
    "tsingmicro": Tool(path="/usr/bin/tsm_smi", answers=_tsingmicro),
    "enflame": Tool(path="/usr/bin/efsmi", answers=_enflame),
    "thead": Tool(path="/usr/bin/ppu-smi", answers=_thead),
    "gaudi": Tool(path="/usr/bin/hl-smi", answers=_gaudi),
    "intel": Tool(path="/usr/bin/xpu-smi", answers=_intel),
}
"""The tool that describes each chip; none for those that files alone describe."""
