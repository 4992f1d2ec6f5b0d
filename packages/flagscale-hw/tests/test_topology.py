"""Links between devices: read from matrices by their header, or from the bus; islands and groups from
them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flagscale_hw import cli, detect
from flagscale_hw.host import Host
from flagscale_hw.testing import Faults, fake_host, faked_host, write_host
from flagscale_hw.topology import Topology, is_fast, parse_matrix, topology

# Beside the checkout; an installed copy of these tests may lie less deep than that.
CAPTURED = Path(*Path(__file__).parts[:-5], "shared/fixtures/hw")
"""Outputs of real tools, beside the checkout where they are kept."""

PAIRS = """
        GPU0    GPU1    GPU2    GPU3    mlx5_x  CPU Affinity
GPU0     X      NV1     SYS     SYS     0-7
GPU1    NV1      X      SYS     SYS     0-7
GPU2    SYS     SYS      X      NV1     8-15
GPU3    SYS     SYS     NV1      X      8-15
"""
NICS = (
    "\tGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV12\tPXB\tSYS\t0-63,128-191\t0\t\tN/A\n"
    "GPU1\tNV12\t X \tSYS\tPIX\t0-63,128-191\t0\t\tN/A\n"
    "NIC0\tPXB\tSYS\t X \tSYS\t\t\t\t\n"
    "NIC1\tSYS\tPIX\tSYS\t X \t\t\t\t\n\nNIC Legend:\n\n  NIC0: mlx5_0\n  NIC1: mlx5_bond_0\n"
)
AMD = """
================================= Hops between two GPUs ==================================
       GPU0         GPU1
GPU0   0            1
GPU1   1            0

=============================== Link Type between two GPUs ===============================
       GPU0         GPU1
GPU0   0            XGMI
GPU1   XGMI         0
"""


def test_a_matrix_is_read_by_its_header():
    links, nics = parse_matrix(PAIRS)
    assert links[0] == ("X", "NV1", "SYS", "SYS")
    assert links[3] == ("SYS", "SYS", "NV1", "X")
    assert nics == {}


def test_network_cards_are_named_as_programs_name_them():
    links, nics = parse_matrix(NICS)
    assert links == (("X", "NV12"), ("NV12", "X"))
    assert nics == {"mlx5_0": ("PXB", "SYS"), "mlx5_bond_0": ("SYS", "PIX")}


def test_of_several_matrices_the_one_with_words_is_taken():
    assert parse_matrix(AMD)[0] == (("X", "XGMI"), ("XGMI", "X"))


@pytest.mark.parametrize(
    "text", ["", "GPU0\n", "no such command", "\tGPU0\tGPU1\nGPU0\tX\n", "GPU0 GPU1\nGPU0 1 2\nGPU1 2 1"]
)
def test_no_matrix_is_no_answer(text):
    assert parse_matrix(text) == ((), {})


@pytest.mark.parametrize(
    ("file", "devices", "link", "islands"),
    [
        ("nvidia/nvidia-smi-topo-m-A100-8-nics10.txt", 8, "NV12", 1),
        ("nvidia/nvidia-smi-topo-m-nvlink-partial-4.txt", 4, "NV1", 2),
        ("nvidia/nvidia-smi-topo-m-pcie-4.txt", 4, "PHB", 1),
        ("nvidia/nvidia-smi-topo-m-5090-x2-header.txt", 2, "PHB", 1),
        ("metax/mx-smi-topo-m-C500-x8.txt", 8, "MX", 2),
        ("metax/mx-smi-topo-n-C500-x8-nics.txt", 8, "MX", 2),
        ("amd/rocm-smi-showtopo-MI3xx-x8.txt", 8, "XGMI", 1),
        ("amd/rocm-smi-showtopotype-MI250X-8.txt", 8, "XGMI", 1),
    ],
)
def test_captured_matrices(file, devices, link, islands):
    path = CAPTURED / file
    if not path.is_file():
        pytest.skip("the captured outputs are not beside this checkout")
    links, _ = parse_matrix(path.read_text())
    assert len(links) == devices
    assert links[0][1] == link
    made = Topology(indices=tuple(range(devices)), links=links, numa_nodes=(None,) * devices)
    assert len(made.islands) == islands


def made_of(links, numa=None):
    count = len(links)
    return Topology(indices=tuple(range(count)), links=tuple(links), numa_nodes=numa or (None,) * count)


def test_islands_are_linked_to_each_other_as_a_whole():
    links, _ = parse_matrix(PAIRS)
    assert made_of(links).islands == ((0, 1), (2, 3))
    assert made_of(links).tensor_parallel_groups() == {2: ((0, 1), (2, 3))}
    chain = (("X", "NV1", "SYS"), ("NV1", "X", "NV1"), ("SYS", "NV1", "X"))
    assert made_of(chain).islands == ((0, 1), (2,))


def test_without_fast_links_numa_nodes_are_the_islands():
    pcie = tuple(tuple("X" if row == column else "PHB" for column in range(4)) for row in range(4))
    assert made_of(pcie, (0, 0, 1, 1)).islands == ((0, 1), (2, 3))
    assert made_of(pcie).islands == ((0, 1, 2, 3),)
    assert made_of(pcie).tensor_parallel_groups() == {2: ((0, 1), (2, 3)), 4: ((0, 1, 2, 3),)}
    assert made_of(()).islands == ()


def test_what_is_fast():
    words = ("NV18", "HCCS", "XGMI", "MX", "ICN", "SYS", "PIX", "X", "N/A", None)
    assert [word for word in words if is_fast(word)] == ["NV18", "HCCS", "XGMI", "MX", "ICN"]


def test_the_bus_tells_where_no_tool_does():
    with faked_host("enflame", 4) as host:
        found = topology(fake_host("enflame", 4), host, timeout_s=60)
    assert found.source == "bus"
    assert found.links == (
        ("X", "PHB", "SYS", "SYS"),
        ("PHB", "X", "SYS", "SYS"),
        ("SYS", "SYS", "X", "PHB"),
        ("SYS", "SYS", "PHB", "X"),
    )
    assert found.islands == ((0, 1), (2, 3))
    assert [nic.name for nic in found.nics] == ["mlx5_0", "mlx5_1"]
    assert [found.nearest_nics(row) for row in range(4)] == [("mlx5_0",)] * 2 + [("mlx5_1",)] * 2


def test_one_switch_is_nearer_than_several(tmp_path):
    write_host(tmp_path, "enflame", 4)
    bus = tmp_path / "sys/bus/pci/devices"
    machine = detect(Host(tmp_path, {"PATH": "/usr/bin:/bin"}), timeout_s=60)
    places = ["r/s1", "r/s1", "r/s2", "other"]
    for device, place in zip(machine.devices, places, strict=True):
        link = bus / device.pci_bus
        link.unlink()
        link.symlink_to(f"../../../devices/pci0000:00/{place}/{device.pci_bus}")
    found = topology(machine, Host(tmp_path), timeout_s=60)
    assert found.links[0] == ("X", "PIX", "PXB", "PHB")


@pytest.mark.parametrize("faults", [Faults(garbage=True), Faults(exit_code=3, garbage=True)])
def test_a_tool_that_talks_nonsense_leaves_the_bus(tmp_path, faults):
    write_host(tmp_path, "ascend", 2, faults=faults)
    assert topology(fake_host("ascend", 2), Host(tmp_path), timeout_s=60).source == "bus"


def test_nothing_is_known_of_devices_without_a_place(tmp_path):
    machine = fake_host("ascend", 2)
    homeless = replace(
        machine, devices=tuple(replace(one, pci_bus=None, numa_node=None) for one in machine.devices)
    )
    found = topology(homeless, Host(tmp_path))
    assert found.source is None
    assert {link for row in found.links for link in row} == {None}
    assert found.numa_nodes == (None, None)


def test_the_verb(capsys):
    with faked_host("metax", 8):
        assert cli.main(["--timeout", "60", "topo"]) == 0
        text = capsys.readouterr().out
        assert "islands: 0,1,2,3 | 4,5,6,7" in text
        assert "tensor parallel 4: 0,1,2,3 | 4,5,6,7" in text
        assert "links as told by: mx-smi topo -n" in text
        assert "metax 7: nearest network card mlx5_1" in text
        assert cli.main(["--timeout", "60", "topo", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["islands"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with faked_host("cpu"):
        assert cli.main(["topo"]) == 0
        assert capsys.readouterr().out == "no accelerator, so no links\n"


def test_the_graph(capsys):
    with faked_host("metax", 8):
        assert cli.main(["--timeout", "60", "topo", "--dot"]) == 0
    graph = capsys.readouterr().out
    assert graph.startswith("graph topology {")
    assert graph.endswith("}\n")
    assert graph.count("subgraph cluster_") == 2
    assert graph.count("style=bold") == 2 * 6  # four devices in each of two islands, all linked
    assert graph.count("style=dotted") >= 8  # every device has a nearest network card
    assert "PIX" not in graph  # the bus between devices would hide the fast links
    with faked_host("enflame", 2):
        assert cli.main(["--timeout", "60", "topo", "--dot"]) == 0
    assert '"enflame 0" -- "enflame 1" [label=' in capsys.readouterr().out


def test_the_verb_in_a_pipe_is_plain():
    with faked_host("nvidia", 2):
        words = [sys.executable, "-m", "flagscale_hw", "--timeout", "60"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=None)
    assert "\x1b" not in done.stdout
