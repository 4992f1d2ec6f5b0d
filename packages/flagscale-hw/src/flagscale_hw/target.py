"""A target: a host on which processes of a plan run, and how to get there.

What does not live here: the connection (`ssh.py`), files that list hosts (`hostfile.py`).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["LOCAL", "Target", "problems_of_target", "transport_to"]

LOCAL = "local"
_THIS_HOST = frozenset({"localhost", "127.0.0.1", "::1"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
_WORD = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9_.,@:\[\]%/-]*")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One host. What is not given is left to the user's own ssh configuration."""

    name: str
    """As the hostfile has it; names a folder of the run directory."""
    transport: Literal["ssh", "local"] = "ssh"
    """`local` starts a supervisor of its own on this machine, as if it were another host."""
    address: str = ""
    """By which the other hosts reach it; its name when empty."""
    user: str | None = None
    port: int | None = None
    """Of its ssh server."""
    jump: str | None = None
    """Hosts to go through, as after `ssh -J`."""
    docker: str | None = None
    """A running container in which everything is started, by `docker exec`."""
    python: str | None = None
    """Preferred interpreter of the supervisor, 3.11 or newer; else the host's newest `python3`."""

    @property
    def reached_as(self) -> str:
        """The address that other hosts use."""
        return self.address or self.name


def transport_to(name: str) -> Literal["ssh", "local"]:
    """Choose the transport to a host by its name: none is needed to the one we run on.

    An address is this host's when it can be bound. A name that cannot be resolved is left to ssh, whose
    configuration may know it.
    """
    if name in _THIS_HOST or name == socket.gethostname():
        return "local"
    try:
        family, _, _, _, where = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind(where)
    except OSError:
        return "ssh"
    return "local"


def problems_of_target(target: Target) -> Iterator[str]:
    """Yield what makes a target unusable; words that ssh or docker could take for options are refused."""
    if not _NAME.fullmatch(target.name):
        yield f"target {target.name!r}: give a host name or an address: letters, digits, `. _ : -`"
    if target.port is not None and not 0 < target.port < 65536:
        yield f"target {target.name}: port {target.port}: give 1 to 65535"
    for what in ("address", "user", "jump", "docker"):
        value = getattr(target, what)
        if value and not _WORD.fullmatch(value):
            yield f"target {target.name}: {what} {value!r}: not a plain word"
