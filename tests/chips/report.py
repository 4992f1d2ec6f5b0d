"""Print the matrix package x chip from what each package's tests wrote, and write it as HTML and JSON.

python tests/chips/report.py FOLDER [--require PACKAGE ...]

FOLDER has `<package>.json` files; `matrix.json` and `matrix.html` are written beside them. Exits 1 when a
cell failed, or when a package that was required has no cell.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

PACKAGES = ("hw", "config", "train", "serve", "convert")
MARKS = {"passed": "[green]ok[/]", "failed": "[red]FAILED[/]", "skipped": "[yellow]skipped[/]"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--require", nargs="*", default=[])
    options = parser.parse_args()
    cells = [cell for package in PACKAGES for cell in json.loads(_text(options.folder / f"{package}.json"))]
    missing = [package for package in options.require if package not in {cell["package"] for cell in cells}]
    console = Console(record=True, width=200 if not sys.stdout.isatty() else None)
    console.print(table(cells))
    for cell in cells:
        if cell["outcome"] != "passed":
            console.print(f"{cell['package']} x {cell['chip']}: {cell['error']}", style="red", markup=False)
    for package in missing:
        console.print(f"{package}: no cell ran", style="red")
    bad = [cell for cell in cells if cell["outcome"] != "passed"]
    total = sum(cell["seconds"] for cell in cells)
    console.print(f"{len(cells)} cells, {len(cells) - len(bad)} ok, {total:.1f} s in cells")
    (options.folder / "matrix.json").write_text(json.dumps(cells, indent=1) + "\n")
    console.save_html(str(options.folder / "matrix.html"), clear=False)
    return 1 if bad or missing or not cells else 0


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else "[]"


def table(cells: list[dict[str, object]]) -> Table:
    """One row per chip, one column per package."""
    packages = [name for name in PACKAGES if any(cell["package"] == name for cell in cells)]
    chips = list(dict.fromkeys(cell["chip"] for cell in cells))
    by_place = {(cell["package"], cell["chip"]): cell for cell in cells}
    made = Table(title="package x chip")
    made.add_column("chip")
    for package in packages:
        made.add_column(package)
    for chip in chips:
        found = [by_place.get((package, chip)) for package in packages]
        made.add_row(str(chip), *("-" if cell is None else _cell(cell) for cell in found))
    return made


def _cell(cell: dict[str, object]) -> str:
    note = f" {cell['note']}" if cell["note"] else ""
    return f"{MARKS[str(cell['outcome'])]} {cell['seconds']:.1f} s{note}"


if __name__ == "__main__":
    raise SystemExit(main())
