"""A graph of the user's own classes behind one address, on Ray Serve: FlagScale's composed applications.

The serve items name a class each (`module`, `name`) and the items that it calls before itself (`depends`).
A request's fields, which `deploy.request` declares, are given to `forward` of every class that depends on
nothing; the others get the answers of those they depend on, in that order; the answer of the one that nobody
depends on is the service's.

What does not live here: running the graph (`engines/ray_application.py`, in the engine's own Python).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_hw import File, Machine, Plan, Probe, Process, StopPolicy
from flagscale_serve.engines.adapter import text_of
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import absolute, port_of, shell_words

if TYPE_CHECKING:
    from flagscale_config import Experiment
    from flagscale_config.experiment import Resources, ServeInstance

__all__ = [
    "ENGINE",
    "INSTALL",
    "MODULES",
    "Application",
    "Step",
    "check_classes",
    "compose",
    "plan_application",
]

ENGINE = "ray"
"""What stands for the engine in facts and status."""
MODULES = ("ray", "starlette", "uvicorn", "pydantic")
"""What Ray Serve needs, and `ray` alone does not bring."""
INSTALL = "pip install 'flagscale-serve[ray]'"
_NAME = "application"
_LAUNCHER, _GRAPH = "ray_application.py", "application.json"
_GRACE_S = 30.0
_PLAIN = ("str", "int", "float", "bool", "list", "dict", "Any")
_GENERIC = ("Optional", "list", "dict", "List", "Dict")
_SCALING = ("min_replicas", "max_replicas", "downscale_delay_s", "upscale_delay_s", "target_ongoing_requests")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One class of the graph."""

    name: str
    """Its `serve_id`."""
    module: str
    """Absolute path of the Python file."""
    class_name: str
    depends: tuple[str, ...]
    num_replicas: int | str
    """A number, or `auto`."""
    num_gpus: float
    """Devices of each replica; a part of one is shared."""
    max_ongoing_requests: int | None
    scaling: Mapping[str, float]
    """Ray Serve's autoscaling; empty: the number of replicas is fixed."""


@dataclass(frozen=True, kw_only=True)
class Application:
    """A composed application, as its file asks for it."""

    name: str
    cwd: str
    route: str
    """Path of its address."""
    steps: tuple[Step, ...]
    request: tuple[Mapping[str, Any], ...]
    """Fields of a request: `arg`, `type`, `required`, `default`."""
    source: str
    host: str = "127.0.0.1"
    port: int | None = None
    env: Mapping[str, str]
    shell: tuple[str, ...]
    """Words in front of the command; see `Service.shell`."""

    @property
    def last(self) -> Step:
        """The class whose answer is the service's."""
        called = {name for step in self.steps for name in step.depends}
        return next(step for step in self.steps if step.name not in called)


def compose(experiment: Experiment) -> Application:
    """Describe the application that a serve file asks for.

    Raises:
        InvalidService: the classes form no graph with one end, an item names no class, or what is asked
            besides cannot be done for an application.
    """
    where, runner = experiment.source, experiment.runner
    asked = (
        ("runner.hostfile", runner.hostfile), ("runner.docker", runner.docker),
        ("runner.runtime_env", runner.runtime_env), ("cmds.after_stop", experiment.cmds.after_stop),
        ("runner.type", "cloud" if runner.type == "cloud" else None),
    )  # fmt: skip
    for key, value in asked:
        if value:
            raise InvalidService(
                f"{where}: experiment.{key}: {value!r}: a composed application runs on this machine, in the "
                "Python that is given: not supported by this version: remove it"
            )
    deploy = runner.deploy
    steps = tuple(
        _step(item, experiment.cwd, f"{where}: serve[{index}]") for index, item in enumerate(experiment.serve)
    )
    _check_graph(steps, where)
    for index, field in enumerate(deploy.request):
        _check_type(field.type, f"{where}: experiment.runner.deploy.request[{index}].type")
    route = "/" + (deploy.name or "").strip("/")
    return Application(
        name=experiment.name,
        cwd=str(absolute(deploy.working_dir or ".", experiment.cwd)),
        route=route,
        steps=steps,
        request=tuple(field.model_dump() for field in deploy.request),
        source=where,
        port=port_of(deploy.port, f"{where}: experiment.runner.deploy.port"),
        env=dict(experiment.envs),
        shell=shell_words((experiment.cmds.before_start or "").strip()),
    )


def _step(item: ServeInstance, cwd: str, where: str) -> Step:
    if not item.module or not item.name:
        raise InvalidService(
            f"{where}: {item.serve_id}: every item of a composed application is a class of yours: give "
            "module (a Python file) and name (a class in it), or serve models in a file of their own"
        )
    resources = item.resources
    return Step(
        name=item.serve_id,
        module=str(absolute(item.module, cwd)),
        class_name=item.name,
        depends=tuple(item.depends),
        num_replicas=_replicas(resources, where),
        num_gpus=_share(resources, where),
        max_ongoing_requests=resources.max_ongoing_requests,
        scaling={key: value for key in _SCALING if (value := getattr(resources, key)) is not None},
    )


def _replicas(resources: Resources, where: str) -> int | str:
    count = resources.num_replicas
    if count != "auto" and count < 1:
        raise InvalidService(f"{where}.resources.num_replicas: {count}: at least 1 is needed: correct it")
    return count


def _share(resources: Resources, where: str) -> float:
    """Read the devices of a replica: a whole number, or a part of one."""
    count = resources.num_gpus or 0.0
    if count < 0 or (count > 1 and count != int(count)):
        raise InvalidService(
            f"{where}.resources.num_gpus: {count:g}: a whole number, or a part of one device, is needed"
        )
    return count


def _check_graph(steps: Sequence[Step], where: str) -> None:
    graph = {step.name: step.depends for step in steps}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise InvalidService(f"{where}: serve: {circle}: a circle: let one of them not depend") from None
    called = {name for names in graph.values() for name in names}
    ends = [name for name in graph if name not in called]
    if len(ends) != 1:
        raise InvalidService(
            f"{where}: serve: {', '.join(ends)}: nobody depends on them, and one answer is expected: let one "
            "item depend on the others"
        )


def _check_type(text: str, where: str) -> None:
    """Allow plain types and containers of them; the text is never evaluated."""

    def is_known(node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in _PLAIN
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return node.value.id in _GENERIC and all(map(is_known, inner))
        return False

    try:
        known = is_known(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        known = False
    if not known:
        raise InvalidService(
            f"{where}: {text!r}: {', '.join(_PLAIN)} and Optional[...], list[...], dict[...] of them are "
            "allowed: correct it"
        )


def check_classes(application: Application) -> None:
    """Look for every class in its file, without running it, and whether `forward` takes what it will get.

    Raises:
        InvalidService: a file or class is not there, or its `forward` takes something else.
    """
    fields = [field["arg"] for field in application.request]
    for step in application.steps:
        where = f"{application.source}: {step.name}: {step.module}"
        try:
            tree = ast.parse(Path(step.module).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise InvalidService(f"{where}: {reason}: give the path of a Python file") from None
        except SyntaxError as error:
            raise InvalidService(f"{where}:{error.lineno}: {error.msg}: not Python: correct it") from None
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        if step.class_name not in classes:
            known = ", ".join(classes) or "none"
            raise InvalidService(
                f"{where}: class {step.class_name!r}: not in the file, whose classes are: {known}: correct "
                "name"
            )
        _check_forward(classes[step.class_name], step, fields, where)


def _check_forward(found: ast.ClassDef, step: Step, fields: Sequence[str], where: str) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    forward = next((one for one in found.body if isinstance(one, kinds) and one.name == "forward"), None)
    if forward is None:
        if found.bases:
            return  # it may be inherited
        raise InvalidService(f"{where}: class {found.name}: has no method `forward`: that is what is called")
    given = forward.args
    names = [one.arg for one in (*given.posonlyargs, *given.args)][1:]
    if step.depends and given.vararg is None and len(names) < len(step.depends):
        raise InvalidService(
            f"{where}: {found.name}.forward takes {len(names)} values: it depends on "
            f"{', '.join(step.depends)}, so it gets {len(step.depends)}: let it take them"
        )
    taken = {*names, *(one.arg for one in given.kwonlyargs)}
    if not step.depends and given.kwarg is None and (strange := [one for one in fields if one not in taken]):
        raise InvalidService(
            f"{where}: {found.name}.forward takes no {', '.join(strange)}: it depends on nothing, so it gets "
            "every field of experiment.runner.deploy.request: let it take them, or **fields"
        )


def plan_application(
    application: Application, machine: Machine, *, python: str, ready_timeout_s: float, max_restarts: int
) -> Plan:
    """Decide everything about an application: one process, which starts Ray's own and ends them.

    Raises:
        InvalidService: devices are asked for that this machine does not have.
    """
    devices = len(machine.visible)
    wanted = sum(one.num_gpus * _least(one) for one in application.steps)
    if wanted > devices:
        raise InvalidService(
            f"{application.source}: resources.num_gpus: {wanted:g} devices in all: this process may use "
            f"{devices} ({machine.chip}): ask for fewer"
        )
    graph = {
        "name": application.name,
        "route": application.route,
        "num_gpus": devices,
        "request": [dict(one) for one in application.request],
        "steps": [asdict(one) for one in application.steps],
    }
    host = application.host
    reached = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104 - compared, never bound
    argv = (python, f"{{run_dir}}/{_LAUNCHER}", f"{{run_dir}}/{_GRAPH}", host, f"{{port:{_NAME}}}")
    exposed = not host.startswith("127.") and host not in ("localhost", "::1")
    return Plan(
        kind="serve",
        name=application.name,
        processes=(
            Process(
                name=_NAME,
                argv=(*application.shell, *argv),
                env={"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", **application.env},
                cwd=application.cwd,
                max_restarts=max_restarts,
                is_service=True,
            ),
        ),
        files=(
            File(path=_LAUNCHER, text=text_of(_LAUNCHER)),
            File(path=_GRAPH, text=json.dumps(graph, indent=2) + "\n"),
        ),
        ports={_NAME: application.port},
        probes=(
            Probe(
                url=f"http://{reached}:{{port:{_NAME}}}{application.route}",
                expect="ready",
                interval_s=0.25,
                timeout_s=ready_timeout_s,
                process=_NAME if max_restarts else None,
            ),
        ),
        stop=StopPolicy(grace_s=_GRACE_S),
        facts={
            "source": application.source,
            "chip": machine.chip,
            "warnings": [f"{_NAME}: host {host}: anybody who reaches this machine can use it"]
            if exposed
            else [],
            "devices_per_host": 0,
            "graph": {one.name: list(one.depends) for one in application.steps},
            "instances": [
                {
                    "name": _NAME, "engine": ENGINE, "model": application.last.module,
                    "served_names": [application.name], "host": reached, "path": application.route,
                    "needs_key": False, "tokenizer": application.last.module, "chat_template": None,
                    "options": [],
                }
            ],
        },
    )  # fmt: skip


def _least(step: Step) -> float:
    """Return how many replicas there are at the fewest."""
    if step.scaling:
        return step.scaling.get("min_replicas", 1)
    return step.num_replicas if isinstance(step.num_replicas, int) else 1
