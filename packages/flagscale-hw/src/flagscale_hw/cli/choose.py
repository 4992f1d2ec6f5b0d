"""Verbs that help to choose: `env` and `specs`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence

from flagscale_hw import detection
from flagscale_hw.cli.show import print_problems
from flagscale_hw.environment import choose, docker_options, kubernetes_limits
from flagscale_hw.environment import env as variables_for
from flagscale_hw.errors import HwError
from flagscale_hw.machine import Device
from flagscale_hw.peaks import DTYPES, Figure, Specification, specification, specifications
from flagscale_hw.table import align

__all__ = ["env", "specs"]


class _NoFigures(HwError):
    exit_code = 3


def env(options: argparse.Namespace) -> int:
    """Print what selects devices for a process or a container."""
    machine = detection.detect(timeout_s=options.timeout)
    chosen = machine.visible
    if options.devices is not None:
        chosen = choose(machine, [word.strip() for word in options.devices.split(",")])
    if options.container:
        _print_container(chosen, options.container, as_json=options.json)
    else:
        variables = variables_for(chosen, environ=os.environ)
        if options.json:
            print(json.dumps(variables, indent=2))
        else:
            for name, value in variables.items():
                print(f"export {name}={shlex.quote(value)}")
    print_problems(machine)
    return 0


def _print_container(devices: Sequence[Device], form: str, *, as_json: bool) -> None:
    if form == "docker":
        words = docker_options(devices)
        print(json.dumps(words, indent=2) if as_json else shlex.join(words))
        return
    limits = kubernetes_limits(devices)
    if as_json:
        print(json.dumps({"resources": limits}, indent=2))
        return
    print("resources:\n  limits:" if limits else "resources: {}")
    for name, count in limits.get("limits", {}).items():
        print(f"    {name}: {count}")


def specs(options: argparse.Namespace) -> int:
    """Print published figures."""
    if options.model is None:
        rows = specifications()
    else:
        found = specification(options.model)
        if found is None:
            raise _NoFigures(
                f"model {options.model!r}: no figures are known for exactly this name: `flagscale-hw specs` "
                "lists all"
            )
        rows = (found,)
    if options.json:
        print(json.dumps([row.to_dict() for row in rows], indent=2, ensure_ascii=False))
        return 0
    header = ["chip", "model", "per", "memory", "GB/s", *(f"{dtype} T/s" for dtype in DTYPES), "W"]
    print("\n".join(align([header, *(_row(row) for row in rows)])))
    print("\ndense, without sparsity; -: not known; ?: only a table without sources says so")
    if options.model is not None:
        for line in _sources(rows[0]):
            print(line)
    return 0


def _row(row: Specification) -> list[str]:
    return [
        row.chip,
        row.model,
        row.scope,
        f"{_text(row.memory_bytes, 1 << 30)} GiB" if row.memory_bytes else "-",
        _text(row.memory_bytes_per_s, 1e9),
        *(_text(row.tera_per_s.get(dtype)) for dtype in DTYPES),
        _text(row.tdp_w),
    ]


def _text(figure: Figure | None, unit: float = 1.0) -> str:
    if figure is None:
        return "-"
    return f"{figure.value / unit:g}" + ("?" if figure.grade == "weak" else "")


def _sources(row: Specification) -> list[str]:
    figures = {"memory": row.memory_bytes, "GB/s": row.memory_bytes_per_s, **row.tera_per_s, "W": row.tdp_w}
    return [
        f"{name}: {figure.grade}: {'; '.join(figure.sources)}"
        for name, figure in figures.items()
        if figure is not None
    ]
