"""Which accelerators are here, and how to run processes on hosts.

Names are loaded when they are first used: importing this package costs a few milliseconds, whatever a
caller needs.
"""

from __future__ import annotations

from importlib import import_module

from flagscale_hw.__about__ import __version__

TYPE_CHECKING = False  # as typing's own, whose import would cost more than all the rest
if TYPE_CHECKING:
    from flagscale_hw.cause import killed_rank
    from flagscale_hw.chips import CHIPS, Runtime, runtime
    from flagscale_hw.detection import detect
    from flagscale_hw.environment import env
    from flagscale_hw.errors import (
        DetectError,
        HostsNotReady,
        HwError,
        InputError,
        InvalidPlan,
        LaunchError,
        LaunchRefused,
        RunNotFound,
    )
    from flagscale_hw.flagos import FlagOSProfile, flagos_env
    from flagscale_hw.hostfile import HostEntry, read_hostfile
    from flagscale_hw.kubernetes import Pods, render_kubernetes
    from flagscale_hw.logs import LogLine
    from flagscale_hw.machine import Device, Machine, unknowns
    from flagscale_hw.peaks import peak
    from flagscale_hw.placeholders import literal
    from flagscale_hw.plan import File, Plan, Probe, Process, StopPolicy
    from flagscale_hw.preflight import (
        HostReport,
        Node,
        Obstacle,
        SurveyRequest,
        find_nodes,
        judge,
        survey,
    )
    from flagscale_hw.runs import Run, launch, list_runs, open_run
    from flagscale_hw.scripts import render_scripts
    from flagscale_hw.slurm import render_slurm, submit
    from flagscale_hw.status import ProcessStatus, RunStatus
    from flagscale_hw.target import Target, transport_to

__all__ = [
    "CHIPS",
    "DetectError",
    "Device",
    "File",
    "FlagOSProfile",
    "HostEntry",
    "HostReport",
    "HostsNotReady",
    "HwError",
    "InputError",
    "InvalidPlan",
    "LaunchError",
    "LaunchRefused",
    "LogLine",
    "Machine",
    "Node",
    "Obstacle",
    "Plan",
    "Pods",
    "Probe",
    "Process",
    "ProcessStatus",
    "Run",
    "RunNotFound",
    "RunStatus",
    "Runtime",
    "StopPolicy",
    "SurveyRequest",
    "Target",
    "__version__",
    "detect",
    "env",
    "find_nodes",
    "flagos_env",
    "judge",
    "killed_rank",
    "launch",
    "list_runs",
    "literal",
    "open_run",
    "peak",
    "read_hostfile",
    "render_kubernetes",
    "render_scripts",
    "render_slurm",
    "runtime",
    "submit",
    "survey",
    "transport_to",
    "unknowns",
]

# No home may bear the name of something in it: importing the submodule would put the module in the name's
# place.
_HOMES = {
    "cause": ("killed_rank",),
    "chips": ("CHIPS", "Runtime", "runtime"),
    "detection": ("detect",),
    "environment": ("env",),
    "errors": (
        "DetectError",
        "HostsNotReady",
        "HwError",
        "InputError",
        "InvalidPlan",
        "LaunchError",
        "LaunchRefused",
        "RunNotFound",
    ),
    "flagos": ("FlagOSProfile", "flagos_env"),
    "logs": ("LogLine",),
    "machine": ("Device", "Machine", "unknowns"),
    "peaks": ("peak",),
    "plan": ("File", "Plan", "Probe", "Process", "StopPolicy"),
    "runs": ("Run", "launch", "list_runs", "open_run"),
    "status": ("ProcessStatus", "RunStatus"),
    "preflight": (
        "HostReport",
        "Node",
        "Obstacle",
        "SurveyRequest",
        "find_nodes",
        "judge",
        "survey",
    ),
    "hostfile": ("HostEntry", "read_hostfile"),
    "kubernetes": ("Pods", "render_kubernetes"),
    "placeholders": ("literal",),
    "scripts": ("render_scripts",),
    "slurm": ("render_slurm", "submit"),
    "target": ("Target", "transport_to"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "testing":
        return import_module(f"{__name__}.testing")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
