"""Find the first cause in a log: the line that a person would look for, not the last thing that fell over.

Launchers print their own traceback after that of the rank which failed, and servers print "see root cause
above"; so the *earliest* exception of the last burst of tracebacks is taken, and exceptions which only
report that a child failed are passed over. A rank that was killed writes nothing, and the tracebacks of the
others are echoes of it: torchrun's closing table is what names it.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

__all__ = ["first_cause", "is_consequence", "killed_rank", "last_lines"]

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
    r"|exited with code 0,"  # a service that ends softly has mostly lost those it worked for
)
_KILLED = re.compile(r"^\s*rank\s*: (\d+) .*\n\s*exitcode\s*: -(\d+) ", re.MULTILINE)
_NO_WORDS = re.compile(
    r"[\W_]*|[EWI]\d{4} .*torch/distributed/.*|.+\.py:\d+: \w*Warning: .*|\s*warnings\.warn\(.*"
)
"""Frames and rules, what torchrun writes about its children, and Python's warnings with what they quote."""
_GOES_ON = re.compile(r":$|\bvalidation errors? for \S+$")
"""A message whose first line only announces the rest, such as pydantic's."""
_PYDANTIC_TAIL = re.compile(r" \[type=.*")
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
    if killed := _killed(lines):
        return killed
    chosen = ""
    first = len(lines)
    nearest = len(lines)
    for start, end, text in reversed(_exceptions(lines)):
        if nearest - end > _BURST_LINES:
            break
        first, nearest = start, end
        if not text.split(":")[0].endswith(_REPORTS_ONLY):
            chosen = text
    if chosen:
        return chosen[:_LINE_LIMIT]
    # Only launchers spoke of errors, so what the process itself said last is the best there is.
    said = [line.strip() for line in lines[:first] if not _NO_WORDS.fullmatch(line)]
    rest = said or [line.strip() for line in lines if not _NO_WORDS.fullmatch(line)]
    return rest[-1][:_LINE_LIMIT] if rest else ""


def killed_rank(log: Path) -> str:
    """Name the first rank that a signal ended, as a sentence; empty if torchrun's table names none.

    SIGTERM is left out: torchrun itself sends it to those that are left when one has failed.
    """
    return _killed(_tail(log, 0))


def _killed(lines: list[str]) -> str:
    for rank, number in _KILLED.findall("\n".join(lines)):
        if int(number) != signal.SIGTERM:
            hint = ", which the kernel does when memory is short" if int(number) == signal.SIGKILL else ""
            return f"rank {rank} was killed by signal {number} ({_name(int(number))}){hint}"
    return ""


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unnamed"


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


def _exceptions(lines: list[str]) -> list[tuple[int, int, str]]:
    """Return the first and the last line of each traceback, and the exception that ends it."""
    found = []
    for start, line in enumerate(lines):
        place = line.find(_TRACEBACK)
        if place >= 0:
            prefix = line[:place]
            end = _end_of(lines, start, prefix)
            if end is not None:
                found.append((start, end, _message(lines, start, end, prefix)))
    return found


def _end_of(lines: list[str], start: int, prefix: str) -> int | None:
    """Follow one traceback, whose lines carry a prefix such as `[rank0]: `, to the exception at its end."""
    for number in range(start + 1, min(start + 2000, len(lines))):
        text = lines[number].removeprefix(prefix)
        if not text.strip() or text[0].isspace():
            continue
        if _EXCEPTION.match(text):
            return number
        if not prefix:
            return None
    return None


def _message(lines: list[str], start: int, end: int, prefix: str) -> str:
    """Return what an exception says in one line, with what its first line leaves out."""

    def plain(number: int) -> str:
        return lines[number].removeprefix(prefix).strip()

    text = plain(end)
    after = [plain(number) for number in range(end + 1, min(end + 3, len(lines)))]
    if _GOES_ON.search(text) and after and not text.split(":")[0].endswith(_REPORTS_ONLY):
        more = [_PYDANTIC_TAIL.sub("", part).rstrip(":") for part in after if not _NO_WORDS.fullmatch(part)]
        return ": ".join([text.rstrip(":"), *more])
    if ":" not in text:  # an assertion without a message says nothing but itself
        code = [
            line for number in range(start, end) if not re.match(r"File \"|[\^~ ]*$", line := plain(number))
        ]
        return f"{text}: {code[-1]}" if code else text
    return text
