"""What a failed run's log says of ranks that were killed.

A killed rank writes nothing; the others fail a moment later because it is gone, and theirs are the tracebacks
in the log. torchrun's closing table is what names it.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

__all__ = ["killed_rank"]

_TAIL_BYTES = 64 * 1024
_KILLED = re.compile(r"^\s*rank\s*: (\d+) .*\n\s*exitcode\s*: -(\d+) ", re.MULTILINE)


def killed_rank(log: Path) -> str:
    """Name the first rank that a signal ended, as a sentence; empty if there is none.

    SIGTERM is left out: torchrun itself sends it to those that are left when one has failed.
    """
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _TAIL_BYTES))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    for rank, number in _KILLED.findall(text):
        if int(number) != signal.SIGTERM:
            return f"rank {rank} was killed by signal {number} ({_name(int(number))}){_hint(int(number))}"
    return ""


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unnamed"


def _hint(number: int) -> str:
    return ", which the kernel does when memory is short" if number == signal.SIGKILL else ""
