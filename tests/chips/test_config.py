"""config x chip: every installed recipe checks without an error.

Config never sees a chip (it and hw do not know each other), so the answer is one for all chips and is
shared by the cells of one process.
"""

from functools import cache

from flagscale_config import check, recipes


@cache
def errors_of(path):
    return tuple(str(one) for one in check(path) if one.severity == "error" and one.code != "config/required")


def test_cell(chip, record_property):
    found = recipes()
    assert found, "no recipe is installed"
    assert {name: errors_of(path) for name, path in found.items() if errors_of(path)} == {}
    record_property("note", f"{len(found)} recipes")
