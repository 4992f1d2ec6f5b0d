"""Verbs that check: `doctor` the machine, `plugins` what describes it."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import asdict

from flagscale_hw.doctor import examine
from flagscale_hw.table import align, style_for

__all__ = ["doctor", "plugins"]


def doctor(options: argparse.Namespace) -> int:
    """Print every finding with its cure; exit 3 when one of them stands in the way."""
    findings = examine(timeout_s=options.timeout)
    if options.purpose:
        from flagscale_hw.selection import examine_selection

        findings += examine_selection(
            options.purpose,
            python=options.python,
            timeout_s=options.timeout,
            ask_timeout_s=options.ask_timeout,
        )
    with suppress(BrokenPipeError):  # whether somebody reads it or not, the exit code tells
        if options.json:
            print(json.dumps([finding.to_dict() for finding in findings], indent=2, ensure_ascii=False))
        else:
            style = style_for(sys.stdout)
            for finding in findings:
                print(style.paint(str(finding), "" if finding.is_good else "red"))
    return 0 if all(finding.is_good for finding in findings) else 3


def plugins(options: argparse.Namespace) -> int:
    """Print who describes which chip; exit 3 when an installed plug-in cannot be used."""
    from flagscale_hw.backend import backends
    from flagscale_hw.plugins import plugin_problems

    known, problems = backends(), plugin_problems()
    with suppress(BrokenPipeError):
        if options.json:
            said = {
                "backends": [{"chip": one.chip, "origin": one.origin, "module": one.module} for one in known],
                "problems": [asdict(problem) for problem in problems],
            }
            print(json.dumps(said, indent=2, ensure_ascii=False))
        else:
            rows = [("chip", "from", "module"), *((one.chip, one.origin, one.module) for one in known)]
            print("\n".join(align(rows)))
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    return 3 if problems else 0
