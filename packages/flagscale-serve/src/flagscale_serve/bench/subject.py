"""What was under load, so that somebody else can load the same: the machine, the versions, the commands."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import flagscale_hw as hw
from flagscale_serve.__about__ import __version__
from flagscale_serve.state import read_plan

__all__ = ["subject_of"]


def subject_of(run_dir: str | None) -> dict[str, Any]:
    """Describe what was loaded.

    Args:
        run_dir: of the service; None where only its address is known.

    Returns:
        `flagscale_serve`, and for a run its `machine`, its `versions` (engine -> version) and its `commands`
        (process -> command line, without the environment, which may hold keys).
    """
    found: dict[str, Any] = {"flagscale_serve": __version__}
    if run_dir is None:
        return found
    plan = read_plan(hw.open_run(Path(run_dir)))
    is_here = all(one.get("host", "local") == "local" for one in plan.get("processes", ()))
    return {
        **found,
        "machine": _machine() if is_here else plan.get("facts", {}).get("chip", "not known"),
        "versions": plan.get("facts", {}).get("versions", {}),
        "commands": {one["name"]: shlex.join(one["argv"]) for one in plan.get("processes", ())},
    }


def _machine() -> str:
    here = hw.detect()
    devices = [f"{count} x {name}" for name, count in Counter(one.name for one in here.devices).items()]
    drivers = sorted({f"driver {one.driver}" for one in here.devices if one.driver})
    words = [*devices, *drivers, f"{here.num_cpus} x {here.cpu_name}", f"{here.memory_bytes / 2**30:.0f} GiB"]
    return ", ".join(words)
