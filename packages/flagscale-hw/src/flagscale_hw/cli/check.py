"""The verb `doctor`."""

from __future__ import annotations

import argparse
import json
import sys

from flagscale_hw.doctor import examine
from flagscale_hw.table import style_for

__all__ = ["doctor"]


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
    if options.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2, ensure_ascii=False))
    else:
        style = style_for(sys.stdout)
        for finding in findings:
            print(style.paint(str(finding), "" if finding.is_good else "red"))
    return 0 if all(finding.is_good for finding in findings) else 3
