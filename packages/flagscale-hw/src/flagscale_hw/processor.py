"""The processors and the memory that a process may really use: affinity and container limits count.

What does not live here: accelerators.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator

from flagscale_hw.host import Host

__all__ = ["cpu_name", "memory_bytes", "num_cpus"]


def cpu_name(host: Host) -> str | None:
    """Return the model as the kernel knows it; None when it does not say."""
    found = re.search(
        r"^(?:model name|Model|cpu model|cpu)\s*:\s*(\S.*)$", host.read("/proc/cpuinfo") or "", re.MULTILINE
    )
    return " ".join(found[1].split()) if found else host.read("/sys/firmware/devicetree/base/model")


def num_cpus(host: Host) -> int:
    """Return how many processors may be used, at least 1: the affinity mask, cut by the container's quota."""
    if host.is_real:
        count = len(os.sched_getaffinity(0))
    else:
        count = len(re.findall(r"^processor\s*:", host.read("/proc/cpuinfo") or "", re.MULTILINE))
    for folder in _groups(host, "cpu"):
        quota = _quota(host, folder)
        if quota is not None:
            count = min(count, math.ceil(quota))
    return max(1, count)


def _quota(host: Host, folder: str) -> float | None:
    """Return a group's limit in processors; None when there is none."""
    text = host.read(f"{folder}/cpu.max") or " ".join(
        host.read(f"{folder}/cpu.cfs_{name}_us") or "" for name in ("quota", "period")
    )
    try:
        quota, period = map(int, text.split())
    except ValueError:
        return None  # `max 100000`, or no such file
    return quota / period if quota > 0 and period > 0 else None


def memory_bytes(host: Host) -> int:
    """Return how much memory may be used; 0 when the host does not say."""
    found = re.search(r"^MemTotal:\s*(\d+) kB", host.read("/proc/meminfo") or "", re.MULTILINE)
    total = int(found[1]) * 1024 if found else 0
    for folder in _groups(host, "memory"):
        limit = host.read(f"{folder}/memory.max") or host.read(f"{folder}/memory.limit_in_bytes") or ""
        if limit.isdigit() and 0 < int(limit) < (total or math.inf):
            total = int(limit)
    return total


def _groups(host: Host, controller: str) -> Iterator[str]:
    """Yield the folders of every control group above this process: each of them may set a limit."""
    for line in (host.read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base = "/sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = f"/sys/fs/cgroup/{controller}"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for length in range(len(parts), -1, -1):
            yield "/".join([base, *parts[:length]])
