"""Describe the machine: processors, memory, and the accelerators of every vendor whose hardware is there.

On a host without accelerators this reads a few dozen small files: no library is loaded, no process started.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flagscale_hw.backend import Backend, Found, backends
from flagscale_hw.bus import Survey, survey
from flagscale_hw.errors import InputError
from flagscale_hw.host import Host, this_host
from flagscale_hw.machine import Machine, Presence, Problem, Vendor
from flagscale_hw.plugins import plugin_problems
from flagscale_hw.processor import cpu_name, memory_bytes, num_cpus

__all__ = ["FORCED_VARIABLE", "Sighting", "detect", "presence", "sightings"]

FORCED_VARIABLE = "FLAGSCALE_HW_VENDOR"
"""Chips, with commas: look for these only, and believe that they are here."""


@dataclass(frozen=True)
class Sighting:
    """One vendor and what files say of it."""

    backend: Backend
    presence: Presence
    is_forced: bool = False


def detect(
    host: Host | None = None, *, timeout_s: float | None = None, chips: Sequence[str] | None = None
) -> Machine:
    """Describe a machine. Never raises for hardware that does not answer: see `Machine.problems`.

    Args:
        host: where to look; this host when None, or what `FLAGSCALE_HW_ROOT` names.
        timeout_s: how long a vendor's library and tools together may take before they are killed; None is
            `FLAGSCALE_HW_TIMEOUT`, or 3. Vendors are asked side by side.
        chips: ask about these only, such as `("nvidia",)`; every vendor when None.

    Raises:
        InputError: one of `chips` is not known, or `FLAGSCALE_HW_TIMEOUT` is no number of seconds.
    """
    host = this_host() if host is None else host
    seen, everything = _sightings(host)
    if chips is not None:
        _must_know(chips)
        seen = [sighting for sighting in seen if sighting.backend.chip in chips]
    here = [sighting for sighting in seen if sighting.presence != "none"]
    looks = _look_at_all(here, everything, host.timeout_s if timeout_s is None else timeout_s)
    looks.sort(key=lambda look: look.rank, reverse=True)  # stable: else the order of the backends
    problems = [*_unknown_chips(host, seen), *plugin_problems()]
    problems += [problem for look in looks for problem in look.found.problems]
    primary = looks[0] if looks and looks[0].found.devices else None
    indices = None
    if primary is not None:
        from flagscale_hw.visibility import visible

        indices, doubts = visible(primary.sighting.backend, host, primary.found.devices)
        problems += doubts
    return Machine(
        hostname=socket.gethostname() if host.is_real else (host.read("/etc/hostname") or "unknown"),
        num_cpus=num_cpus(host),
        memory_bytes=memory_bytes(host),
        cpu_name=cpu_name(host),
        chip=primary.sighting.backend.chip if primary else "cpu",
        devices=primary.found.devices if primary else (),
        visible_indices=indices,
        problems=tuple(problems),
        others=tuple(device for look in looks[1:] for device in look.found.devices),
        vendors=tuple(look.vendor for look in looks),
    )


def presence(host: Host | None = None) -> list[str]:
    """Name the chips that programs can use here, from files only; `cpu` when there is no other."""
    seen = sightings(host)
    return [sighting.backend.chip for sighting in seen if sighting.presence == "usable"] or ["cpu"]


def sightings(host: Host | None = None) -> list[Sighting]:
    """Say of every vendor whether its chips are here, from files only; a forced vendor is `usable`."""
    return _sightings(this_host() if host is None else host)[0]


def _sightings(host: Host) -> tuple[list[Sighting], Survey]:
    known = backends()
    wanted: dict[str, set[str]] = {}
    for rule in (rule for backend in known for rule in backend.pci):
        wanted.setdefault(rule.vendor, set()).update(rule.classes)
    everything = survey(host, wanted)
    forced = _forced(host)
    if forced:
        seen = [Sighting(one, "usable", is_forced=True) for one in known if one.chip in forced]
    else:
        seen = [Sighting(one, one.presence(everything)) for one in known]
    return seen, everything


def _forced(host: Host) -> list[str]:
    return [name.strip() for name in host.environ.get(FORCED_VARIABLE, "").split(",") if name.strip()]


def _must_know(chips: Sequence[str]) -> None:
    known = [backend.chip for backend in backends()]
    unknown = [chip for chip in chips if chip not in known]
    if unknown:
        raise InputError(f"vendor {', '.join(unknown)}: not known: known are {', '.join(known)}")


def _unknown_chips(host: Host, seen: Sequence[Sighting]) -> list[Problem]:
    chips = {sighting.backend.chip for sighting in seen}
    return [
        Problem(
            where=FORCED_VARIABLE,
            text=f"chip {name!r} is not known",
            hint=f"known are {', '.join(backend.chip for backend in backends())} and cpu",
        )
        for name in _forced(host)
        if name not in chips and name != "cpu"
    ]


@dataclass
class _Look:
    """One vendor on its way through detection."""

    sighting: Sighting
    found: Found = Found()  # noqa: RUF009 - frozen
    elapsed_ms: float = 0.0
    on_bus: int = 0

    @property
    def rank(self) -> int:
        """Device memory in bytes: on a host with several vendors, the big one is the one to use."""
        if not self.found.devices or self.sighting.presence != "usable":
            return -1
        return sum(device.memory_total_bytes or 0 for device in self.found.devices)

    @property
    def vendor(self) -> Vendor:
        drivers = [device.driver for device in self.found.devices if device.driver]
        return Vendor(
            chip=self.sighting.backend.chip,
            presence=self.sighting.presence,
            is_forced=self.sighting.is_forced,
            origin=self.sighting.backend.origin,
            source=self.found.source,
            driver=drivers[0] if drivers else None,
            count=len(self.found.devices),
            on_bus=self.on_bus,
            elapsed_ms=self.elapsed_ms,
        )

    def run(self, everything: Survey, timeout_s: float) -> None:
        backend = self.sighting.backend
        functions = backend.on_bus(everything)
        self.on_bus = len(functions)
        if self.sighting.presence == "bus_only":
            self.found = Found(problems=(_no_driver(backend, functions),))
            return
        from flagscale_hw.completion import complete  # nothing of it is needed on a host without chips

        started = time.monotonic()
        answer = backend.look(everything.host, timeout_s)
        self.found = complete(backend, everything, answer)
        self.elapsed_ms = round((time.monotonic() - started) * 1000, 1)


def _look_at_all(seen: Sequence[Sighting], everything: Survey, timeout_s: float) -> list[_Look]:
    looks = [_Look(sighting) for sighting in seen]
    if len(looks) == 1:
        looks[0].run(everything, timeout_s)
        return looks
    if not looks:
        return []
    import threading

    # Each of them waits for a process, so they wait at the same time: the slowest vendor is the total.
    threads = [threading.Thread(target=look.run, args=(everything, timeout_s)) for look in looks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return looks


def _no_driver(backend: Backend, functions: Sequence[object]) -> Problem:
    drivers = sorted({getattr(function, "driver", None) or "" for function in functions} - {""})
    held = f" ({', '.join(drivers)} has them)" if drivers else ""
    return Problem(
        where=backend.chip,
        text=f"the bus shows such devices but no driver has them{held}",
        hint="load the driver, or pass the device nodes into this container",
    )
