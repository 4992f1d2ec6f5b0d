"""Start services and come back to them: prepare, run, status, logs, stop, list.

A target is what people have in hand: a FlagScale serve file, a recipe's name, a model directory, a run
directory or a run's id. Every function here takes one.

What does not live here: what a target means (`targets.py`), deciding what runs (`plan.py`), how a run stands
(`state.py`), printing (`cli`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import flagscale_hw as hw
from flagscale_serve import application
from flagscale_serve.application import Application
from flagscale_serve.checks import (
    check_addresses,
    check_disk,
    check_engines,
    check_models,
    check_ray,
    check_router,
)
from flagscale_serve.errors import EngineMissing, InvalidModel, InvalidService, NotServing, RunFailed
from flagscale_serve.fit import Fit, words_of
from flagscale_serve.hosts import check_routers
from flagscale_serve.model import Model
from flagscale_serve.plan import MAX_RESTARTS, READY_TIMEOUT_S, plan
from flagscale_serve.progress import details
from flagscale_serve.service import POLICIES, Front, Service
from flagscale_serve.state import ServiceStatus, status_of, with_load
from flagscale_serve.targets import Target, find_run, read_target

__all__ = [
    "Options",
    "Prepared",
    "check",
    "failure",
    "logs",
    "prepare",
    "run",
    "start",
    "status",
    "stop",
    "wait_ready",
]

_POLL_S = 0.05


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
    policy: str | None = None
    """How routers choose an instance, one of `service.POLICIES`."""
    run_dir: Path | None = None
    ready_timeout_s: float = READY_TIMEOUT_S
    max_restarts: int = MAX_RESTARTS
    """Of each instance by itself within ten minutes, once the service has been ready."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A service that was looked at and may be started."""

    service: Service | Application
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

    @property
    def api_key(self) -> str | None:
        """The key of its first instance, so that whoever starts it need not be told twice."""
        return self.service.instances[0].api_key if isinstance(self.service, Service) else None


def prepare(target: str, overrides: Sequence[str] = (), options: Options | None = None) -> Prepared:
    """Turn a target into a plan for this machine and a place for the run; starts and writes nothing.

    Raises:
        ConfigError: the file or an override is wrong.
        InvalidService: what is asked contradicts itself, the machine or the engine.
    """
    wish = options or Options()
    with ThreadPoolExecutor(1) as beside:  # the chips' tools answer while the contract is imported
        looking = beside.submit(hw.detect)
        asked = read_target(target, overrides, python=wish.python, engine=wish.engine)
        machine = looking.result()
    if asked.is_composed:
        return _prepare_application(asked, machine, wish)
    nodes = asked.nodes(machine)
    machine = nodes[0].machine if nodes else machine
    service = _with_wishes(asked.service(machine), wish)
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
        run_dir=wish.run_dir or _new_run_dir(asked.home),
        python=python,
        is_local=not nodes,
        is_cloud=asked.is_cloud,
        models=models,
        problem=problem,
    )


def _prepare_application(asked: Target, machine: hw.Machine, wish: Options) -> Prepared:
    if wish.policy is not None:
        raise InvalidService(
            f"policy: {wish.policy}: Ray Serve chooses among copies of a composed application: leave it out"
        )
    composed = application.compose(asked.experiment)
    composed = replace(
        composed, host=wish.host or composed.host, port=composed.port if wish.port is None else wish.port
    )
    return Prepared(
        service=composed,
        plan=application.plan_application(
            composed,
            machine,
            python=asked.python,
            ready_timeout_s=wish.ready_timeout_s,
            max_restarts=wish.max_restarts,
        ),
        run_dir=wish.run_dir or _new_run_dir(asked.home),
        python=asked.python,
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
        versions = check_engines(service, python, chip)
    except EngineMissing as error:
        problem = problem or error
    return models, versions, problem


def _with_wishes(service: Service, wish: Options) -> Service:
    """Let the command line choose how routers choose, and the address of the first door.

    That is a router's, or the first instance's.
    """
    if wish.policy is not None:
        service = replace(service, fronts=_by_policy(service.fronts, wish.policy))
    if wish.host is None and wish.port is None:
        return service
    if service.fronts and service.instances[0].name in service.fronts[0].members:
        front = service.fronts[0]
        front = replace(
            front, host=wish.host or front.host, port=front.port if wish.port is None else wish.port
        )
        return replace(service, fronts=(front, *service.fronts[1:]))
    first = service.instances[0]
    first = replace(first, host=wish.host or first.host, port=first.port if wish.port is None else wish.port)
    return replace(service, instances=(first, *service.instances[1:]))


def _by_policy(fronts: tuple[Front, ...], policy: str) -> tuple[Front, ...]:
    if policy not in POLICIES:
        raise InvalidService(f"policy: {policy!r}: unknown: give one of {', '.join(POLICIES)}")
    if not fronts:
        raise InvalidService(
            f"policy: {policy}: no router is started, for no instance has copies: leave it out, or ask for "
            "copies, such as serve.0.resources.num_replicas=2"
        )
    return tuple(replace(front, policy=policy) for front in fronts)


def check(prepared: Prepared) -> tuple[Model, ...]:
    """Look at the addresses, the models, whether they fit, the engines' Python, and room for the logs.

    On other hosts, `prepare` has looked already.

    Raises:
        InvalidService: a host is no address of this machine, or the weights do not fit the devices.
        InvalidModel: a model directory is not whole.
        EngineMissing: that Python lacks an engine or the router.
    """
    check_disk(prepared.run_dir)
    if isinstance(prepared.service, Application):
        check_addresses((prepared.service,))
        application.check_classes(prepared.service)
        check_ray(prepared.service, prepared.python)
        return ()
    if prepared.is_local:
        check_addresses((*prepared.service.instances, *prepared.service.fronts))
    for one in prepared.plan.facts["instances"]:
        if one.get("fit", {}).get("verdict") == "too big":
            raise InvalidService(words_of(Fit(**one["fit"])))
    if prepared.problem is not None:
        raise prepared.problem
    if prepared.is_local:
        check_router(prepared.service, sys.executable)
    elif not prepared.is_cloud:
        check_routers(prepared.plan, prepared.python)
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


def logs(
    target: str | None = None,
    overrides: Sequence[str] = (),
    *,
    follow: bool = False,
    last: int | None = None,
) -> Iterator[hw.LogLine]:
    """Yield the log lines of every instance.

    Args:
        target: as everywhere; without one, the only service that is alive, else the latest.
        overrides: Hydra overrides of the file.
        follow: go on as lines are written, until the service is over.
        last: begin with so many lines of each instance, 0 or more; None: with the first line.

    Raises:
        NotServing: there is no such run.
    """
    return find_run(target, overrides).logs(follow=follow, last=last)


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
