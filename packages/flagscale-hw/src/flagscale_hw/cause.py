"""Find the first cause in a log: the line that a person would look for, not the last thing that fell over.

Launchers print their own traceback after that of the rank which failed, and servers print "see root cause
above"; so the *earliest* exception of the last burst of tracebacks is taken, and exceptions which only
report that a child failed are passed over.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["first_cause", "is_consequence", "last_lines"]

_TAIL_BYTES = 256 * 1024
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(
    r"[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Warning|Iteration|Group|[A-Z]\w*)(?::|$)"
)
_REPORTS_ONLY = ("ChildFailedError", "CalledProcessError", "SystemExit", "KeyboardInterrupt")
_ECHO = re.compile(
    r"(?i)connection (was )?(closed|reset|aborted|refused)|closed by peer|broken pipe|remote ?error"
    r"|DistNetworkError|nccl(Remote|System|Internal)Error|HCCL.*(timeout|remote)|socket timeout"
    r"|timed out waiting|Rendezvous|TCPStore|SignalException|signal 15 \(SIGTERM\)|peer (is )?(gone|lost)"
    r"|recv\w* failed|send\w* failed"
)
_BURST_LINES = 80
_LINE_LIMIT = 400


def last_lines(log: Path, count: int, *, offset: int = 0) -> list[str]:
    """Return the last lines that are not blank, oldest first, each cut at 400 characters.

    Args:
        log: the file; a missing one has no lines.
        count: how many lines at most.
        offset: byte at which the part of interest begins.
    """
    return [line[:_LINE_LIMIT] for line in _tail(log, offset) if line.strip()][-count:]


def first_cause(log: Path, *, offset: int = 0) -> str:
    """Return the line that tells why a process failed; empty when the log says nothing.

    Args:
        log: output and errors of one process.
        offset: byte at which the attempt in question began.
    """
    lines = _tail(log, offset)
    chosen = ""
    nearest = len(lines)
    for number, text in reversed(_exceptions(lines)):
        if nearest - number > _BURST_LINES:
            break
        nearest = number
        if not text.split(":")[0].endswith(_REPORTS_ONLY):
            chosen = text
    if chosen:
        return chosen[:_LINE_LIMIT]
    rest = [line.strip() for line in lines if line.strip()]
    return rest[-1][:_LINE_LIMIT] if rest else ""


def is_consequence(reason: str) -> bool:
    """Tell whether a failure looks like the echo of another: a rank that has lost its peer.

    The patterns are what gloo, NCCL and its kin, torch's stores and torchrun write when that happens.
    """
    return _ECHO.search(reason) is not None


def _tail(log: Path, offset: int) -> list[str]:
    try:
        with log.open("rb") as file:
            end = file.seek(0, 2)
            start = max(min(offset, end), end - _TAIL_BYTES)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    # A progress bar redraws its line after a carriage return: what counts is what stayed on the screen.
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]


def _exceptions(lines: list[str]) -> list[tuple[int, str]]:
    """Return line number and text of the exception that ends each traceback."""
    found = []
    for number, line in enumerate(lines):
        place = line.find(_TRACEBACK)
        if place >= 0:
            ending = _exception_after(lines, number, line[:place])
            if ending is not None:
                found.append(ending)
    return found


def _exception_after(lines: list[str], start: int, prefix: str) -> tuple[int, str] | None:
    """Follow one traceback whose lines carry a prefix such as `[rank0]: ` to the exception at its end."""
    for number in range(start + 1, min(start + 2000, len(lines))):
        text = lines[number]
        text = text[len(prefix) :] if text.startswith(prefix) else text
        if not text.strip() or text[0].isspace():
            continue
        if _EXCEPTION.match(text):
            return number, text.strip()
        if not prefix:
            return None
    return None
