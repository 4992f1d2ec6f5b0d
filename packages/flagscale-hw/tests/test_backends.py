"""Each vendor's backend from gate to device, with tools that print captures; the traps of the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flagscale_hw.backends import ascend, kunlunxin, metax, nvidia, rocm
from flagscale_hw.backends.values import address, bytes_of, celsius, percent, text_of, watts, whole
from flagscale_hw.machine import Machine

CAPTURES = Path(__file__).parent / "captures"


def _capture(name):
    return (CAPTURES / name).read_text()


@pytest.mark.parametrize(
    ("chip", "tool", "answers", "known"),
    [
        (
            "ascend",
            "npu-smi",
            {"info -m": "ascend-mapping.txt", "info": "ascend-info.txt"},
            ["910B3", "910B3"],
        ),
        ("ascend", "npu-smi", {"info": "ascend-info-a3.txt"}, ["Ascend910", "Ascend910"]),
        ("cambricon", "cnmon", {"": "cambricon-table.txt"}, ["MLU590-M9", "MLU590-M9"]),
        (
            "mthreads",
            "mthreads-gmi",
            {"--list": "mthreads-list.txt", "": "mthreads-table.txt"},
            ["MTT S4000"] * 2,
        ),
        ("metax", "mx-smi", {"-L": "metax-list.txt", "": "metax-table.txt"}, ["MetaX C550", "MetaX C550"]),
        ("metax", "ht-smi", {"-L": "metax-list.txt"}, ["MXC550", "MXC550"]),
        ("iluvatar", "ixsmi", {"": "iluvatar-table.txt"}, ["Iluvatar BI-V150"] * 2),
        ("iluvatar", "ixsmi", {"--query-gpu": "iluvatar-query.txt"}, None),
        ("kunlunxin", "xpu_smi", {"-m": "kunlunxin-machine.txt"}, ["P800 OAM", "K200"]),
        ("kunlunxin", "xpu-smi", {"-q": "kunlunxin-report.txt"}, ["P800 OAM"]),
        ("kunlunxin", "xpu-smi", {"": "kunlunxin-table.txt"}, ["P800 OAM", "P800 OAM"]),
        ("kunlunxin", "xpu_smi", {"": "kunlunxin-legacy.txt"}, ["R200"]),
        ("hygon", "hy-smi", {"--showproductname": "hygon-smi.json"}, ["K100_AI", "K100_AI"]),
        ("hygon", "rocm-smi", {"": "hygon-concise.txt"}, [None, None]),
        ("tsingmicro", "tsm_smi", {"": "tsingmicro-table.txt"}, ["TX81", "TX81"]),
        ("enflame", "efsmi", {"-q": "enflame-report.txt"}, ["L300"]),
        ("enflame", "efsmi", {"": "enflame-table.txt"}, ["L300"]),
        ("thead", "ppu-smi", {"--query": "thead-query.txt", "": "thead-table.txt"}, ["PPU-ZW810E"]),
        ("gaudi", "hl-smi", {"-Q": "gaudi-query.txt", "": "gaudi-table.txt"}, ["HL-325L"]),
        ("gaudi", "hl-smi", {"-Q": "gaudi-query.txt"}, [None, None]),
        ("nvidia", "nvidia-smi", {"-q -x": "nvidia-report.xml", "": "nvidia-query.txt"}, ["NVIDIA H20"] * 2),
    ],
)
def test_a_host_with_the_vendors_tool(tree, chip, tool, answers, known):
    tree.device(chip)
    tree.answers(tool, {arguments: _capture(name) for arguments, name in answers.items()})
    machine = tree.detect()
    assert machine.vendors[0].chip == chip
    if known is None:  # the tool rejects nothing and prints no header: what is not named is not believed
        assert (machine.devices, bool(machine.problems)) == ((), True)
        return
    assert machine.chip == chip
    assert [device.name for device in machine.devices] == known
    assert {device.chip for device in machine.devices} == {chip}
    assert machine.vendors[0].source == "tool"
    assert Machine.from_dict(machine.to_dict()) == machine


@pytest.mark.parametrize(
    "chip",
    [
        "ascend",
        "cambricon",
        "mthreads",
        "metax",
        "iluvatar",
        "kunlunxin",
        "hygon",
        "tsingmicro",
        "enflame",
        "thead",
        "gaudi",
        "nvidia",
    ],
)
def test_hardware_without_its_tool_is_still_listed(tree, chip):
    tree.device(chip)
    machine = tree.detect()
    assert [problem.where for problem in machine.problems] == [chip]
    assert "not found" in machine.problems[0].text


def test_the_bus_names_a_card_that_no_tool_describes(tree):
    tree.write("dev/alixpu_ppu0", "")
    tree.pci("0000:3b:00.0", "0x1ded", "0x030200", "0x6001")
    tree.write("sys/bus/pci/devices/0000:3b:00.0/numa_node", "1\n")
    tree.write("sys/bus/pci/devices/0000:3b:00.0/local_cpulist", "32-63\n")
    machine = tree.detect()
    (device,) = machine.devices
    assert (device.name, device.pci_bus, device.pci_device_id) == ("PPU-ZW810E", "0000:3b:00.0", "0x6001")
    assert (device.numa_node, device.cpu_affinity, device.memory_total_bytes) == (1, "32-63", None)
    assert (device.health, machine.vendors[0].source) == (None, "files")


def test_a_numa_node_that_the_kernel_does_not_know_is_none(tree):
    tree.device("thead")
    tree.pci("0000:3b:00.0", "0x1ded", "0x030200", "0x6001")
    tree.write("sys/bus/pci/devices/0000:3b:00.0/numa_node", "-1\n")
    assert tree.detect().devices[0].numa_node is None


def test_a_card_that_the_tool_leaves_out_is_said(tree):
    tree.device("iluvatar")
    for address_ in ("0000:8a:00.0", "0000:8d:00.0", "0000:91:00.0"):
        tree.pci(address_, "0x1e3e", "0x030200", "0x0003")
    tree.answers("ixsmi", {"": _capture("iluvatar-table.txt")})
    machine = tree.detect()
    assert len(machine.devices) == 2
    (problem,) = machine.problems
    assert "the bus shows 0000:91:00.0 but the driver does not list it" in problem.text


# The traps.


def test_trap_amd_gives_memory_and_busy_for_all_the_rest(tree):
    """A card that sleeps answers EBUSY to everything but its memory: not known, and not 0."""
    folder = "sys/bus/pci/devices/0000:c3:00.0"
    tree.pci("0000:c3:00.0", "0x1002", "0x030000", "0x7590")
    tree.write("dev/kfd", "")
    tree.write(
        "sys/class/kfd/kfd/topology/nodes/1/properties",
        "simd_count 64\nvendor_id 4098\nlocation_id 49920\ndomain 0\n",
    )
    tree.write(f"{folder}/mem_info_vram_total", "17095983104\n")
    tree.write(f"{folder}/mem_info_vram_used", "54403072\n")
    for name in ("gpu_busy_percent", "hwmon/hwmon3/temp1_input", "hwmon/hwmon3/power1_average"):
        (tree.root / folder / name).mkdir(parents=True)  # as a file that cannot be read
    tree.tool(
        "echo 'ERROR:root:Driver not initialized (amdgpu not found in modules)' >&2; exit 1", "rocm-smi"
    )
    machine = tree.detect()
    (device,) = machine.devices
    assert (device.memory_total_bytes, device.memory_used_bytes) == (17095983104, 54403072)
    assert (device.utilisation_percent, device.temperature_c, device.power_w) == (None, None, None)
    assert (machine.problems, machine.vendors[0].source) == ((), "files")


def test_trap_amd_tools_that_deny_a_driver_which_is_there(tree):
    folder = "sys/bus/pci/devices/0000:05:00.0"
    tree.pci("0000:05:00.0", "0x1002", "0x120000", "0x74a1")
    tree.write("dev/kfd", "")
    tree.write(
        "sys/class/kfd/kfd/topology/nodes/2/properties",
        "simd_count 1216\nvendor_id 4098\nlocation_id 1280\ndomain 0\n",
    )
    tree.write("sys/class/kfd/kfd/topology/nodes/0/properties", "simd_count 0\nvendor_id 4098\n")
    tree.write(f"{folder}/mem_info_vram_total", "206141652992\n")
    tree.write(f"{folder}/gpu_busy_percent", "64\n")
    tree.write(f"{folder}/unique_id", "1f2e3d4c5b6a7988\n")
    tree.write(f"{folder}/hwmon/hwmon1/temp1_input", "47000\n")
    tree.write(f"{folder}/hwmon/hwmon1/power1_average", "139000000\n")
    tree.answers("rocm-smi", {"--showproductname": _capture("amd-rocm-smi.json")})
    (device,) = tree.detect().devices
    assert (device.name, device.uuid) == ("AMD Instinct MI300X OAM", "0x1f2e3d4c5b6a7988")
    assert (device.utilisation_percent, device.temperature_c, device.power_w) == (64.0, 47.0, 139.0)
    assert device.power_limit_w == 750.0  # only the tool tells


def test_trap_amd_name_may_be_only_a_device_id():
    first, second = rocm.parse_json("amd", _capture("amd-rocm-smi.json")).devices
    assert (second.name, second.pci_device_id) == (None, "0x74a1")
    assert first.name == "AMD Instinct MI300X OAM"


def test_trap_power_of_xpu_smi_counts_in_watts_or_in_milliwatts(tree):
    tree.device("kunlunxin")
    tree.answers("xpu_smi", {"-m": _capture("kunlunxin-machine.txt").replace("K200", "R480")})
    p800, other = tree.detect().devices
    assert (p800.power_w, other.power_w) == (212.0, None)  # of other models nobody said
    tree.answers("xpu_smi", {"-m": _capture("kunlunxin-machine.txt")})
    assert tree.detect().devices[1].power_w == 87.0


def test_trap_words_of_xpu_smi_that_moved_are_not_believed():
    line = _capture("kunlunxin-machine.txt").splitlines()[0]
    assert len(kunlunxin.parse_machine(line).devices) == 1
    swapped = line.replace("60123 98304", "98304 60123")  # more used than there is
    assert kunlunxin.parse_machine(swapped).devices == ()
    assert kunlunxin.parse_machine(line.replace(" 77 ", " 177 ")).devices == ()
    assert kunlunxin.parse_machine(line.replace("5 96 ", "")).devices == ()
    assert kunlunxin.parse_machine(line.replace('"', "")).devices == ()


def test_trap_a_driver_that_refuses_this_user_is_not_an_absent_chip(tree):
    tree.device("ascend")
    tree.pci("0000:c1:00.0", "0x19e5", "0x120000", "0xd802")
    text = "DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\ndcmi module initialize failed. ret is -8005\n"
    tree.tool(f"printf '{text}'; exit 255", "npu-smi")
    machine = tree.detect()
    assert (machine.chip, len(machine.devices)) == ("ascend", 1)
    (problem,) = machine.problems
    assert "ret is -8005" in problem.text
    assert "refuses this user" in problem.hint


def test_trap_three_numbers_of_an_npu(tree):
    """The mapping decides which card has which logic id, whatever order the table has."""
    tree.device("ascend")
    mapping = "NPU ID  Chip ID  Chip Logic ID  Chip Name\n2  0  1  Ascend 910B3\n5  0  0  Ascend 910B3\n"
    tree.answers("npu-smi", {"info -m": mapping, "info": _capture("ascend-info.txt")})
    assert [(device.board, device.index) for device in tree.detect().devices] == [("2", 1), ("5", 0)]


def test_trap_910b3_says_nothing_of_its_server_and_910b4_1_is_no_910b4():
    table = _capture("ascend-info.txt").replace("910B3  ", "910B4-1")
    assert [device.name for device in ascend.parse_table(table).devices] == ["910B4-1", "910B4-1"]


def test_trap_two_dies_of_a_card_with_one_power(tree):
    tree.device("ascend")
    tree.answers("npu-smi", {"info": _capture("ascend-info-a3.txt")})
    first, second = tree.detect().devices
    assert (first.board, first.die, first.index, first.power_w) == ("3", 0, 6, 165.2)
    assert (second.board, second.die, second.index, second.power_w) == ("3", 1, 7, None)


def test_trap_950pr_has_other_columns_and_titles_without_gaps():
    text = """\
+--------+------------------+---------------+-----------------------------------------------------+
| NPU ID | Name             | Health        | Power(W)    Temp(C)           Hugepages-Usage(page) |
|        |                  | Bus-Id        | NPU Util(%) Memory-Usage(MB)  HBM-Usage(MB)         |
+========+==================+===============+=====================================================+
| 3      | Ascend950PR      | OK            | 188.0       51                0     / 0             |
|        |                  | 0000:09:00.0  | 44          0    / 0          7001  / 131072        |
+--------+------------------+---------------+-----------------------------------------------------+
"""
    (device,) = ascend.parse_table(text).devices
    assert (device.name, device.board, device.utilisation_percent) == ("Ascend950PR", "3", 44.0)
    assert (device.memory_total_bytes, device.power_w, device.temperature_c) == (131072 << 20, 188.0, 51.0)
    mapping = ascend.parse_mapping("NPU ID Slot ID Chip ID Chip Phy-ID Chip Name\n3 0 0 5 Ascend950PR\n")
    assert [one.index for one in ascend.apply_mapping([device], mapping)] == [5]


def test_trap_a_mapping_that_does_not_fit_is_not_used():
    devices = ascend.parse_table(_capture("ascend-info.txt")).devices
    twice = [{"board": "2", "die": "0", "logic": "0"}, {"board": "5", "die": "0", "logic": "0"}]
    assert ascend.apply_mapping(devices, twice) == devices
    assert ascend.apply_mapping(devices, twice[:1]) == devices


def test_trap_a_slice_of_a_card_has_the_memory_of_the_slice(tree):
    """HAMi and its like show less memory than the name says."""
    tree.device("nvidia")
    tree.prints("index, name, memory.total [MiB]", "0, Tesla V100-PCIE-16GB, 3000 MiB")
    (device,) = tree.detect().devices
    assert (device.name, device.memory_total_bytes) == ("Tesla V100-PCIE-16GB", 3000 << 20)


def test_trap_a_slice_may_hide_how_busy_it_is(tree):
    tree.device("nvidia")
    columns = "index, name, memory.total [MiB], memory.used [MiB], utilization.gpu [%]"
    tree.prints(columns, "0, Tesla V100-PCIE-16GB, 3000 MiB, 12 MiB, [N/A]")
    (device,) = tree.detect().devices
    assert (device.memory_used_bytes, device.utilisation_percent) == (12 << 20, None)


def test_trap_the_hygon_table_has_neither_model_nor_size(tree):
    tree.device("hygon")
    health = "HCU[0] : Bus Id : 0000:37:00.0 : Critical\nHCU[1] : Bus Id : 0000:38:00.0 : Healthy\n"
    answers = {"--showproductname": "", "--healthcheck": health, "": _capture("hygon-concise.txt")}
    tree.answers("hy-smi", answers)
    agents = _capture("amd-rocminfo.txt").replace("AMD Instinct MI308X", "K100_AI").replace("9984", "15")
    tree.answers("rocminfo", {"": agents.replace("             GPU", "             DCU")})
    first, second = tree.detect().devices
    assert (first.name, first.memory_total_bytes, first.temperature_c) == ("K100_AI", None, 51.0)
    assert (first.health, first.health_reasons, first.pci_bus) == ("bad", ("Critical",), "0000:37:00.0")
    assert (second.name, second.health, second.temperature_c) == (None, "ok", None)


@pytest.mark.parametrize(
    "word", ["N/A", "-", "/", "[N/A]", "[Insufficient Permissions]", "ERR!", "", "NA", "--"]
)
def test_trap_every_word_for_unknown_is_none(word):
    assert [read(word) for read in (text_of, whole, bytes_of, celsius, percent, watts, address)] == [None] * 7


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (bytes_of, "26838 MB", 26838 << 20),
        (bytes_of, "147456MiB", 147456 << 20),
        (bytes_of, "96 GiB", 96 << 30),
        (bytes_of, "17163091968 B", 17163091968),
        (bytes_of, "12 XB", None),
        (bytes_of, "12", None),
        (bytes_of, "-5 MiB", None),
        (bytes_of, "99999999999999999999 MiB", None),
        (celsius, "39 ℃", 39.0),
        (celsius, "43.0°C", 43.0),
        (celsius, "104 F", None),
        (watts, "86 W", 86.0),
        (watts, "86500 mW", 86.5),
        (watts, "86 kW", None),
        (percent, "100 %", 100.0),
        (percent, "101 %", None),
        (percent, "٣ %", None),
        (whole, "7", 7),
        (whole, "7.5", None),
        (whole, True, None),
        (address, "00000000:3B:00.0", "0000:3b:00.0"),
        (address, "3b:00.0", "0000:3b:00.0"),
        (address, "00010000:3B:00.0", None),
        (address, "0000:xx:00.0", None),
    ],
)
def test_trap_numbers_and_their_units(read, text, value):
    assert read(text) == value


def test_trap_pairs_without_a_blank_before_the_stroke():
    first = ascend.parse_table(_capture("ascend-info.txt")).devices[0]
    assert first.memory_used_bytes == 41207 << 20


def test_trap_one_bad_card_of_metax_stays_in_its_place(tree):
    tree.device("metax")
    table = _capture("metax-table.txt").splitlines()
    healthy = "\n".join(line for number, line in enumerate(table) if number not in (16, 17, 18))
    tree.answers("mx-smi", {"-L": _capture("metax-list.txt"), "": healthy})
    good, bad = tree.detect().devices
    assert (good.index, good.health, good.memory_total_bytes) == (4, "ok", 65536 << 20)
    assert (bad.index, bad.health, bad.health_reasons) == (5, "bad", ("Driver Initialization Failed",))
    assert (bad.memory_total_bytes, bad.temperature_c) == (None, None)


def test_trap_blanks_that_got_lost():
    text = _capture("metax-table.txt")
    squeezed = re.sub(r"[ \t]+", " ", text)
    assert metax.parse_table(squeezed).devices == metax.parse_table(text).devices


def test_trap_an_empty_process_table_is_not_an_idle_card():
    text = _capture("nvidia-table.txt")
    lines = [line for line in text.splitlines() if "train.py" not in line]
    assert nvidia.parse_table("\n".join(lines)).devices[0].processes is None
    idle = [
        line.replace(
            "   0   N/A  N/A     48213      C   python train.py                              9196MiB",
            " No running processes found                                                       ",
        )
        for line in text.splitlines()
    ]
    assert nvidia.parse_table("\n".join(idle)).devices[0].processes == ()


def test_trap_counts_that_disagree_with_rows(tree):
    tree.device("kunlunxin")
    tree.answers("xpu-smi", {"-q": _capture("kunlunxin-report.txt").replace(": 1\n", ": 2\n")})
    (problem,) = tree.detect().problems
    assert "2 devices are attached and 1 described" in problem.text


def test_trap_gaps_between_indices_stay_gaps(tree):
    tree.device("kunlunxin")
    tree.answers("xpu-smi", {"": _capture("kunlunxin-table.txt")})
    assert [device.index for device in tree.detect().devices] == [0, 7]


def test_trap_gaudi_modules_are_not_its_indices(tree):
    tree.device("gaudi")
    tree.answers("hl-smi", {"-Q": _capture("gaudi-query.txt"), "": _capture("gaudi-table.txt")})
    (device,) = tree.detect().devices
    assert (device.index, device.physical_index) == (0, 6)


def test_trap_the_ppu_tool_prints_nvidias_vendor_number(tree):
    tree.device("thead")
    tree.answers("ppu-smi", {"": _capture("thead-table.txt") + "PCI Device Id : 0x1E0410DE\n"})
    machine = tree.detect()
    assert (machine.chip, machine.devices[0].pci_device_id) == ("thead", None)
    assert machine.devices[0].slices[0].instance == "2/1"


def test_trap_cnmon_writes_into_the_folder_where_it_stands(tree):
    tree.device("cambricon")
    tree.write("answers/table", _capture("cambricon-table.txt"))
    tree.write("answers/json", _capture("cambricon-info.json"))
    tree.tool(
        f'if [ "$1" = info ]; then cp {tree.root}/answers/json cnmon_info.json; echo done; '
        f"else cat {tree.root}/answers/table; fi",
        "cnmon",
    )
    before = set(Path().iterdir())
    first, second = tree.detect().devices
    assert (first.uuid, first.power_w) == ("1a2b3c4d-0000-0000-0000-00000000aa01", 402.0)
    assert second.uuid is None
    assert set(Path().iterdir()) == before


def test_trap_cut_cards_show_their_parts(tree):
    tree.device("nvidia")
    query = _capture("nvidia-query.txt").replace("9.0, Disabled", "9.0, Enabled")
    tree.answers("nvidia-smi", {"-q -x": _capture("nvidia-report.xml"), "": query})
    cut = tree.detect().devices[0]
    assert (cut.is_sliced, [part.instance for part in cut.slices]) == (True, ["7/0", "9/1"])
    assert [part.memory_total_bytes for part in cut.slices] == [9856 << 20, 40192 << 20]
    assert (cut.name, cut.memory_total_bytes) == ("NVIDIA H20", 97871 << 20)  # the query's word stands


def test_trap_colours_in_the_first_line():
    (device,) = rocm.parse_rocminfo("amd", _capture("amd-rocminfo.txt")).devices
    assert device.name == "AMD Instinct MI308X"
    assert _capture("amd-rocminfo.txt").startswith("\x1b[37m")
