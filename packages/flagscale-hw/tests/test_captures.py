"""Every capture of a vendor's tool gives the facts that a person reads in it, and damaged ones invent none.

`captures/` holds our own, written after the layouts of the tools. A checkout with `shared/` beside it also
reads the captures of others, in place; `captures/golden.json` has the facts of both.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flagscale_hw.backend import Found
from flagscale_hw.backends import (
    amd,
    apple,
    ascend,
    cambricon,
    enflame,
    gaudi,
    hygon,
    iluvatar,
    intel,
    kunlunxin,
    metax,
    mthreads,
    nvidia,
    nvidia_xml,
    rocm,
    thead,
    tsingmicro,
)
from flagscale_hw.backends.blocks import blocks, pairs
from flagscale_hw.backends.boxes import read_processes
from flagscale_hw.machine import Device

OWN = Path(__file__).parent / "captures"
# Beside the checkout; an installed copy of these tests may lie less deep than that.
SHARED = Path(*Path(__file__).parts[:-5], "shared/fixtures/hw")
GOLDEN = json.loads((OWN / "golden.json").read_text())
SEED = "flagscale"
MUTATIONS = 200

Parser = Callable[[str], Any]


def _of(parse: Callable[[str, str], Found], chip: str) -> Parser:
    return lambda text: parse(chip, text)


def _reported(text: str) -> list[dict[str, str]]:
    """Read the reports that no detection asks for: ECC counters and sensors per device."""
    title = r"GPU#(?P<index>[0-9]+)\s+(?P<name>\S+)\s+(?P<bus>\S+)"
    return [{**block.title.groupdict(), **block.values} for block in blocks(text, title)]


def _processes(text: str) -> list[dict[str, Any]]:
    return [asdict(process) for _, process in read_processes(text) or ()]


# The first pattern that fits a name decides.
PARSERS: tuple[tuple[str, Parser], ...] = (
    ("nvidia-query.txt", nvidia.parse_csv),
    ("nvidia-table.txt", nvidia.parse_table),
    ("nvidia-report.xml", _of(nvidia_xml.parse_xml, "nvidia")),
    ("amd-rocm-smi.json", _of(rocm.parse_json, "amd")),
    ("amd-concise.txt", _of(rocm.parse_concise, "amd")),
    ("amd-list.txt", amd.parse_list),
    ("amd-rocminfo.txt", _of(rocm.parse_rocminfo, "amd")),
    ("ascend-mapping.txt", ascend.parse_mapping),
    ("ascend-*.txt", ascend.parse_table),
    ("cambricon-table.txt", cambricon.parse_table),
    ("cambricon-info.json", cambricon.parse_json),
    ("mthreads-table.txt", mthreads.parse_table),
    ("mthreads-list.txt", mthreads.parse_list),
    ("metax-table*.txt", metax.parse_table),
    ("metax-list.txt", metax.parse_list),
    ("iluvatar-table.txt", iluvatar.parse_table),
    ("iluvatar-query.txt", iluvatar.parse_query),
    ("kunlunxin-machine.txt", kunlunxin.parse_machine),
    ("kunlunxin-report.txt", kunlunxin.parse_report),
    ("kunlunxin-table.txt", kunlunxin.parse_table),
    ("kunlunxin-legacy.txt", kunlunxin.parse_legacy),
    ("hygon-smi.json", _of(rocm.parse_json, "hygon")),
    ("hygon-concise.txt", _of(rocm.parse_concise, "hygon")),
    ("enflame-report.txt", enflame.parse_report),
    ("enflame-table.txt", enflame.parse_table),
    ("thead-table.txt", thead.parse_table),
    ("thead-query.txt", thead.parse_query),
    ("thead-report.txt", thead.parse_report),
    ("gaudi-table.txt", gaudi.parse_table),
    ("gaudi-query.txt", gaudi.parse_query),
    ("intel-discovery.txt", intel.parse_discovery),
    ("tsingmicro-table.txt", tsingmicro.parse_table),
    ("apple-sysctl.txt", apple.parse_sysctl),
    ("ascend/*-process-table-tail*", _processes),
    ("ascend/npu-smi-info-m-*", ascend.parse_mapping),
    ("ascend/npu-smi-info-t-*", pairs),
    ("ascend/npu-smi-info-*", ascend.parse_table),
    ("cambricon/cnmon-*", cambricon.parse_table),
    ("enflame/efsmi-q-*", enflame.parse_report),
    ("enflame/efsmi-*", enflame.parse_table),
    ("hygon/hy-smi-healthcheck-*", hygon.parse_health),
    ("hygon/rocm-smi-json-*", _of(rocm.parse_json, "hygon")),
    ("hygon/rocm-smi-*", _of(rocm.parse_concise, "hygon")),
    ("hygon/rocminfo-*", _of(rocm.parse_rocminfo, "hygon")),
    ("amd/rocm-smi-json-*", _of(rocm.parse_json, "amd")),
    ("amd/rocminfo-*", _of(rocm.parse_rocminfo, "amd")),
    ("amd/amd-smi-list-*", amd.parse_list),
    ("amd/*", _of(rocm.parse_concise, "amd")),
    ("iluvatar/*-csv-*", iluvatar.parse_query),
    ("iluvatar/ixsmi-*", iluvatar.parse_table),
    ("kunlunxin/xpu-smi-q-*", kunlunxin.parse_report),
    ("kunlunxin/xpu_smi-m-*", kunlunxin.parse_machine),
    ("kunlunxin/xpu_smi-*", kunlunxin.parse_legacy),
    ("mthreads/mthreads-gmi-*", mthreads.parse_table),
    ("metax/mx-smi-L-*", metax.parse_list),
    ("metax/mx-smi-count-ecc-*", _reported),
    ("metax/mx-smi-show-temperature-*", _reported),
    ("metax/*", metax.parse_table),
    ("thead/ppu-smi-mig-devices*", thead.parse_slices),
    ("thead/ppu-smi-q-*", thead.parse_report),
    ("thead/ppu-smi-*", thead.parse_table),
    ("intel/hl-smi-*", gaudi.parse_table),
    ("intel/xpu-smi-*", intel.parse_discovery),
    ("nvidia/*.xml", _of(nvidia_xml.parse_xml, "nvidia")),
    ("nvidia/*-csv-*", nvidia.parse_csv),
    ("nvidia/nvidia-smi-procs-*", read_processes),
    ("nvidia/*", nvidia.parse_table),
)

# What another tool made of its own probing, and what belongs to other modules: links between devices are
# read by `topology`, and nothing asks for the last three.
ELSEWHERE = (
    "*/gpustack-runtime-*",
    "*topo*",
    "thead/ppu-smi-icn-*",
    "thead/ppu-smi-dmon*",
    "intel/intel_gpu_top-*",
    "hygon/lspci-*",
)


def _shared_names() -> list[str]:
    return sorted(name for name in GOLDEN if "/" in name)


def _own_names() -> list[str]:
    return sorted(path.name for path in OWN.iterdir() if path.name != "golden.json")


def _text(name: str) -> str:
    path = (SHARED if "/" in name else OWN) / name
    if not path.exists():
        pytest.skip("the captures of others are not beside this checkout")
    text = path.read_text(errors="replace")
    # Long, and read by nobody: damage would hit little else.
    return re.sub(r"<supported_clocks>.*?</supported_clocks>", "", text, flags=re.DOTALL)


def _parser(name: str) -> Parser:
    return next(parse for pattern, parse in PARSERS if fnmatch(name, pattern))


def facts(found: Any) -> Any:
    """Say everything that is known, and nothing that is not."""
    said = found
    if isinstance(found, Found):
        said = {"devices": [_known(asdict(device)) for device in found.devices]}
        if found.problems:
            said["problems"] = [problem.text for problem in found.problems]
    return json.loads(json.dumps(said, default=lambda value: _known(asdict(value))))


def _known(values: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in values.items() if value is not None and name != "chip"}
    for name in ("slices", "health_reasons"):
        if not known.get(name, True):
            del known[name]
    for name in ("slices", "processes"):
        if name in known:
            known[name] = [_known(part) for part in known[name]]
    return known


@pytest.mark.parametrize("name", _own_names())
def test_our_captures_give_their_facts(name):
    assert facts(_parser(name)(_text(name))) == GOLDEN[name]


@pytest.mark.parametrize("name", _shared_names())
def test_captures_of_others_give_their_facts(name):
    assert facts(_parser(name)(_text(name))) == GOLDEN[name]


def test_every_capture_has_facts():
    if not SHARED.is_dir():
        pytest.skip("the captures of others are not beside this checkout")
    there = {str(path.relative_to(SHARED)) for path in SHARED.glob("*/*") if path.suffix != ".source"}
    elsewhere = {name for name in there if any(fnmatch(name, pattern) for pattern in ELSEWHERE)}
    assert there - elsewhere == set(_shared_names())


# Damage. Each kind takes the text and a source of chance.


def _lines(change: Callable[[list[str], random.Random], None]) -> Callable[[str, random.Random], str]:
    def damage(text: str, chance: random.Random) -> str:
        lines = text.split("\n")
        change(lines, chance)
        return "\n".join(lines)

    return damage


def _drop_line(lines: list[str], chance: random.Random) -> None:
    del lines[chance.randrange(len(lines))]


def _double_line(lines: list[str], chance: random.Random) -> None:
    at = chance.randrange(len(lines))
    lines.insert(at, lines[at])


def _swap_lines(lines: list[str], chance: random.Random) -> None:
    at, to = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[at], lines[to] = lines[to], lines[at]


def _swap_cells(lines: list[str], chance: random.Random) -> None:
    for at, line in enumerate(lines):
        mark = "|" if "|" in line else ","
        cells = line.split(mark)
        if len(cells) > 3 and chance.random() < 0.7:
            cells[1], cells[2] = cells[2], cells[1]
            lines[at] = mark.join(cells)


def _swap_words(lines: list[str], chance: random.Random) -> None:
    at = chance.randrange(len(lines))
    words = re.split(r"(\s+)", lines[at])
    if len(words) > 4:
        one, two = (2 * chance.randrange((len(words) + 1) // 2) for _ in range(2))
        words[one], words[two] = words[two], words[one]
        lines[at] = "".join(words)


def _each(pattern: str, *replacements: str, share: float = 0.5) -> Callable[[str, random.Random], str]:
    def damage(text: str, chance: random.Random) -> str:
        return re.sub(
            pattern,
            lambda found: chance.choice(replacements) if chance.random() < share else found[0],
            text,
        )

    return damage


def _garbage(text: str, chance: random.Random) -> str:
    raw = bytearray(text.encode())
    for _ in range(max(1, len(raw) // 60)):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return raw.decode(errors="replace")


def _colours(text: str, chance: random.Random) -> str:
    return re.sub(
        r"\S+",
        lambda found: f"\x1b[3{chance.randrange(8)}m{found[0]}\x1b[0m" if chance.random() < 0.3 else found[0],
        text,
    )


DAMAGE: tuple[Callable[[str, random.Random], str], ...] = (
    lambda text, chance: text[: chance.randrange(len(text))],
    lambda text, chance: text[chance.randrange(len(text)) :],
    lambda text, chance: text + text[: chance.randrange(len(text))],
    _lines(_drop_line),
    _lines(_double_line),
    _lines(_swap_lines),
    _lines(_swap_cells),
    _lines(_swap_words),
    _lines(lambda lines, chance: chance.shuffle(lines)),
    _each(r"[MG]i?B", "GiB", "MB", "KiB", "TB", "XB", "B", ""),
    _each(r"(?<=[0-9])\s*(?:W|C|%)", " mW", " F", " kW", "", " C", " %"),
    _each(r"(?<![\w.])[0-9][0-9.]*(?![\w.])", "N/A", "[N/A]", "-", "ERR!", "[Unknown Error]", "/", ""),
    _each(r"(?<![\w.])[0-9][0-9.]*(?![\w.])", "-1", "99999999999999999999", "1e9", "0x10", "1,5", "٣", "nan"),
    # No zero remains, so every zero that is found was invented.
    lambda text, chance: re.sub(r"(?<![\w.:])0(?:\.0+)?(?![\w.:])", "3", text),
    _each(r"[A-Za-z]{4,}", "显存", "温度", "Ünïcode", "", share=0.2),
    _each(r"\s+", " ", "  ", "\t", share=0.4),
    _each(r"[|:,]", "", "||", ":", share=0.1),
    _garbage,
    _colours,
    lambda text, chance: text.replace("\n", "\r\n"),
)


@pytest.mark.parametrize("name", [*_own_names(), *_shared_names()])
def test_damage_raises_nothing_and_invents_no_number(name):
    text = _text(name)
    parse = _parser(name)
    for number in range(MUTATIONS):
        chance = random.Random(f"{SEED} {name} {number}")
        damaged = DAMAGE[number % len(DAMAGE)](text, chance)
        if chance.random() < 0.3:
            damaged = chance.choice(DAMAGE)(damaged or " ", chance)
        found = parse(damaged)
        if isinstance(found, Found) and found.devices:
            said = Said(damaged)
            for device in found.devices:
                assert said.unsaid(device, len(found.devices)) == [], (number, damaged)


class Said:
    """The numbers and the words of a text, read in the most generous way."""

    UNITS: ClassVar = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

    def __init__(self, text: str) -> None:
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|[\x00\r]", "", text)
        self.plain = plain
        self.lower = plain.lower()
        self.letters = "".join(self.lower.split())
        self.numbers = {float(word) for word in re.findall(r"[0-9]{1,15}(?:\.[0-9]{1,9})?", plain)}
        self.whole = {int(number) for number in self.numbers if number == int(number)}
        named = {
            unit[0].upper() for unit in re.findall(r"(?<![A-Za-z])([KMGT]i?B|B|[KMGT])(?![A-Za-z])", plain)
        }
        # A number without a unit counts in MiB, where a tool's manual says so.
        units = {self.UNITS[unit] for unit in named} | {1, 1 << 20}
        self.bytes = {int(number * unit) for number in self.numbers for unit in units}
        self.watts = self.numbers | {number * 0.001 for number in self.numbers}

    def unsaid(self, device: Device, count: int) -> list[str]:
        """Return the fields of a device that nobody said."""
        wrong = [
            name
            for name in ("utilisation_percent", "temperature_c")
            if getattr(device, name) is not None and getattr(device, name) not in self.numbers
        ]
        for name in ("power_w", "power_limit_w"):
            value = getattr(device, name)
            if value is not None and value not in self.watts:
                wrong.append(name)
        memory = [
            ("memory_total_bytes", device.memory_total_bytes),
            ("memory_used_bytes", device.memory_used_bytes),
        ]
        memory += [("slice", part.memory_total_bytes) for part in device.slices]
        memory += [("process", process.memory_used_bytes) for process in device.processes or ()]
        wrong += [name for name, value in memory if value is not None and value not in self.bytes]
        for name in ("die", "physical_index"):
            value = getattr(device, name)
            if value is not None and value not in self.whole:
                wrong.append(name)
        if device.index not in self.whole and device.index >= count:
            wrong.append("index")
        wrong += [f"pid {process.pid}" for process in device.processes or () if process.pid not in self.whole]
        wrong += [
            name
            for name in ("name", "serial", "driver", "board", "compute_capability", "uuid")
            if "".join((getattr(device, name) or "").lower().split()) not in self.letters
        ]
        if device.pci_bus is not None and not self._has_address(device.pci_bus):
            wrong.append("pci_bus")
        return wrong

    def _has_address(self, bus: str) -> bool:
        _, place, rest = bus.split(":")
        device, function = rest.split(".")
        number = int(place, 16) << 8 | int(device, 16) << 3 | int(function)
        return (
            f"{place}:{device}.{function}" in self.lower
            or number in self.whole
            or all(re.search(rf":\s*0*{int(part, 16):x}\b", self.lower) for part in (place, device, function))
        )
