"""Describe the machine: processors, memory, and the accelerators of every vendor whose hardware is there.

On a host without accelerators this reads a few dozen small files: no library is loaded, no process started.
"""

from __future__ import annotations

import socket

from flagscale_hw.backend import Backend, backends
from flagscale_hw.host import Host
from flagscale_hw.machine import Machine, Problem
from flagscale_hw.processor import cpu_name, memory_bytes, num_cpus

__all__ = ["detect", "presence"]

TIMEOUT_S = 3.0
"""How long a vendor's library or tool may think before it is killed."""


def detect(host: Host | None = None, *, timeout_s: float = TIMEOUT_S) -> Machine:
    """Describe a machine. Never raises for hardware that does not answer: see `Machine.problems`.

    Args:
        host: where to look; this host when None.
        timeout_s: how long a vendor's library or tool may take.
    """
    host = Host() if host is None else host
    problems: list[Problem] = []
    found: dict[str, object] = {}
    for backend in backends():
        presence = backend.presence(host)
        if presence == "bus_only":
            problems.append(_no_driver(backend))
        elif presence == "usable" and not found:
            looked = backend.look(host, timeout_s)
            visible, doubts = backend.visible(host, looked.devices)
            problems += [*looked.problems, *doubts]
            if looked.devices:
                found = {"chip": backend.CHIP, "devices": looked.devices, "visible_indices": visible}
    return Machine(
        hostname=socket.gethostname() if host.is_real else (host.read("/etc/hostname") or "unknown"),
        num_cpus=num_cpus(host),
        memory_bytes=memory_bytes(host),
        cpu_name=cpu_name(host),
        problems=tuple(problems),
        **found,  # type: ignore[arg-type]
    )


def _no_driver(backend: Backend) -> Problem:
    return Problem(
        where=backend.CHIP,
        text="the bus shows such devices but no driver has them",
        hint="load the driver, or pass the device nodes into this container",
    )


def presence(host: Host | None = None) -> list[str]:
    """Name the chips that programs can use here, from files only; `cpu` when there is no other."""
    host = Host() if host is None else host
    return [backend.CHIP for backend in backends() if backend.presence(host) == "usable"] or ["cpu"]
