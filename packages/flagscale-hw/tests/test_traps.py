"""Every trap of the chip reference, and the tests that walk into it.

A trap is a sentence of the reference's own list ("Traps to carry into tests"), or a warning in one of its
tables. A checkout with `shared/` beside it also proves that no sentence of that list is missing here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REFERENCE = Path(*HERE.parts[:-4], "shared/reference/chips.md")

LISTED = {
    "amdgpu may expose VRAM but return EBUSY": ("backends.trap_amd_gives_memory_and_busy_for_all_the_rest",),
    "`xpu_smi -m` power is W on P800 and mW on K200": (
        "backends.trap_power_of_xpu_smi_counts_in_watts_or_in_milliwatts",
        "backends.trap_words_of_xpu_smi_that_moved_are_not_believed",
    ),
    "Ascend tool may need root": ("backends.trap_a_driver_that_refuses_this_user_is_not_an_absent_chip",),
    "910B3 does not imply A3": (
        "backends.trap_910b3_says_nothing_of_its_server_and_910b4_1_is_no_910b4",
        "peaks.suffixes_decide_about_memory",
    ),
    "950PR rejects `-c` and renames columns": (
        "backends.trap_950pr_has_other_columns_and_titles_without_gaps",
        "captures.captures_of_others_give_their_facts",
    ),
    "HAMi slices change total memory and can hide utilisation": (
        "backends.trap_a_slice_of_a_card_has_the_memory_of_the_slice",
        "backends.trap_a_slice_may_hide_how_busy_it_is",
    ),
    "Hygon table has no model nor size": ("backends.trap_the_hygon_table_has_neither_model_nor_size",),
    "AMD name may be only a device id": ("backends.trap_amd_name_may_be_only_a_device_id",),
    "`N/A`, `-`, `/`, `[Insufficient Permissions]`": ("backends.trap_every_word_for_unknown_is_none",),
    "memory words joined": (
        "backends.trap_numbers_and_their_units",  # joined words and the degree in one letter
        "backends.trap_pairs_without_a_blank_before_the_stroke",
        "backends.trap_colours_in_the_first_line",
        "backends.trap_blanks_that_got_lost",
        "backends.trap_counts_that_disagree_with_rows",
    ),
}
WARNED = {
    "a vendor's id is on network cards, bridges and disks too": ("gates.who_is_here",),
    "AMD and Hygon share /dev/kfd": ("gates.amd_and_hygon_share_a_node_and_not_a_vendor",),
    "a virtual function beside its own card": (
        "gates.a_virtual_function_counts_where_its_card_cannot_be_seen",
    ),
    "WSL has no bus": ("gates.wsl_has_neither_bus_nor_nodes",),
    "a container hides the bus": ("gates.amd_in_a_container_that_hides_the_bus",),
    "nvidia-smi as a shim of other vendors": ("gates.a_shim_called_nvidia_smi_makes_no_chip_an_nvidia",),
    "two vendors' tools of one name": ("gates.a_tool_of_the_same_name_decides_nothing",),
    "several vendors in one host, the first is not the best": (
        "gates.all_vendors_of_a_mixed_host_are_listed_and_the_big_one_is_used",
    ),
    "hardware without its driver": ("detection.hardware_without_a_driver_is_reported_and_not_used",),
    "three numbers of an NPU": (
        "backends.trap_three_numbers_of_an_npu",
        "backends.trap_a_mapping_that_does_not_fit_is_not_used",
    ),
    "two dies of a card, one of which has no power": ("backends.trap_two_dies_of_a_card_with_one_power",),
    "Gaudi's module is not its index": (
        "backends.trap_gaudi_modules_are_not_its_indices",
        "environment.gaudi_counts_modules",
    ),
    "the PPU tool prints NVIDIA's vendor": ("backends.trap_the_ppu_tool_prints_nvidias_vendor_number",),
    "cnmon writes into the folder where it stands": (
        "backends.trap_cnmon_writes_into_the_folder_where_it_stands",
    ),
    "MIG": (
        "backends.trap_cut_cards_show_their_parts",
        "nvml.a_cut_card_shows_its_parts_and_their_gaps",
    ),
    "gaps in the index": ("backends.trap_gaps_between_indices_stay_gaps",),
    "one bad card": (
        "backends.trap_one_bad_card_of_metax_stays_in_its_place",
        "detection.a_lost_card_keeps_the_others",
        "nvml.a_lost_card_keeps_its_place",
    ),
    "an empty process table in a container": ("backends.trap_an_empty_process_table_is_not_an_idle_card",),
    "amd-smi denies a driver that is built in": (
        "backends.trap_amd_tools_that_deny_a_driver_which_is_there",
    ),
    "a tool hangs in the kernel": (
        "hanging.a_tool_that_hangs_costs_the_timeout_once_and_leaves_nothing",
        "hanging.a_hang_at_the_second_card_keeps_the_first",
        "hanging.a_vendor_that_hangs_does_not_delay_the_others",
    ),
    "a field that an old driver does not know": ("detection.an_old_driver_is_asked_for_what_it_knows",),
    "numbers relative to a restriction that is in force": (
        "environment.the_outer_of_two_variables_stays_in_force",
        "environment.numbers_count_within_what_is_visible",
        "detection.the_environment_restricts_as_cuda_does",
    ),
    "peaks matched by a part of the name": (
        "peaks.a_figure_is_for_exactly_one_name",
        "peaks.known_mistakes_are_not_repeated",
        "peaks.doubtful_figures_are_not_given",
    ),
    "nvidia-smi underlines its matrix": ("recorded.its_links_are_those_of_the_switch_and_not_of_the_bus",),
}


def written() -> set[str]:
    """Name every test of this folder as `file.test`, without the `test_` of both."""
    return {
        f"{path.stem.removeprefix('test_')}.{node.name.removeprefix('test_')}"
        for path in HERE.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_trap_has_its_tests():
    named = {test for tests in (*LISTED.values(), *WARNED.values()) for test in tests}
    assert named - written() == set()


def test_every_test_of_a_trap_belongs_to_one():
    named = {test for tests in (*LISTED.values(), *WARNED.values()) for test in tests}
    assert {test for test in written() if ".trap_" in test} - named == set()


def test_no_trap_of_the_reference_is_missing():
    if not REFERENCE.exists():
        pytest.skip("the reference is not beside this checkout")
    (listed,) = re.findall(r"^Traps to carry into tests: (.*?)\n\n", REFERENCE.read_text(), re.M | re.S)
    clauses = [" ".join(clause.split()) for clause in listed.split(";")]
    missing = [clause for clause in clauses if not clause.startswith(tuple(LISTED))]
    assert missing == []
    assert len(clauses) == len(LISTED)
