"""The matrix package x chip: what its cells share, and the record that `report.py` prints.

One test per cell. `--chip NAME` (again for more) selects; `--matrix-json PATH` writes what happened;
`FLAGSCALE_UPDATE_GOLDEN=1` rewrites the golden facts: read what has changed before committing it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flagscale_hw import CHIPS, Machine
from flagscale_hw.testing import fake_host

GOLDEN = Path(__file__).parent / "golden"
NUM_DEVICES = {"cpu": 0, "mps": 1}
"""Devices of the faked host; 8 for all others."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chip", action="append", choices=CHIPS, help="only this chip; repeat for more")
    parser.addoption("--matrix-json", type=Path, help="write what happened in each cell to this file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chip" in metafunc.fixturenames:
        metafunc.parametrize("chip", metafunc.config.getoption("--chip") or CHIPS)


CELLS: list[dict[str, Any]] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    chip = getattr(item, "callspec", None) and item.callspec.params.get("chip")
    if chip and (call.when == "call" or report.outcome != "passed"):
        CELLS.append(
            {
                "package": item.path.stem.removeprefix("test_"),
                "chip": chip,
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                "note": dict(item.user_properties).get("note", ""),
                "error": "" if report.outcome == "passed" else str(call.excinfo.value).strip()[:2000],
            }
        )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--matrix-json")
    if path is not None:
        path.write_text(json.dumps(CELLS, indent=1) + "\n")


def machine_of(chip: str) -> Machine:
    return fake_host(chip, NUM_DEVICES.get(chip, 8))


@pytest.fixture
def machine(chip: str) -> Machine:
    """The faked host of the cell's chip, as the real detection describes it."""
    return machine_of(chip)


@pytest.fixture
def golden(chip: str) -> Callable[[str, Mapping[str, Any]], None]:
    """Compare one package's facts about the chip with those on record."""

    def compare(package: str, facts: Mapping[str, Any]) -> None:
        path = GOLDEN / f"{chip}.json"
        recorded = json.loads(path.read_text()) if path.is_file() else {}
        made = json.loads(json.dumps(facts))
        if os.environ.get("FLAGSCALE_UPDATE_GOLDEN"):
            path.write_text(json.dumps({**recorded, package: made}, indent=1, sort_keys=True) + "\n")
            return
        assert made == recorded.get(package), (
            f"{path.name}: {package}: see FLAGSCALE_UPDATE_GOLDEN in conftest.py"
        )

    return compare


@cache
def loaded(task: str) -> Mapping[str, Any]:
    """Every installed recipe of a task by name, read once per process, with what it requires given.

    A recipe that does not load fails the cells of config, which check all of them; it is left out here.
    """
    from flagscale_config import ConfigError, recipes

    found = {}
    for name, path in recipes(task).items():
        if not name.startswith(f"{task}:"):
            with contextlib.suppress(ConfigError):
                found[name] = _load(path)
    return {name: one for name, one in found.items() if one.task.type == task}


@pytest.fixture
def experiments() -> Callable[[str], Mapping[str, Any]]:
    """Recipes by task."""
    return loaded


def required(path: Path) -> list[str]:
    """Overrides for the keys that a recipe leaves to its user."""
    from flagscale_config import check

    return [
        f"{problem.key}=/given/{problem.key.rpartition('.')[2]}"
        for problem in check(path)
        if problem.code == "config/required"
    ]


def _load(path: Path) -> Any:
    from flagscale_config import load

    given = [*required(path), "experiment.exp_dir=/exp"]
    return load(path, given).model_copy(update={"cwd": "/cwd", "source": "/recipe.yaml"})
