"""Verbs that show the machine: the table, `watch`, `topo`, `schema`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flagscale_hw import detection
from flagscale_hw.machine import Machine
from flagscale_hw.table import align, render, style_for

__all__ = ["schema", "show", "topo", "watch"]

_SCHEMA = Path(__file__).parents[1] / "machine.schema.json"


def show(options: argparse.Namespace) -> int:
    """Print the machine as a table or as JSON."""
    machine = detection.detect(timeout_s=options.timeout, chips=options.chips)
    with suppress(BrokenPipeError):  # whether somebody reads it or not, the exit code tells
        _print_machine(machine, options)
    return _is_enough(machine, options.require)


def _print_machine(machine: Machine, options: argparse.Namespace) -> None:
    if options.json:
        from flagscale_hw.report import report
        from flagscale_hw.topology import topology

        links = topology(machine, timeout_s=options.timeout)
        print(json.dumps(report(machine, topology=links), indent=2, ensure_ascii=False))
        return
    print(render(machine, style_for(sys.stdout)))
    print_problems(machine)


def _is_enough(machine: Machine, required: int | None) -> int:
    """Return the exit code for a script that needs this many devices which can work."""
    if required is None:
        return 0
    healthy = [device for device in machine.visible if device.health not in ("bad", "unresponsive")]
    if len(healthy) >= required:
        return 0
    found = f"{len(healthy)} of {len(machine.devices)} devices of this machine can be used"
    with suppress(BrokenPipeError):
        print(f"error: --require {required}: {found}: flagscale-hw doctor says why", file=sys.stderr)
    return 3


def print_problems(machine: Machine) -> None:
    """Print what could not be found out."""
    for problem in machine.problems:
        print(f"warning: {problem}", file=sys.stderr)


def watch(options: argparse.Namespace) -> int:
    """Show the machine until Ctrl-C."""
    from flagscale_hw.watch import Form
    from flagscale_hw.watch import watch as keep_watching

    def look() -> Machine:
        return detection.detect(timeout_s=options.timeout, chips=options.chips)

    form: Form = "json" if options.json else "csv" if options.csv else "table"
    keep_watching(look, interval_s=options.interval, once=options.once, form=form)
    return 0


def schema(_options: argparse.Namespace) -> int:
    """Print the JSON Schema of the document that `--json` prints."""
    sys.stdout.write(_SCHEMA.read_text(encoding="utf-8"))
    return 0


def topo(options: argparse.Namespace) -> int:
    """Print how devices are linked."""
    from flagscale_hw.topology import topology

    machine = detection.detect(timeout_s=options.timeout, chips=options.chips)
    links = topology(machine, timeout_s=options.timeout)
    if options.json:
        print(json.dumps(links.to_dict(), indent=2))
        return 0
    if options.dot:
        print(links.to_dot(machine.chip))
        return 0
    print_problems(machine)
    if not links.indices:
        print("no accelerator, so no links")
        return 0
    names = [f"{machine.chip} {index}" for index in links.indices]
    header = ["", *names, *(nic.name for nic in links.nics), "numa"]
    rows = [
        [
            name,
            *(cell or "-" for cell in links.links[position]),
            *(cell or "-" for cell in links.nic_links[position]),
            "-" if links.numa_nodes[position] is None else str(links.numa_nodes[position]),
        ]
        for position, name in enumerate(names)
    ]
    print("\n".join([*align([header, *rows]), ""]))
    print(f"links as told by: {links.source or 'nobody'}")
    print(f"islands: {_groups(links.islands)}")
    for size, groups in links.tensor_parallel_groups().items():
        print(f"tensor parallel {size}: {_groups(groups)}")
    for position, name in enumerate(names):
        nearest = links.nearest_nics(position)
        if nearest:
            print(f"{name}: nearest network card {', '.join(nearest)}")
    return 0


def _groups(groups: Sequence[Sequence[int]]) -> str:
    return " | ".join(",".join(map(str, group)) for group in groups)
