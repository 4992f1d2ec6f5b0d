"""What is asked: one service of one or more instances, in this package's own words.

A FlagScale serve file and a plain model directory both become a `Service`; everything after this point reads
only that. FlagScale's rules are settled here, once:

- `engine_args_specific` wins over `engine_args` (FlagScale let the engine decide which wins);
- each list item is one instance with its own port (FlagScale ran the first item only, without a word);
- several copies of an item, and prefill apart from decode, are instances behind a router at the item's port;
- what this version cannot do is refused by name, never ignored.

What does not live here: reading the model's files (`model.py`), translating options (`engines/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from flagscale_serve.errors import InvalidService

if TYPE_CHECKING:
    from flagscale_config import Experiment
    from flagscale_config.experiment import Resources, ServeInstance

__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "RAY_KEYS",
    "Front",
    "Instance",
    "Service",
    "absolute",
    "is_composed",
    "of_experiment",
    "of_model",
    "port_of",
    "served_name",
    "shell_words",
]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
# Settled by the service, so that they are never rendered a second time from the engine's options.
_OURS = ("model", "served_model_name", "host", "port", "api_key")
POLICIES = ("power_of_two", "round_robin", "random", "cache_aware", "consistent_hash")
"""How a router may choose an instance, in vllm-router's words."""
_POLICIES = {"random": "random", "robin": "round_robin", "slo": "power_of_two"}
"""FlagScale's strategies for prefill and decode in the router's words; `slo` chose the least loaded."""
DEFAULT_POLICY = "power_of_two"
"""The less loaded of two instances drawn at random, for copies of one item.

The router's own default, `cache_aware`, sends a request to the instance that knows the beginning of its
prompt. For that vllm-router 0.1.17 first asks the instances for the tokens of the prompt
(`/v1/completions/render`), waits, and has no option against it: in front of two servers that answer after
50 ms, at 32 requests at a time, it added 53 to 82 ms to the median, `power_of_two` 0.8 and 1.6 ms in two
rounds of three (`benchmarks/serve.py` measures it so), and the servers had three times the requests. Lost:
turns of one conversation do not come back to the instance that has their keys and values.
"""
_UNROUTED = "the router adds fields to requests, which transformers' server refuses: use engine `vllm`"
RAY_KEYS = ("distributed_executor_backend", "data_parallel_backend")
"""vLLM's options by either of which Ray spreads an instance over hosts."""
_RENDEZVOUS_KEYS = ("data_parallel_rpc_port", "master_port")
"""vLLM's names for the port at which ranks meet: of copies, and of the parts of one copy."""


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
    role: Literal["prefill", "decode"] | None = None
    """Half of the work, when prefill and decode are parted; None does both."""
    wanted_host: str | None = None
    """Host that the file chooses for it."""
    places: Mapping[str, str] = field(default_factory=dict)
    """`engine_args.<key>` or `engine_args_specific.<engine>.<key>` -> where that was written."""

    @property
    def settled(self) -> dict[str, Any]:
        """What counts for its engine: the engine's own section wins over `engine_args`."""
        return {**self.options, **self.specific.get(self.engine, {})}

    def without(self, key: str) -> Instance:
        """Return it without an option, wherever that is said."""
        return replace(
            self,
            options={name: value for name, value in self.options.items() if name != key},
            specific={
                engine: {name: value for name, value in args.items() if name != key}
                for engine, args in self.specific.items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class Front:
    """One address in front of several instances."""

    name: str
    host: str
    port: int | None
    policy: str
    """How requests are spread, in the router's words."""
    members: tuple[str, ...]
    """Names of the instances behind it."""
    is_of_several_models: bool = False
    """It chooses by the `model` of a request first."""
    is_parted: bool = False
    """Each request goes through a prefill and a decode instance."""


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
    fronts: tuple[Front, ...] = ()
    type_env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """More variables by the hostfile's kind of device; they win over `env`."""
    node_env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """More variables by host; they win over both."""
    rendezvous_port: int | None = None
    """Where the hosts of one instance meet, if the file gives a number."""
    notes: tuple[str, ...] = ()
    """What is read and does nothing here."""
    node_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Engine options in vLLM's vocabulary by host; they win over the instance's `engine_args`."""

    @property
    def shell(self) -> tuple[str, ...]:
        """The words in front of every command when the user has shell text to run first; else none.

        The text is the user's own, run by bash in the engine's process; the engine then replaces the shell,
        so that signals reach it. Our own words are never shell text: they follow as arguments.
        """
        return shell_words(self.before_start)


def shell_words(before_start: str) -> tuple[str, ...]:
    """Return the words in front of a command that run a user's shell text first; see `Service.shell`."""
    return ("bash", "-c", f'{before_start}\nexec "$@"', "bash") if before_start else ()


def is_composed(experiment: Experiment) -> bool:
    """Tell whether a file asks for a graph of the user's own classes, which `application.py` reads."""
    by_item = any(item.module or item.depends for item in experiment.serve)
    return by_item or experiment.runner.deploy.enable_composition


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
    if is_composed(experiment):
        raise InvalidService(
            f"{where}: a composed application is no service of models: `plan` and `run` take the file itself"
        )
    _refuse_unsupported(experiment, where)
    names = _unique(item.serve_id for item in experiment.serve)
    items: list[tuple[Instance, list[Instance]]] = []
    for index, (item, name) in enumerate(zip(experiment.serve, names, strict=True)):
        here = f"{where}: serve[{index}]"
        chosen = engine or item.engine or experiment.task.backend or default_engine
        one = replace(
            _instance(item, name, here, experiment.cwd, chosen), places=_places(experiment, item, index)
        )
        if index == 0:
            one = _with_public_port(one, experiment, where)
        items.append((one, _copies(one, item, experiment, here, is_first=index == 0)))
    items, fronts = _behind_doors(items, experiment, where)
    instances = [copy for _, copies in items for copy in copies]
    _check_ports([*instances, *fronts], where)
    return Service(
        name=experiment.name,
        cwd=experiment.cwd,
        instances=tuple(instances),
        env=dict(experiment.envs),
        before_start=(experiment.cmds.before_start or "").strip(),
        source=where,
        fronts=tuple(fronts),
        rendezvous_port=_rendezvous_port(experiment, instances),
        notes=tuple(_notes(experiment)),
        type_env={kind: dict(env) for kind, env in experiment.device_type_envs.items()},
        node_env={host: dict(env) for host, env in experiment.node_envs.items()},
        node_options={
            host: _canonical(args.get("engine_args", {}), f"{where}: experiment.node_args.{host}")
            for host, args in experiment.node_args.items()
        },
    )


def _rendezvous_port(experiment: Experiment, instances: Sequence[Instance]) -> int | None:
    """Read `master_port`, or `ray_port` where Ray is asked for and the file gives it; else the engine's."""
    runner = experiment.runner
    by_ray = any(one.settled.get(key) == "ray" for one in instances for key in RAY_KEYS)
    if by_ray and "ray_port" in runner.model_fields_set:
        return runner.ray_port
    if by_ray:
        return runner.master_port
    for one in instances:
        for key in _RENDEZVOUS_KEYS:
            where = f"{one.name}: engine_args.{key}"
            port = port_of(one.settled.get(key), where)
            if None not in (port, runner.master_port) and port != runner.master_port:
                raise InvalidService(
                    f"{where}: {port}: contradicts experiment.runner.master_port: {runner.master_port}: give "
                    "one of the two"
                )
            if port is not None:
                return port
    return runner.master_port


def _notes(experiment: Experiment) -> Iterator[str]:
    deploy = experiment.runner.deploy
    if deploy.prefill_decode_log_dir:
        yield (
            f"experiment.runner.deploy.prefill_decode_log_dir: {deploy.prefill_decode_log_dir}: not used: "
            "every log is in the run directory"
        )
    if deploy.pd_proxy_port is not None:
        yield (
            f"experiment.runner.deploy.pd_proxy_port: {deploy.pd_proxy_port}: not used: the router is told "
            "all addresses"
        )


def _places(experiment: Experiment, item: ServeInstance, index: int) -> dict[str, str]:
    """Tell where each option was written."""
    keys = [f"engine_args.{key}" for key in item.engine_args]
    keys += [
        f"engine_args_specific.{engine}.{key}"
        for engine, args in item.engine_args_specific.items()
        for key in args
    ]
    return {key: str(experiment.origin(f"serve.{index}.{key}")) for key in keys}


def _copies(
    one: Instance, item: ServeInstance, experiment: Experiment, where: str, *, is_first: bool
) -> list[Instance]:
    """Return the instances that a list item stands for, one in nearly every case."""
    deploy = experiment.runner.deploy
    count = _num_replicas(item.resources, f"{where}.resources")
    if not deploy.prefill_decode_disaggregation or not is_first:
        if count == 1:
            return [one]
        if one.engine == "transformers":
            raise InvalidService(f"{where}.resources.num_replicas: {count}: {_UNROUTED}, or one copy")
        # Behind the router each takes a free port; the router has the public one.
        return [replace(one, name=f"{one.name}-{number}", port=None) for number in range(1, count + 1)]
    if count > 1:
        raise InvalidService(
            f"{where}.resources.num_replicas: {count}: prefill and decode are counted by deploy.prefill_num "
            "and deploy.decode_num: use those"
        )
    if one.api_key is not None:
        raise InvalidService(
            f"{where}.engine_args.api_key: the router that parts prefill from decode does not hand a "
            "client's key on to the engines, which would refuse everything: remove it and serve on 127.0.0.1"
        )
    halves: tuple[tuple[Literal["prefill", "decode"], int | None, str | None], ...] = (
        ("prefill", deploy.prefill_num, deploy.prefill_address),
        ("decode", deploy.decode_num, deploy.decode_address),
    )
    parts: list[Instance] = []
    for role, number, address in halves:
        parts += [
            replace(
                one,
                name=f"{one.name}-{role}-{rank}",
                port=None,
                role=role,
                wanted_host=None if address in (None, "auto") else address,
            )
            for rank in range(1, (number or 1) + 1)
        ]
    return parts


_Items = list[tuple[Instance, list[Instance]]]


def _behind_doors(items: _Items, experiment: Experiment, where: str) -> tuple[_Items, list[Front]]:
    """Put a router in front of the copies of an item, and of all items that name one port."""
    ports = [one.port for one, _ in items if one.port is not None]
    shared = [port for port in dict.fromkeys(ports) if ports.count(port) > 1]
    fronts = [_front(*item, experiment) for item in items if len(item[1]) > 1 and item[0].port not in shared]
    fronts += [_front_of_models([item for item in items if item[0].port == port], where) for port in shared]
    inside = [
        (one, [_one_of_several(copy) for copy in copies] if one.port in shared else copies)
        for one, copies in items
    ]
    return inside, fronts


def _one_of_several(copy: Instance) -> Instance:
    """Leave it the name by which the router finds it."""
    return replace(copy, port=None, served_names=copy.served_names[:1])


def _front_of_models(items: _Items, where: str) -> Front:
    """Return the router of several models at one port.

    Raises:
        InvalidService: it could not tell them apart, or a client could not speak to all of them.
    """
    first, names = items[0][0], {one.served_names[0] for one, _ in items}
    what = f"{where}: port {first.port}: asked for by {' and by '.join(repr(one.name) for one, _ in items)}"
    # Where no name is given, the model's path is one of several.
    has_aliases = any(one.served_names[1:] and one.model not in one.served_names for one, _ in items)
    if has_aliases or len(names) < len(items):
        raise InvalidService(
            f"{what}: behind one address a model is found by its name: give each item one "
            "served_model_name of its own, or its own port"
        )
    if len({(one.host, one.api_key) for one, _ in items}) > 1:
        raise InvalidService(f"{what}: one address has one host and one api_key: write the same for all")
    for one, copies in items:
        if copies[0].role is not None:
            raise InvalidService(
                f"{what}: {one.name}: prefill and decode are parted, which takes a router of its own: give "
                "the other items other ports"
            )
        if one.engine == "transformers":
            raise InvalidService(f"{what}: {one.name}: {_UNROUTED}, or another port")
    return Front(
        name=f"{first.name}-router",
        host=first.host,
        port=first.port,
        policy=DEFAULT_POLICY,
        members=tuple(copy.name for _, copies in items for copy in copies),
        is_of_several_models=True,
    )


def _front(one: Instance, copies: Sequence[Instance], experiment: Experiment) -> Front:
    deploy = experiment.runner.deploy
    is_parted = copies[0].role is not None
    return Front(
        name=f"{one.name}-router",
        host=one.host,
        port=one.port,
        policy=_POLICIES[deploy.prefill_decode_strategy] if is_parted else DEFAULT_POLICY,
        members=tuple(copy.name for copy in copies),
        is_parted=is_parted,
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
    own = _in_common_words(engine, specific.get(engine, {}))
    settled = {**options, **own}
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
        port=port_of(settled.get("port"), f"{where}.engine_args.port"),
        api_key=_api_key(settled.get("api_key"), f"{where}.engine_args.api_key"),
        engine=engine,
        options=_without_ours(options),
        specific={name: _without_ours(_in_common_words(name, args)) for name, args in specific.items()},
        extra_args=tuple(item.extra_args),
        num_devices=_num_devices(item.resources, f"{where}.resources"),
    )


def _in_common_words(engine: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Give what the service settles itself its common name: SGLang says `model_path`, llama.cpp `alias`."""
    from flagscale_config.translation import counterpart

    common = {counterpart(engine, name): name for name in _OURS}
    return {common.get(key, key): value for key, value in args.items()}


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


def port_of(value: Any, where: str) -> int | None:
    """Read a port; None is any free one.

    Raises:
        InvalidService: it is no whole number in 1..65535.
    """
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
    public = port_of(experiment.runner.deploy.port, f"{where}: experiment.runner.deploy.port")
    if public is None or public == first.port:
        return first
    if first.port is not None:
        raise InvalidService(
            f"{where}: serve[0].engine_args.port: {first.port} contradicts experiment.runner.deploy.port "
            f"{public}: give one of the two, or the same number"
        )
    return replace(first, port=public)


def _check_ports(doors: Sequence[Instance | Front], where: str) -> None:
    owner: dict[int, str] = {}
    for door in doors:
        if door.port is None:
            continue
        if door.port in owner:
            raise InvalidService(
                f"{where}: port {door.port}: asked for by {owner[door.port]!r} and by "
                f"{door.name!r}: give each instance its own port, or none to have a free one chosen"
            )
        owner[door.port] = door.name


def _num_replicas(resources: Resources, where: str) -> int:
    """Count the copies of an item; a number that changes with the load is refused."""
    wanted = {
        key: value
        for key in ("num_replicas", "min_replicas", "max_replicas")
        if (value := getattr(resources, key)) is not None
    }
    counts = {key: value for key, value in wanted.items() if key != "num_replicas" or value != 1}
    if "auto" in wanted.values() or len(set(counts.values())) > 1:
        given = ", ".join(f"{key} {value}" for key, value in wanted.items())
        raise InvalidService(
            f"{where}: {given}: the number of copies does not change while a service runs: give one "
            "num_replicas"
        )
    count = next(iter(counts.values()), 1)
    if count < 1:
        raise InvalidService(f"{where}.num_replicas: {count}: at least 1 is needed: correct it")
    return int(count)


def _num_devices(resources: Resources, where: str) -> int | None:
    """Read the device count."""
    num = resources.num_gpus
    if num is None:
        return None
    if num < 1 or num != int(num):
        raise InvalidService(f"{where}.num_gpus: {num:g}: a whole number of at least 1 is needed: correct it")
    return int(num)


def _refuse_unsupported(experiment: Experiment, where: str) -> None:
    """Refuse what this version would otherwise have to ignore."""
    runner = experiment.runner
    asked: list[tuple[str, Any, str]] = [
        ("runner.runtime_env", runner.runtime_env, "Ray: set variables in experiment.envs"),
        ("runner.cli_args.model_path", runner.cli_args.model_path, "use serve[0].engine_args.model"),
        ("runner.cli_args.engine_args", runner.cli_args.engine_args, "use serve[0].engine_args"),
        ("cmds.after_stop", experiment.cmds.after_stop, "commands after the stop: remove it"),
    ]
    for key, value, what in asked:
        if value:
            given = dict(value) if isinstance(value, Mapping) else value
            raise InvalidService(
                f"{where}: experiment.{key}: {given!r}: not supported by this version: {what}"
            )
