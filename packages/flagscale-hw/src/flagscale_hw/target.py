"""A target: a host on which processes of a plan run, and how to get there.

What does not live here: the connection (`ssh.py`), files that list hosts (`hostfile.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["LOCAL", "Target", "problems_of_target"]

LOCAL = "local"
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
