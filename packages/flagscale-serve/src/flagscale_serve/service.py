"""What is asked: one service of one or more instances, in this package's own words.

A FlagScale serve file and a plain model directory both become a `Service`; everything after this point reads
only that. FlagScale's rules are settled here, once:

- `engine_args_specific` wins over `engine_args` (FlagScale let the engine decide which wins);
- each list item is one instance with its own port (FlagScale ran the first item only, without a word);
- what this version cannot do is refused by name, never ignored.

What does not live here: reading the model's files (`model.py`), translating options (`engines/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from flagscale_serve.errors import InvalidService

if TYPE_CHECKING:
    from flagscale_config import Experiment
    from flagscale_config.experiment import Resources, ServeInstance

__all__ = ["Instance", "Service", "absolute", "of_experiment", "of_model", "served_name"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
# Settled by the service, so that they are never rendered a second time from the engine's options.
_OURS = ("model", "served_model_name", "host", "port", "api_key")


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One engine process that serves one model at one address."""

    name: str
    """Names the process, its log and its port: a-z, 0-9, `_`, `-`."""
    model: str
    """Absolute path of the model directory."""
    served_names: tuple[str, ...]
    """What clients write as `model`; the first is the one we use and show."""
    host: str = "127.0.0.1"
    port: int | None = None
    """1..65535, or None for any free one."""
    api_key: str | None = None
    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """`engine_args` in vLLM's vocabulary, underscores, without what the fields above settle."""
    specific: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """`engine_args_specific`: engine -> its own options, underscores."""
    extra_args: tuple[str, ...] = ()
    """Appended to the engine's command line verbatim."""
    num_devices: int | None = None
    """`resources.num_gpus` where given."""

    @property
    def settled(self) -> dict[str, Any]:
        """What counts for its engine: the engine's own section wins over `engine_args`."""
        return {**self.options, **self.specific.get(self.engine, {})}


@dataclass(frozen=True, kw_only=True)
class Service:
    """All instances of one run and what they share."""

    name: str
    cwd: str
    """Absolute; relative paths in options are relative to it."""
    instances: tuple[Instance, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    before_start: str = ""
    """Shell text of the user, run in the engine's process before the engine replaces it."""
    source: str = ""

    @property
    def shell(self) -> tuple[str, ...]:
        """The words in front of every command when the user has shell text to run first; else none.

        The text is the user's own, run by bash in the engine's process; the engine then replaces the shell,
        so that signals reach it. Our own words are never shell text: they follow as arguments.
        """
        if not self.before_start:
            return ()
        return ("bash", "-c", f'{self.before_start}\nexec "$@"', "bash")


def of_model(path: str, *, cwd: str, engine: str) -> Service:
    """Describe the service of one plain model directory; relative paths are relative to `cwd`."""
    model = str(absolute(path, cwd))
    instance = Instance(name="model", model=model, served_names=_names(None, model, path), engine=engine)
    return Service(name=served_name(model), cwd=cwd, instances=(instance,), source=model)


def of_experiment(experiment: Experiment, *, default_engine: str, engine: str | None = None) -> Service:
    """Describe the service that a FlagScale serve file asks for.

    Args:
        experiment: a loaded serve file.
        default_engine: engine of the items that name none.
        engine: serve every item with this one, whatever the file says.

    Raises:
        InvalidService: the file is not a serve file, contradicts itself, or asks for what this version cannot
            do.
    """
    where = experiment.source
    if experiment.task.type != "serve" or not experiment.serve:
        raise InvalidService(
            f"{where}: experiment.task.type: {experiment.task.type!r}: flagscale-serve runs files whose "
            "task type is `serve` and that have a `serve` list: choose another file or another tool"
        )
    _refuse_unsupported(experiment, where)
    names = _unique(item.serve_id for item in experiment.serve)
    instances = [
        _instance(
            item,
            name,
            f"{where}: serve[{index}]",
            experiment.cwd,
            engine or item.engine or experiment.task.backend or default_engine,
        )
        for index, (item, name) in enumerate(zip(experiment.serve, names, strict=True))
    ]
    instances[0] = _with_public_port(instances[0], experiment, where)
    _check_ports(instances, where)
    return Service(
        name=experiment.name,
        cwd=experiment.cwd,
        instances=tuple(instances),
        env=dict(experiment.envs),
        before_start=(experiment.cmds.before_start or "").strip(),
        source=where,
    )


def served_name(model: str) -> str:
    """Derive the name clients use from a path: its last part, without what clients cannot write."""
    name = re.sub(r"[^\w.-]+|--+|\.\.+", "-", PurePosixPath(model).name, flags=re.ASCII).strip("-._")
    return name[:96] or "model"


def _instance(item: ServeInstance, name: str, where: str, cwd: str, engine: str) -> Instance:
    specific = {
        engine: _canonical(args, f"{where}.engine_args_specific.{engine}")
        for engine, args in item.engine_args_specific.items()
    }
    options = _canonical(item.engine_args, f"{where}.engine_args")
    settled = {**options, **specific.get(engine, {})}
    asked = settled.get("model")
    if not isinstance(asked, str) or not asked:
        raise InvalidService(
            f"{where}.engine_args.model: {asked!r}: the path of a model directory is required: set it in "
            "the file or with an override"
        )
    model = str(absolute(asked, cwd))
    return Instance(
        name=name,
        model=model,
        served_names=_names(settled.get("served_model_name"), model, asked),
        host=str(settled.get("host") or "127.0.0.1"),
        port=_port(settled.get("port"), f"{where}.engine_args.port"),
        api_key=_api_key(settled.get("api_key"), f"{where}.engine_args.api_key"),
        engine=engine,
        options=_without_ours(options),
        specific={engine: _without_ours(args) for engine, args in specific.items()},
        extra_args=tuple(item.extra_args),
        num_devices=_num_devices(item.resources, f"{where}.resources"),
    )


def _without_ours(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _OURS}


def _canonical(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Spell every key with underscores; `max-model-len` beside `max_model_len` is a contradiction."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name in found and found[name] != value:
            raise InvalidService(
                f"{where}.{name}: given twice with different values ({found[name]!r} and {value!r}): keep one"
            )
        found[name] = value
    return found


def _names(given: Any, model: str, asked: str) -> tuple[str, ...]:
    """List what clients may write as `model`; without a given name, the directory's name and its path."""
    if given is None:
        return tuple(dict.fromkeys((served_name(model), model, asked)))
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or "--" in name or ".." in name:
            raise InvalidService(
                f"served_model_name: {name!r}: letters, digits, `.`, `_`, `-` and at most one `/` are "
                "allowed: rename it"
            )
    return names


def _api_key(value: Any, where: str) -> str | None:
    """Return the one key; vLLM takes several on its command line only, where everybody can read them."""
    keys = [value] if isinstance(value, str) else list(value or ())
    if len(keys) > 1:
        raise InvalidService(f"{where}: {len(keys)} keys: one key can be kept out of sight: give one")
    return str(keys[0]) if keys and keys[0] else None


def _port(value: Any, where: str) -> int | None:
    if value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 1 <= number <= 65535 or isinstance(value, bool | float):
        raise InvalidService(
            f"{where}: {value!r}: a port is a whole number in 1..65535: choose another, or leave it out"
        )
    return number


def absolute(path: str, cwd: str) -> PurePosixPath:
    """Join and normalise without looking at the disk."""
    parts: list[str] = []
    for part in (PurePosixPath(cwd) / path).parts[1:]:
        if part == ".." and parts:
            parts.pop()
        elif part != "..":
            parts.append(part)
    return PurePosixPath("/", *parts)


def _unique(serve_ids: Iterable[str]) -> list[str]:
    names: list[str] = []
    for serve_id in serve_ids:
        base = re.sub(r"[^a-z0-9_-]+", "-", str(serve_id).lower()).strip("-_") or "model"
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}-{count}"
        names.append(name)
    return names


def _with_public_port(first: Instance, experiment: Experiment, where: str) -> Instance:
    """Let `deploy.port` be the first instance's port, and refuse two different wishes."""
    public = _port(experiment.runner.deploy.port, f"{where}: experiment.runner.deploy.port")
    if public is None or public == first.port:
        return first
    if first.port is not None:
        raise InvalidService(
            f"{where}: serve[0].engine_args.port: {first.port} contradicts experiment.runner.deploy.port "
            f"{public}: give one of the two, or the same number"
        )
    return replace(first, port=public)


def _check_ports(instances: Sequence[Instance], where: str) -> None:
    owner: dict[int, str] = {}
    for instance in instances:
        if instance.port is None:
            continue
        if instance.port in owner:
            raise InvalidService(
                f"{where}: port {instance.port}: asked for by {owner[instance.port]!r} and by "
                f"{instance.name!r}: give each instance its own port, or none to have a free one chosen"
            )
        owner[instance.port] = instance.name


def _num_devices(resources: Resources, where: str) -> int | None:
    """Read the device count and refuse what needs a router in front of several replicas."""
    for key in ("num_replicas", "min_replicas", "max_replicas"):
        value = getattr(resources, key)
        if value not in (None, 1):
            raise InvalidService(
                f"{where}.{key}: {value!r}: several replicas of one model are not supported by this version: "
                "use 1, or write one list item per instance, each with its own serve_id and port"
            )
    num = resources.num_gpus
    if num is None:
        return None
    if num < 1 or num != int(num):
        raise InvalidService(f"{where}.num_gpus: {num:g}: a whole number of at least 1 is needed: correct it")
    return int(num)


def _refuse_unsupported(experiment: Experiment, where: str) -> None:
    """Refuse what this version would otherwise have to ignore."""
    runner, deploy = experiment.runner, experiment.runner.deploy
    several = "several hosts: remove it to serve on this host"
    asked: list[tuple[str, Any, str]] = [
        ("runner.hostfile", runner.hostfile, several),
        ("runner.nnodes", runner.nnodes if runner.num_nodes not in (None, 1) else None, several),
        ("runner.type", runner.type if runner.type != "ssh" else None, "cloud runners: use ssh"),
        ("runner.docker", runner.docker, "containers: start this command inside the container"),
        ("runner.runtime_env", runner.runtime_env, "Ray: set variables in experiment.envs"),
        ("runner.cli_args.model_path", runner.cli_args.model_path, "use serve[0].engine_args.model"),
        ("runner.cli_args.engine_args", runner.cli_args.engine_args, "use serve[0].engine_args"),
        ("node_envs", experiment.node_envs, several),
        ("node_args", experiment.node_args, several),
        ("device_type_envs", experiment.device_type_envs, several),
        ("cmds.after_stop", experiment.cmds.after_stop, "commands after the stop: remove it"),
        (
            "runner.deploy.prefill_decode_disaggregation",
            deploy.prefill_decode_disaggregation,
            "prefill and decode in separate instances: set it to false",
        ),
        (
            "runner.deploy.enable_composition",
            deploy.enable_composition,
            "composed applications: serve each model by itself",
        ),
    ]
    for key, value, what in asked:
        if value:
            given = dict(value) if isinstance(value, Mapping) else value
            raise InvalidService(
                f"{where}: experiment.{key}: {given!r}: not supported by this version: {what}"
            )
    for index, item in enumerate(experiment.serve):
        if item.module or item.depends:
            raise InvalidService(
                f"{where}: serve[{index}]: an item with module or depends is part of a composed "
                "application: not supported by this version: serve each model by itself"
            )
