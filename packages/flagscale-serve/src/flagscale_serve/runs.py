"""Start services and come back to them: prepare, run, status, logs, stop, list.

A target is what people have in hand: a FlagScale serve file, a recipe's name, a model directory, a run
directory or a run's id. Every function here takes one.

What does not live here: deciding what runs (`plan.py`), talking to the model (`chat.py`), printing
(`cli.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import flagscale_hw as hw
from flagscale_serve.checks import check_addresses, check_engines, check_models, check_router
from flagscale_serve.engines import default_engine, engine_named
from flagscale_serve.engines.vllm import MODULE as VLLM_MODULE
from flagscale_serve.errors import EngineMissing, InvalidModel, InvalidService, NotServing, RunFailed
from flagscale_serve.fit import Fit, words_of
from flagscale_serve.hosts import Node, find_nodes, promised_nodes
from flagscale_serve.metrics import Load, read_load
from flagscale_serve.model import Model, has_chat_template
from flagscale_serve.plan import MAX_RESTARTS, READY_TIMEOUT_S, plan
from flagscale_serve.progress import details
from flagscale_serve.router import DISTRIBUTION
from flagscale_serve.router import ENGINE as ROUTER
from flagscale_serve.service import Service, of_experiment, of_model

__all__ = [
    "InstanceStatus",
    "Options",
    "Prepared",
    "ServiceStatus",
    "check",
    "failure",
    "find_run",
    "list_runs",
    "logs",
    "prepare",
    "read_plan",
    "run",
    "start",
    "status",
    "status_of",
    "stop",
    "vllm_python",
    "wait_ready",
    "with_load",
]

_POLL_S = 0.1
_TASK = "serve"
_ALIVE = ("starting", "running", "ready", "stopping")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to start, beside what the target says."""

    engine: str | None = None
    """Serve with this engine, whatever the file says."""
    python: str | None = None
    """Interpreter that has the engine; else `$FLAGSCALE_SERVE_PYTHON`, else the one that runs this."""
    host: str | None = None
    port: int | None = None
    """Of the first instance; wins over the file."""
    run_dir: Path | None = None
    ready_timeout_s: float = READY_TIMEOUT_S
    max_restarts: int = MAX_RESTARTS
    """Of each instance by itself within ten minutes, once the service has been ready."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A service that was looked at and may be started."""

    service: Service
    plan: hw.Plan
    run_dir: Path
    python: str
    is_local: bool = True
    """Everything runs on this host."""
    is_cloud: bool = False
    """A cluster starts it, not this command."""
    models: tuple[Model, ...] = ()
    """What the model of each instance says about itself; none where it could not be read."""
    problem: InvalidModel | EngineMissing | None = None
    """Why it cannot be started here, although it can be planned."""


@dataclass(frozen=True, kw_only=True)
class InstanceStatus:
    """One instance as clients see it."""

    name: str
    engine: str
    model: str
    """What clients write as `model`."""
    model_dir: str
    url: str | None
    """Base address for OpenAI clients, ending in `/v1`; None until its port is known."""
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


def prepare(target: str, overrides: Sequence[str] = (), options: Options | None = None) -> Prepared:
    """Turn a target into a plan for this machine and a place for the run; starts and writes nothing.

    Raises:
        ConfigError: the file or an override is wrong.
        InvalidService: what is asked contradicts itself, the machine or the engine.
    """
    wish = options or Options()
    machine = hw.detect()
    asked = _read_target(target, overrides, wish)
    nodes = asked.nodes(machine)
    machine = nodes[0].machine if nodes else machine
    service, home = asked.service(machine)
    service = _with_wishes(service, wish)
    python = asked.python
    models, versions, problem = _look(service, python, machine.chip, is_local=not nodes)
    made = plan(
        service,
        machine,
        nodes=nodes,
        python=python,
        router_python=python if nodes else sys.executable,
        ready_timeout_s=wish.ready_timeout_s,
        max_restarts=wish.max_restarts,
        versions=versions,
        models={str(model.path): model for model in models},
    )
    return Prepared(
        service=service,
        plan=made,
        run_dir=wish.run_dir or _new_run_dir(home),
        python=python,
        is_local=not nodes,
        is_cloud=asked.is_cloud,
        models=models,
        problem=problem,
    )


def _look(
    service: Service, python: str, chip: str, *, is_local: bool
) -> tuple[tuple[Model, ...], dict[str, str], InvalidModel | EngineMissing | None]:
    """Read the models and the engines' versions; what is wrong is kept, because a plan is possible anyway.

    Other hosts have been asked already whether they have both; a model that lies here too is read for its
    numbers.
    """
    models: tuple[Model, ...] = ()
    versions: dict[str, str] = {}
    problem: InvalidModel | EngineMissing | None = None
    try:
        models = check_models(service, chip)
    except InvalidModel as error:
        problem = error
    if not is_local:
        return models, {}, None
    try:
        versions = check_engines(service, python)
    except EngineMissing as error:
        problem = problem or error
    return models, versions, problem


def _with_wishes(service: Service, wish: Options) -> Service:
    """Let the command line choose the address of the first door: a router's, or the first instance's."""
    if wish.host is None and wish.port is None:
        return service
    if service.fronts and service.instances[0].name in service.fronts[0].members:
        front = service.fronts[0]
        front = replace(front, host=wish.host or front.host, port=wish.port or front.port)
        return replace(service, fronts=(front, *service.fronts[1:]))
    first = service.instances[0]
    first = replace(first, host=wish.host or first.host, port=wish.port or first.port)
    return replace(service, instances=(first, *service.instances[1:]))


def check(prepared: Prepared) -> tuple[Model, ...]:
    """Look at the addresses, the models, whether they fit, and the engines' Python.

    On other hosts, `prepare` has looked already.

    Raises:
        InvalidService: a host is no address of this machine, or the weights do not fit the devices.
        InvalidModel: a model directory is not whole.
        EngineMissing: that Python lacks an engine or the router.
    """
    if prepared.is_local:
        check_addresses(prepared.service)
        check_router(prepared.service, sys.executable)
    for one in prepared.plan.facts["instances"]:
        if one.get("fit", {}).get("verdict") == "too big":
            raise InvalidService(words_of(Fit(**one["fit"])))
    if prepared.problem is not None:
        raise prepared.problem
    return prepared.models


def start(prepared: Prepared, *, detach: bool) -> hw.Run:
    """Start it and return at once.

    Args:
        prepared: from `prepare`, best after `check`.
        detach: False ends the run together with the calling process.

    Raises:
        LaunchRefused: a port is in use, or the run directory holds a run.
    """
    if prepared.is_cloud:
        raise InvalidService(
            "experiment.runner.type: 'cloud': the cluster starts the pods, not this command: apply what "
            "`flagscale-serve plan --as lws --image IMAGE` prints with `kubectl apply -f -`"
        )
    run = hw.launch(prepared.plan, prepared.run_dir, detach=detach)
    _point_to(prepared.run_dir)
    return run


def run(
    target: str, overrides: Sequence[str] = (), options: Options | None = None, *, wait: bool = True
) -> hw.Run:
    """Serve a target in the background.

    Args:
        target: serve file, recipe or model directory.
        overrides: Hydra overrides of the file.
        options: how to start.
        wait: return when every instance has generated a token; False returns at once.

    Raises:
        InvalidService, InvalidModel, EngineMissing: it cannot be started as asked.
        LaunchRefused: a port is in use.
        RunFailed: it ended, or did not get ready in time; nothing of it is left.
    """
    prepared = prepare(target, overrides, options)
    check(prepared)
    started = start(prepared, detach=True)
    if wait:
        wait_ready(started)
    return started


def wait_ready(run: hw.Run) -> ServiceStatus:
    """Wait for the first token of every instance.

    Raises:
        RunFailed: the run is over.
    """
    while not ((now := run.status()).is_over or now.state == "ready"):
        time.sleep(_POLL_S)
    if now.state != "ready":
        raise failure(run, now)
    return status_of(run)


def failure(run: hw.Run, now: hw.RunStatus) -> RunFailed:
    """Describe the end of a run that was meant to go on."""
    more = [details(now.reason, log) for log in sorted((run.dir / "logs").glob("*.log"))]
    said = "; ".join(text for text in more if text)
    reason = f"{now.reason or 'it was stopped'}{f' ({said})' if said else ''}"
    return RunFailed(f"{run.name}: {now.state}: {reason}: the whole log is in {run.dir / 'logs'}")


def status(target: str | None = None, overrides: Sequence[str] = ()) -> ServiceStatus:
    """Say how the service of a target stands; without one, the only one that is alive, else the latest.

    Raises:
        NotServing: there is none.
    """
    return with_load(status_of(find_run(target, overrides)))


def with_load(now: ServiceStatus) -> ServiceStatus:
    """Ask every instance of a service that is ready how busy it is."""
    if not now.is_ready:
        return now
    from concurrent.futures import ThreadPoolExecutor

    asked = [one for one in now.instances if one.url is not None and one.engine != ROUTER]
    with ThreadPoolExecutor(max_workers=max(1, min(32, len(asked)))) as pool:
        answers = pool.map(lambda one: read_load(str(one.url)), asked)
        loads = dict(zip([one.name for one in asked], answers, strict=True))
    return replace(now, instances=tuple(replace(one, load=loads.get(one.name)) for one in now.instances))


def logs(
    target: str | None = None, overrides: Sequence[str] = (), *, follow: bool = False
) -> Iterator[hw.LogLine]:
    """Yield the log lines of every instance.

    Raises:
        NotServing: there is no such run.
    """
    return find_run(target, overrides).logs(follow=follow)


def stop(
    target: str | None = None, overrides: Sequence[str] = (), *, grace_s: float | None = None
) -> ServiceStatus:
    """End the service of a target and wait until nothing of it is left.

    Args:
        target: as everywhere; without one, the only service that is alive.
        overrides: Hydra overrides of the file.
        grace_s: seconds in which requests under way may end before it is killed; the engine's own habit when
            None. New requests are refused from the start.

    Raises:
        NotServing: there is none that is alive.
    """
    run = find_run(target, overrides, alive=target is None)
    now = run.status()
    if now.is_over:
        raise NotServing(
            f"{run.dir}: not running: it is {now.state}{f' ({now.reason})' if now.reason else ''}"
        )
    run.stop(grace_s)
    return status_of(run)


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
                url=_url(one["host"], now.ports.get(one["name"])),
                pid=_pid_of(processes.get(one["name"])),
                is_ready=_is_ready(now, processes.get(one["name"])),
                restarts=processes[one["name"]].restarts if one["name"] in processes else 0,
                log=str(_log_of(run, made, one["name"])),
                has_chat_template=_can_chat(one),
                tokenizer=one["tokenizer"],
                behind=one.get("behind"),
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


def _log_of(run: hw.Run, made: dict[str, Any], name: str) -> Path:
    """Return where the log of a process is; on other hosts, in the folder of the host."""
    hosts = {process["name"]: process.get("host", "local") for process in made.get("processes", ())}
    host = hosts.get(name, "local")
    return (run.dir if host == "local" else run.dir / "hosts" / host) / "logs" / f"{name}.log"


def find_run(target: str | None, overrides: Sequence[str] = (), *, alive: bool = False) -> hw.Run:
    """Find the run that a target means.

    Args:
        target: run directory, run id, serve file, recipe or model directory; None: the only one alive.
        overrides: Hydra overrides of the file.
        alive: with no target, do not fall back on the latest one that has ended.

    Raises:
        NotServing: there is none, or several could be meant.
    """
    if target is None:
        return _only_run(alive=alive)
    path = Path(target)
    if (path / "plan.json").is_file():
        return hw.open_run(path.absolute())
    for known in reversed(list_runs()):
        if Path(known.run_dir).name == target:
            return hw.open_run(Path(known.run_dir))
    if path.is_dir() or path.suffix == ".gguf":
        return _run_of_model(path.resolve())
    experiment = _load(target, overrides)
    latest = Path(experiment.exp_dir) / "runs" / "latest"
    if not (latest / "plan.json").is_file():
        raise NotServing(
            f"{target}: no run yet in {latest.parent}: start one with `flagscale-serve run {target}`"
        )
    return hw.open_run(latest.resolve())


def _only_run(*, alive: bool) -> hw.Run:
    known = list_runs()
    living = [one for one in known if not one.is_over]
    if len(living) > 1:
        ids = ", ".join(Path(one.run_dir).name for one in living)
        raise NotServing(f"{len(living)} services are running ({ids}): say which one")
    chosen = living or ([] if alive else list(known[-1:]))
    if not chosen:
        raise NotServing("no service is running: start one with `flagscale-serve run FILE_OR_MODEL_DIR`")
    return hw.open_run(Path(chosen[0].run_dir))


def _run_of_model(path: Path) -> hw.Run:
    of_it = [one for one in list_runs() if any(Path(i.model_dir).resolve() == path for i in one.instances)]
    if not of_it:
        raise NotServing(
            f"{path}: no run of this model is known: start one with `flagscale-serve run {path}`"
        )
    living = [one for one in of_it if not one.is_over]
    return hw.open_run(Path((living or of_it)[-1].run_dir))


@dataclass(frozen=True)
class _Target:
    """What a target means: a serve file, or a model by its path."""

    path: str
    experiment: Any
    wish: Options

    @property
    def python(self) -> str:
        """The engine's interpreter; after the user's own shell text it is the `python` on the path."""
        chosen = self.wish.python or os.environ.get("FLAGSCALE_SERVE_PYTHON")
        has_shell = self.experiment is not None and bool((self.experiment.cmds.before_start or "").strip())
        if chosen is None:
            if self.experiment is not None and self.experiment.runner.docker:
                return "python3"  # of the container, whose paths are its own
            return "python" if has_shell else sys.executable
        if "/" in chosen:
            # Not resolved: the link in a virtual environment is what makes it one.
            return str(Path(chosen).absolute())
        return chosen if has_shell else shutil.which(chosen) or chosen

    @property
    def is_cloud(self) -> bool:
        """Tell whether a cluster chooses the hosts."""
        return self.experiment is not None and self.experiment.runner.type == "cloud"

    def nodes(self, machine: hw.Machine) -> tuple[Node, ...]:
        if self.experiment is None:
            return ()
        if self.is_cloud:
            return promised_nodes(self.experiment, machine)
        task = self.experiment.task.backend
        names = {self.wish.engine or item.engine or task or "vllm" for item in self.experiment.serve}
        packages = [word for name in sorted(names) for word in engine_named(name).distributions]
        copies = [item.resources.num_replicas for item in self.experiment.serve]
        if self.experiment.runner.deploy.prefill_decode_disaggregation or set(copies) - {1, None}:
            packages.append(DISTRIBUTION)
        return find_nodes(self.experiment, python=self.python, packages=packages)

    def service(self, machine: hw.Machine) -> tuple[Service, Path]:
        """Return the service and the directory in which its runs live."""
        default = default_engine(machine.chip).name
        if self.experiment is None:
            is_gguf = self.path.endswith(".gguf")
            engine = self.wish.engine or ("llama_cpp" if is_gguf else default)
            service = of_model(self.path, cwd=str(Path.cwd()), engine=engine)
            return service, _state_dir() / service.name
        service = of_experiment(self.experiment, default_engine=default, engine=self.wish.engine)
        return service, Path(self.experiment.exp_dir) / "runs"


def _read_target(target: str, overrides: Sequence[str], wish: Options) -> _Target:
    path = Path(target)
    if path.is_dir() or path.suffix == ".gguf":
        if overrides:
            raise InvalidService(
                f"{target}: {overrides[0]}: overrides belong to a serve file: a model takes "
                "options such as --port"
            )
        return _Target(target, None, wish)
    return _Target(target, _load(target, overrides), wish)


def _load(target: str, overrides: Sequence[str]) -> Any:
    from flagscale_config import load, recipes

    is_file = Path(target).exists() or Path(target).suffix in (".yaml", ".yml")
    if not is_file and target not in recipes(_TASK):
        raise InvalidService(
            f"{target}: no such model directory, serve file, recipe or run: give the path of a directory "
            "with config.json, of a FlagScale serve file (.yaml), or a name that `flagscale-config "
            "recipes` lists"
        )
    return load(target, overrides, task=_TASK)


def _state_dir() -> Path:
    own = os.environ.get("FLAGSCALE_STATE_DIR")
    if own:
        return Path(own).absolute() / "serve"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "flagscale" / "serve"


def _new_run_dir(home: Path) -> Path:
    """Name a run by the time of its start, to the second; two in one second get different names."""
    base = time.strftime("%Y%m%d-%H%M%S")
    count = 1
    while (path := home / (base if count == 1 else f"{base}-{count}")).exists():
        count += 1
    return path


def _point_to(run_dir: Path) -> None:
    """Let `latest` beside the run mean this run; replaced at once, so it never points nowhere.

    A file system without links, or without space, is no reason to fail: the run has started.
    """
    link = run_dir.parent / "latest"
    if link.exists() and not link.is_symlink():
        return
    beside = run_dir.parent / f".latest.{os.getpid()}"
    with suppress(OSError):
        beside.unlink(missing_ok=True)
        beside.symlink_to(run_dir.name, target_is_directory=True)
        beside.replace(link)


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


def _url(host: str, port: int | None) -> str | None:
    return None if port is None else f"http://{host}:{port}/v1"
