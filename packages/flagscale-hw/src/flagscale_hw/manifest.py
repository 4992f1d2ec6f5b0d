"""The manifest: what a run was, kept for readers after it is over.

What does not live here: how the run stands now (`status.py`).
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
from collections.abc import Mapping
from typing import Any

from flagscale_hw.order import Order
from flagscale_hw.plan import Plan
from flagscale_hw.status import RunStatus

__all__ = ["begin", "complete"]

_SCHEMA = "flagscale-run/1"
_RECORDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|TMPDIR|LANG|TZ|.*_VISIBLE_DEVICES"
    r"|(CUDA|NCCL|GLOO|OMP|MKL|TORCH|PYTORCH|MEGATRON|NVTE|TE_FL|MG_FL|VLLM|SGLANG|HF|TRANSFORMERS|FLAGSCALE"
    r"|FLAGCX|HCCL|ASCEND|MLU|MUSA|HIP|ROCR|RANK|WORLD_SIZE|MASTER|SLURM)(_.*)?)"
)
_SECRET = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|AUTH)", re.IGNORECASE
)


def begin(order: Order, started_at: float | None) -> dict[str, Any]:
    """Describe a run at its start.

    Args:
        order: what will run; only the masked form of its plan is recorded.
        started_at: unix seconds.
    """
    plan = order.plan
    shown = json.loads(plan.to_json())
    return {
        "schema": _SCHEMA,
        "run_id": order.run_id,
        "kind": plan.kind,
        "name": plan.name,
        "facts": shown["facts"],
        "processes": shown["processes"],
        "inherited_env": _inherited(plan),
        "versions": {"python": platform.python_version(), **order.versions},
        "host": _host(),
        "started_at": started_at,
        "ended_at": None,
        "result": None,
    }


def complete(manifest: Mapping[str, Any], status: RunStatus) -> dict[str, Any]:
    """Add how the run ended."""
    return {**manifest, "ended_at": status.ended_at, "result": status.to_dict()}


def _inherited(plan: Plan) -> dict[str, str]:
    """Return the variables that shape a run; everything else of the environment stays private."""
    return {
        name: "***" if name in plan.secrets or _SECRET.search(name) else value
        for name, value in sorted(os.environ.items())
        if _RECORDED.fullmatch(name)
    }


def _host() -> dict[str, Any]:
    from flagscale_hw.detection import presence

    system = os.uname()
    return {
        "hostname": socket.gethostname(),
        "system": system.sysname,
        "kernel": system.release,
        "architecture": system.machine,
        "num_cpus": len(os.sched_getaffinity(0)),
        "chips": presence(),
    }
