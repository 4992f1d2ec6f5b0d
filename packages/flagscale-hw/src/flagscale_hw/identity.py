"""Who a process is: pid, start time and boot. A pid that was used again is never taken for the old process.

What does not live here: deciding what to end (`ending.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = [
    "MARKER",
    "Identity",
    "boot_id",
    "children",
    "command_of",
    "descendants",
    "identify",
    "marked",
    "pid_namespace",
    "session_members",
    "started_at",
]

MARKER = "FLAGSCALE_RUN_ID"
"""Environment variable that every process of a run carries, with the run's random id."""

_PROC = Path("/proc")
_DEAD = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class Identity:
    """One process of one boot of one machine."""

    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of `/proc/<pid>/stat`."""
    boot_id: str

    def is_alive(self) -> bool:
        """Tell whether exactly this process still runs; a zombie does not."""
        return self.boot_id == boot_id() and _running_since(self.pid) == self.start_time

    def send(self, signum: int) -> bool:
        """Signal exactly this process; never another one that has taken over its pid.

        Returns:
            False when the process is gone.

        Raises:
            PermissionError: it belongs to somebody else.
        """
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        except OSError:
            return self._send_by_pid(signum)  # kernels before 5.3 and some sandboxes
        try:
            # The handle pins the process, so a check made after opening it cannot become untrue.
            if not self.is_alive():
                return False
            signal.pidfd_send_signal(handle, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def _send_by_pid(self, signum: int) -> bool:
        if not self.is_alive():
            return False
        try:
            os.kill(self.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def to_dict(self) -> dict[str, int | str]:
        """Render as plain JSON."""
        return {"pid": self.pid, "start_time": self.start_time, "boot_id": self.boot_id}


@cache
def boot_id() -> str:
    """Return the id that the kernel drew at boot."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


@cache
def pid_namespace() -> str:
    """Return a name for the set of pids that this process can see; containers have their own."""
    try:
        return str((_PROC / "self/ns/pid").readlink())
    except OSError:
        return ""


def identify(pid: int) -> Identity | None:
    """Return the identity of a running process, or None when there is none with that pid."""
    started = _running_since(pid)
    return None if started is None else Identity(pid, started, boot_id())


def started_at(child_pid: int) -> int | None:
    """Return the start time in clock ticks of a child that was not waited for, even if it has ended."""
    stat = _stat(child_pid)
    return None if stat is None else stat[2]


def children(pid: int) -> list[Identity]:
    """Return the living processes whose parent is `pid`, without their own children."""
    found = []
    for child in _pids():
        stat = _stat(child)
        if stat is not None and stat[0] not in _DEAD and stat[1] == pid:
            found.append(Identity(child, stat[2], boot_id()))
    return found


def descendants(root_pid: int) -> list[Identity]:
    """Return every living process below `root_pid`, parents before children, without `root_pid` itself.

    The list is a snapshot: processes that fork while it is taken may be missing from it, so callers that must
    reach all of them look again until the kernel says that no child is left.
    """
    by_parent: dict[int, list[Identity]] = {}
    for pid in _pids():
        stat = _stat(pid)
        if stat is not None and stat[0] not in _DEAD:
            by_parent.setdefault(stat[1], []).append(Identity(pid, stat[2], boot_id()))
    found: list[Identity] = []
    queue = [root_pid]
    while queue:
        below = by_parent.pop(queue.pop(0), [])
        found += below
        queue += [child.pid for child in below]
    return found


def session_members(leader_pid: int) -> list[Identity]:
    """Return the living descendants of the calling process in the session that a process began.

    It may have ended: what it started keeps its session, unless it began one of its own.
    """
    found = []
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == leader_pid:
                found.append(process)
    return found


def marked(run_id: str, variable: str = MARKER) -> list[Identity]:
    """Return every living process whose environment carries this marker, of a run unless another is named."""
    needle = f"{variable}={run_id}".encode()
    found = []
    for pid in _pids():
        who = identify(pid)
        try:
            environment = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:
            continue
        # Asked again after reading: environment and identity must belong to the same process.
        if who is not None and needle in environment.split(b"\0") and identify(pid) == who:
            found.append(who)
    return found


def command_of(pid: int) -> str:
    """Return the command line of a process, cut at 120 characters; empty when it cannot be read."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    text = raw.replace(b"\0", b" ").decode(errors="replace").strip()
    return text if len(text) <= 120 else text[:117] + "..."


def _pids() -> Iterator[int]:
    with os.scandir(_PROC) as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


def _stat(pid: int) -> tuple[str, int, int] | None:
    """Return state, parent pid and start time in ticks."""
    try:
        raw = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The command stands in parentheses and may itself hold blanks and parentheses: count from the last one.
    fields = raw[raw.rfind(b")") + 1 :].split()
    if len(fields) < 20:
        return None
    return fields[0].decode(), int(fields[1]), int(fields[19])


def _running_since(pid: int) -> int | None:
    stat = _stat(pid)
    return None if stat is None or stat[0] in _DEAD else stat[2]
