"""From a file to an `Experiment`: the one entry of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from os import PathLike
from pathlib import Path as FilePath
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError

from flagscale_config.base import Model
from flagscale_config.compose import compose
from flagscale_config.errors import ConfigError, Origin, Problem, show, sort_problems
from flagscale_config.experiment import Experiment
from flagscale_config.experiment_section import SHORTCUTS, ExperimentSection
from flagscale_config.findings import Findings
from flagscale_config.launch import check_launch
from flagscale_config.model_scripts import model_script
from flagscale_config.overlays import read_overlays
from flagscale_config.placeholders import without_placeholders
from flagscale_config.recipe import recipes
from flagscale_config.resolve import MISSING, resolve
from flagscale_config.runner import Runner, Task
from flagscale_config.sections import read_model
from flagscale_config.serving import typed_options
from flagscale_config.suggest import suggestion
from flagscale_config.task import TASKS, check_task, read_task
from flagscale_config.tuning import check_tuner
from flagscale_config.versions import using

__all__ = ["check", "load"]

_TOP = ("experiment", "action", "hydra", "defaults", "device_type_specific", "node_specific", *TASKS)
_ENV_SECTIONS = {
    "device_type_specific": "device_type_envs",
    "node_specific": "node_envs",
    "nodes_envs": "node_envs",
}


def load(
    source: str | PathLike[str],
    overrides: Sequence[str] = (),
    *,
    task: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> Experiment:
    """Load a FlagScale experiment file, or a recipe by name such as `qwen3/0_6b`.

    Args:
        source: path of the experiment file; the files its defaults list names lie next to it.
        overrides: in Hydra's grammar: `a.b=c`, `+a.b=c`, `++a.b=c`, `~a.b`, `group=name`.
        task: which recipe is meant where a name is offered for several tasks, such as `train` and `serve`.
        versions: versions of engines, such as `{"vllm": "0.33"}`, where other ones are meant than those
            installed here, or the newest known.

    Raises:
        ConfigError: everything that is wrong with the files and overrides, each with its place.
    """
    experiment, problems = _load(find(source, task), overrides, versions)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors or experiment is None:
        raise ConfigError(errors)
    return experiment


def check(
    source: str | PathLike[str], overrides: Sequence[str] = (), *, versions: Mapping[str, str] | None = None
) -> tuple[Problem, ...]:
    """Return all errors and notes about an experiment file; an empty tuple when there is nothing to say.

    `versions` are versions of engines, as for `load`.
    """
    try:
        return sort_problems(_load(find(source), overrides, versions)[1])
    except ConfigError as error:
        return error.problems


def _load(
    path: FilePath, overrides: Sequence[str], versions: Mapping[str, str] | None
) -> tuple[Experiment | None, list[Problem]]:
    composed = compose(path, overrides)
    data, unresolved = resolve(composed)
    findings = Findings(composed)
    findings.problems += unresolved
    with using(versions):
        experiment = _read(without_placeholders(data, findings), findings, path)
    return experiment, findings.problems + findings.notes


def find(source: str | PathLike[str], task: str | None = None) -> FilePath:
    """Return the path of an experiment file given by path, without its suffix, or by recipe name.

    Raises:
        ConfigError: there is no such file and no such recipe.
    """
    if not os.fspath(source):
        nameless = Problem(
            code="config/no-file", message="the name of the file is empty; give its path", given=""
        )
        raise ConfigError([nameless])
    path = FilePath(source)
    if os.path.isfile(path):  # noqa: PTH113  Path raises on names too long to be
        return path
    beside = FilePath(f"{path}.yaml")
    if os.path.isfile(beside):  # noqa: PTH113
        return beside
    known = recipes(task)
    name = os.fspath(source)
    if name in known:
        return known[name]
    place = Origin(file=name)
    qualified = [known_name for known_name in known if known_name.endswith(f":{name}")]
    if qualified:
        message = f"offered for several tasks; say {' or '.join(qualified)}"
    elif os.path.isdir(path):  # noqa: PTH112
        message = "is a directory; name an experiment file in it"
    elif path.suffix or not known:
        message = "no such file; check the path"
    else:
        near = get_close_matches(name, known, 1, 0.7)
        message = "no such file and no such recipe" + (f"; did you mean {near[0]}?" if near else "")
    raise ConfigError([Problem(code="config/no-file", message=message, origin=place, given=name)])


def _read(data: Mapping[str, Any], findings: Findings, source: FilePath) -> Experiment | None:
    """Read the whole composed file; None when something needed for an `Experiment` is missing."""
    for key in data:
        if key not in _TOP:
            hint = suggestion(key, None, (key,), sections=_TOP)
            findings.error("config/unknown-key", (key,), f"unknown key{hint}", data[key], hint=hint)
    check_launch(data.get("action"), findings)
    section = _section(data.get("experiment"), findings)
    kind = _task_type(data, section)
    runner = section.runner if section is not None else None
    task = section.task if section is not None else _raw_task(data)
    if task is not None:
        check_task(task, findings)
    if isinstance(data.get("experiment"), Mapping):
        check_tuner(data["experiment"].get("auto_tuner"), kind, findings)
    fields = read_task(data, task, kind, runner, findings)
    fields.update(read_overlays(data, kind, findings))
    if section is None or findings.problems:
        return None
    fields.update(_fields(section, source, findings))
    if findings.problems:
        return None
    return Experiment.located(findings.origins, findings.notes, **fields)


def _section(tree: Any, findings: Findings) -> ExperimentSection | None:
    """Read the `experiment` section, after moving what older files have elsewhere."""
    if not isinstance(tree, Mapping):
        if tree is not MISSING:
            message = "experiment is required: a mapping with exp_name, exp_dir and task"
            findings.error("config/required", ("experiment",) if tree is not None else (), message)
        return None
    content = _without_nulls(tree, ExperimentSection)
    if isinstance(content.get("runner"), Mapping):
        content["runner"] = _runner(content["runner"], findings)
    _move_deploy(content, findings)
    return read_model(ExperimentSection, content, ("experiment",), findings)


def _without_nulls(tree: Mapping[str, Any], model: type[Model]) -> dict[str, Any]:
    """Leave out known keys that are null, so that defaults apply; unknown ones stay to be reported."""
    known = {name for name, field in model.model_fields.items() if not field.is_required()}
    return {key: value for key, value in tree.items() if value is not None or key not in known}


def _move_deploy(content: dict[str, Any], findings: Findings) -> None:
    """Move `experiment.deploy` to `experiment.runner.deploy`, unless one of them is too odd to be joined."""
    runner, deploy = content.get("runner", {}), content.get("deploy")
    inner = runner.get("deploy", {}) if isinstance(runner, Mapping) else None
    if isinstance(deploy, Mapping) and isinstance(inner, Mapping):
        message = "moved to experiment.runner.deploy; write it there"
        findings.note("config/moved", ("experiment", "deploy"), message)
        findings.composed.move(("experiment", "deploy"), ("experiment", "runner", "deploy"))
        del content["deploy"]
        content["runner"] = {**runner, "deploy": {**inner, **deploy}}


def _runner(tree: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Explain a misplaced `type`, leave out what is null."""
    content = _without_nulls(tree, Runner)
    if content.get("type") == "torchrun":
        message = "torchrun is a backend, not a type: write backend: torchrun (read so)"
        findings.note("config/moved", ("experiment", "runner", "type"), message, "torchrun")
        del content["type"]
    return content


def _raw_task(data: Mapping[str, Any]) -> Task | None:
    """Return the task of an `experiment` section that is broken elsewhere: it says how to read the rest."""
    experiment = data.get("experiment")
    try:
        return Task.model_validate(experiment.get("task") if isinstance(experiment, Mapping) else None)
    except ValidationError:
        return None


def _task_type(data: Mapping[str, Any], section: ExperimentSection | None) -> str | None:
    """Return the task's type, from the raw text when the section is broken elsewhere."""
    if section is not None:
        return section.task.type
    experiment = data.get("experiment")
    task = experiment.get("task") if isinstance(experiment, Mapping) else None
    kind = task.get("type") if isinstance(task, Mapping) else None
    if kind in TASKS:
        return str(kind)
    present = [name for name in TASKS if data.get(name) is not None]
    return present[0] if len(present) == 1 else None


def _fields(section: ExperimentSection, source: FilePath, findings: Findings) -> dict[str, Any]:
    """Return the fields of an `Experiment` that come from the `experiment` section."""
    cwd = FilePath.cwd()
    exp_dir = section.exp_dir if "exp_dir" in section.model_fields_set else f"outputs/{section.exp_name}"
    if section.task.type in {"train", "serve"} and _is_unused(section.task.entrypoint):
        message = "is not used: the engine is started by the runner itself"
        findings.note(
            "config/no-effect", ("experiment", "task", "entrypoint"), message, section.task.entrypoint
        )
    return {
        "name": section.exp_name,
        "exp_dir": str(cwd / exp_dir),
        "cwd": str(cwd),
        "source": str(source.absolute()),
        "seed": section.seed,
        "shortcuts": {key: getattr(section, key) for key in SHORTCUTS if getattr(section, key) is not None},
        "task": section.task,
        "runner": section.runner,
        "cmds": section.cmds or {},
        "node_args": _node_args(section, findings),
        "auto_tuner": section.auto_tuner,
        "notes": tuple(str(note) for note in sort_problems(findings.notes)),
        **_environments(section.envs or {}, findings),
    }


def _is_unused(entrypoint: str | None) -> bool:
    """Whether an entrypoint names a script that our runners stand in for."""
    name = PurePath(entrypoint or "").name
    return entrypoint is not None and model_script(entrypoint) is None and not name.startswith("run_serve_")


def _node_args(section: ExperimentSection, findings: Findings) -> dict[str, dict[str, Any]]:
    """Return the engine options of single hosts."""
    found: dict[str, dict[str, Any]] = {}
    for host, args in (section.node_args or {}).items():
        path = ("experiment", "node_args", host, "engine_args")
        found[host] = {"engine_args": typed_options(args.engine_args or {}, "vllm", path, findings)}
    return found


def _environments(tree: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Split `envs` into what holds everywhere, per device type and per host; values become text."""
    found: dict[str, dict[str, Any]] = {"envs": {}, "device_type_envs": {}, "node_envs": {}}
    for key, value in tree.items():
        path = ("experiment", "envs", key)
        if key not in _ENV_SECTIONS:
            found["envs"].update(_variable(key, value, path, findings))
            continue
        if not isinstance(value, Mapping):
            findings.error(
                "config/value", path, f"must be a mapping of names to variables ({show(value)} given)"
            )
            continue
        for name, variables in value.items():
            target = found[_ENV_SECTIONS[key]].setdefault(name, {})
            for variable, text in (variables or {}).items():
                target.update(_variable(variable, text, (*path, name, variable), findings))
    return found


def _variable(key: str, value: Any, path: tuple[str, ...], findings: Findings) -> dict[str, str]:
    """Return one environment variable as text; null means unset."""
    if isinstance(value, (Mapping, list)):
        findings.error("config/value", path, f"an environment variable is text ({show(value)} given)")
        return {}
    return {} if value is None or value is MISSING else {key: str(value)}
