"""How services stand: what is known of runs on this machine, for people and programs.

What does not live here: which run a target means (`targets.py`), starting and stopping (`runs.py`).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import flagscale_hw as hw
from flagscale_serve.application import ENGINE as APPLICATION
from flagscale_serve.engines.vllm import MODULE as VLLM_MODULE
from flagscale_serve.metrics import Load, read_load
from flagscale_serve.model import has_chat_template
from flagscale_serve.router import ENGINE as ROUTER

__all__ = [
    "InstanceStatus",
    "ServiceStatus",
    "list_runs",
    "read_plan",
    "status_of",
    "vllm_python",
    "with_load",
]

_ALIVE = ("starting", "running", "ready", "stopping")


@dataclass(frozen=True, kw_only=True)
class InstanceStatus:
    """One instance as clients see it."""

    name: str
    engine: str
    model: str
    """What clients write as `model`."""
    model_dir: str
    url: str | None
    """Base address for OpenAI clients, ending in `/v1`, or of a composed application; None until its port is
    known."""
    pid: int | None
    log: str
    has_chat_template: bool
    tokenizer: str
    """Directory of the tokenizer."""
    is_ready: bool
    """It has generated a token, and has not ended since."""
    restarts: int = 0
    """How often it was started again."""
    behind: str | None = None
    """The router in front of it."""
    hosts: tuple[str, ...] = ()
    """The hosts that it spans, as the hostfile has them, its head first; none where there is no hostfile."""
    load: Load | None = None
    """How busy it is, where it was asked and tells."""


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """How a service stands."""

    name: str
    run_dir: str
    state: str
    is_ready: bool
    """Every instance has generated a token."""
    reason: str
    """The first cause when something went wrong, else empty."""
    started_at: float | None
    """Unix seconds."""
    ended_at: float | None
    instances: tuple[InstanceStatus, ...]

    @property
    def is_over(self) -> bool:
        """Tell whether nothing will happen any more."""
        return self.state not in _ALIVE

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return asdict(self)


def list_runs() -> tuple[ServiceStatus, ...]:
    """Return every service known on this machine, the latest last."""
    found = [status_of(run) for run in hw.list_runs() if read_plan(run).get("kind") == "serve"]
    return tuple(sorted(found, key=lambda one: one.started_at or 0.0))


def status_of(run: hw.Run) -> ServiceStatus:
    """Say how one run stands."""
    now, made = run.status(), read_plan(run)
    processes = {process.name: process for process in now.processes}
    return ServiceStatus(
        name=str(made.get("name", run.dir.name)),
        run_dir=str(run.dir),
        state=now.state,
        is_ready=now.state == "ready",
        reason=now.reason,
        started_at=now.started_at,
        ended_at=now.ended_at,
        instances=tuple(
            InstanceStatus(
                name=one["name"],
                engine=one["engine"],
                model=one["served_names"][0],
                model_dir=one["model"],
                url=_url(one["host"], now.ports.get(one["name"]), one.get("path", "/v1")),
                pid=_pid_of(processes.get(one["name"])),
                is_ready=_is_ready(now, processes.get(one["name"])),
                restarts=processes[one["name"]].restarts if one["name"] in processes else 0,
                log=str(_log_of(run, made, one["name"])),
                has_chat_template=_can_chat(one),
                tokenizer=one["tokenizer"],
                behind=one.get("behind"),
                hosts=_hosts_of(made, one["name"]),
            )
            for one in made.get("facts", {}).get("instances", ())
        ),
    )


def _pid_of(process: hw.ProcessStatus | None) -> int | None:
    return None if process is None else process.pid


def _is_ready(now: hw.RunStatus, process: hw.ProcessStatus | None) -> bool:
    """Tell whether an instance can be asked, although another one may be starting again."""
    return now.state == "ready" or bool(
        now.state == "starting" and process is not None and process.is_running and process.ready_at
    )


def _hosts_of(made: dict[str, Any], name: str) -> tuple[str, ...]:
    """List the hosts of an instance: its other ranks are named after it."""
    mine = re.compile(rf"{re.escape(name)}(-rank-\d+)?(-ray)?")
    hosts = [one.get("host", "local") for one in made.get("processes", ()) if mine.fullmatch(one["name"])]
    return tuple(dict.fromkeys(host for host in hosts if host != "local"))


def _log_of(run: hw.Run, made: dict[str, Any], name: str) -> Path:
    """Return where the log of a process is; on other hosts, in the folder of the host."""
    hosts = {process["name"]: process.get("host", "local") for process in made.get("processes", ())}
    host = hosts.get(name, "local")
    return (run.dir if host == "local" else run.dir / "hosts" / host) / "logs" / f"{name}.log"


def with_load(now: ServiceStatus) -> ServiceStatus:
    """Ask every instance of a service that is ready how busy it is."""
    if not now.is_ready:
        return now
    from concurrent.futures import ThreadPoolExecutor

    asked = [one for one in now.instances if one.url is not None and one.engine not in (ROUTER, APPLICATION)]
    with ThreadPoolExecutor(max_workers=max(1, min(32, len(asked)))) as pool:
        answers = pool.map(lambda one: read_load(str(one.url)), asked)
        loads = dict(zip([one.name for one in asked], answers, strict=True))
    return replace(now, instances=tuple(replace(one, load=loads.get(one.name)) for one in now.instances))


def read_plan(run: hw.Run) -> dict[str, Any]:
    """Return the plan of a run as plain data; empty when it cannot be read."""
    try:
        data = json.loads((run.dir / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def vllm_python(run: hw.Run) -> str | None:
    """Return the interpreter that runs a vLLM of a run; None where there is none on this host."""
    for process in read_plan(run).get("processes", ()):
        argv = process["argv"]
        if process.get("host", "local") == "local" and VLLM_MODULE in argv:
            return str(argv[argv.index(VLLM_MODULE) - 2])
    return None


def _can_chat(instance: dict[str, Any]) -> bool:
    """Tell whether the model knows how to write a conversation; one that is gone does not."""
    path = Path(instance["tokenizer"])
    # llama.cpp has templates of its own for a file that brings none.
    return bool(instance["chat_template"]) or path.suffix == ".gguf" or has_chat_template(path)


def _url(host: str, port: int | None, path: str) -> str | None:
    return None if port is None else f"http://{host}:{port}{path}"
