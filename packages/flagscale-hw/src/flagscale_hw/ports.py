"""Leases of TCP ports on this host, without a gap in which two runs can take the same one.

A lease is two things: a listening socket that keeps everybody else away until just before the engine
starts, and a name in the abstract socket space that keeps other FlagScale runs away until the run is over.
Abstract names belong to one network name space, as ports do, and vanish with the process that holds them.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from flagscale_hw.errors import LaunchError, LaunchRefused
from flagscale_hw.identity import command_of

__all__ = ["PortLease", "lease_ports", "port_owner"]

_FIRST_FREE = 20000
_TRIES = 400
_ANY = "0.0.0.0"  # noqa: S104 - bound to keep others away; nothing is served


class PortLease:
    """One port, held for this process."""

    def __init__(self, number: int) -> None:
        """Take the port.

        Raises:
            OSError: EADDRINUSE when it is taken, EACCES when it needs rights that we lack.
        """
        self.number = number
        self._held: list[socket.socket] = []
        self._name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._name.bind(f"\0flagscale-port-{number}")
            self._name.listen(1)
            self.hold()
        except OSError:
            self.close()
            raise

    def hold(self) -> None:
        """Keep the number from everybody; does nothing when it is held already."""
        if self._held:
            return
        self._held.append(_listener(socket.AF_INET, _ANY, self.number))
        if socket.has_ipv6:
            # A host without IPv6 refuses the family or the address; then nobody else can use them either.
            try:
                self._held.append(_listener(socket.AF_INET6, "::", self.number))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise

    def hand_over(self) -> None:
        """Let the engine bind the number; other FlagScale runs are still kept away."""
        for held in self._held:
            held.close()
        self._held.clear()

    def close(self) -> None:
        """Give the port back to the host."""
        self.hand_over()
        self._name.close()


def _listener(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        # With SO_REUSEADDR the remains of closed connections do not count; a socket that listens still
        # excludes all.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        held.bind((address, port))
        held.listen(1)
    except OSError:
        held.close()
        raise
    return held


def lease_ports(wanted: Mapping[str, int | None]) -> dict[str, PortLease]:
    """Lease every port of a plan, or none.

    Args:
        wanted: name -> number, or None for any free one.

    Raises:
        LaunchRefused: a wanted port is in use or forbidden; names it and, where the host tells, its owner.
        LaunchError: no port is free.
    """
    leases: dict[str, PortLease] = {}
    try:
        # Fixed numbers first, so that a free choice never takes one of them.
        for name, number in sorted(wanted.items(), key=lambda item: item[1] is None):
            leases[name] = _lease_any(name) if number is None else _lease_one(name, number)
    except LaunchError:
        for lease in leases.values():
            lease.close()
        raise
    return leases


def _lease_one(name: str, number: int) -> PortLease:
    try:
        return PortLease(number)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            owner = port_owner(number) or "a process that this user may not see"
            raise LaunchRefused(
                f"port {name!r} ({number}): in use by {owner}: choose another port, or stop that process"
            ) from error
        raise LaunchRefused(
            f"port {name!r} ({number}): {error.strerror}: choose a port above 1023 that this user may open"
        ) from error


def _lease_any(name: str) -> PortLease:
    """Take a free port below the range from which the kernel serves outgoing connections."""
    end = _ephemeral_start()
    start = min(_FIRST_FREE, max(1024, end - 1000))
    candidates = range(start, end) if end > start else range(_FIRST_FREE, 65536)
    for number in random.sample(candidates, min(_TRIES, len(candidates))):
        with contextlib.suppress(OSError):
            return PortLease(number)
    raise LaunchError(
        f"port {name!r}: no free port found in {candidates.start}-{candidates.stop - 1} of this host"
    )


def _ephemeral_start() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768


def port_owner(number: int) -> str | None:
    """Name the process that has a port, such as `pid 47 (python -m http.server)`; None when unknown."""
    pid = _lease_holder(number) or _listening_pid(number)
    if pid is None:
        return None
    command = command_of(pid)
    return f"pid {pid} ({command})" if command else f"pid {pid}"


def _lease_holder(number: int) -> int | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(f"\0flagscale-port-{number}")
            answer = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return None
    pid = int(struct.unpack("3i", answer)[0])
    return pid if pid > 0 else None  # 0: the holder lives in another pid name space


def _listening_pid(number: int) -> int | None:
    inodes = _listening_inodes(number)
    if inodes:
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _has_socket(process, inodes):
                return int(process.name)
    return None


def _listening_inodes(number: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if len(fields) > 9 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == number:
                inodes.add(f"socket:[{fields[9]}]")
    return inodes


def _has_socket(process: Path, inodes: set[str]) -> bool:
    try:
        handles = list((process / "fd").iterdir())
    except OSError:
        return False  # gone, or of another user
    for handle in handles:
        with contextlib.suppress(OSError):
            if str(handle.readlink()) in inodes:
                return True
    return False
