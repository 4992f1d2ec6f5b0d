"""From what is asked and the machine to a plan: pure, so that a laptop can plan for any machine.

What does not live here: whether the model and the engine are really there (`checks.py`), starting anything
(`runs.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flagscale_hw import File, Machine, Plan, Probe, Process, StopPolicy, env, runtime, unknowns
from flagscale_serve.application import compose, plan_application
from flagscale_serve.engines import ENGINES, Context, Rendered, Seat, default_engine, engine_named
from flagscale_serve.engines.adapter import text_of
from flagscale_serve.errors import InvalidService
from flagscale_serve.fit import Fit, Tenant, fit_together
from flagscale_serve.model import Model
from flagscale_serve.placing import Berth, Need, place
from flagscale_serve.router import ENGINE as ROUTER
from flagscale_serve.router import LAUNCHER, bootstrap_of, inner_fronts, parted_by, router_argv, router_of
from flagscale_serve.service import (
    Front,
    Instance,
    Service,
    absolute,
    is_composed,
    of_experiment,
    port_of,
)

if TYPE_CHECKING:
    from flagscale_config import Experiment
    from flagscale_hw import Node

__all__ = ["MAX_RESTARTS", "READY_TIMEOUT_S", "plan"]

READY_TIMEOUT_S = 1800.0
"""Loading and compiling a large model can take this long."""
MAX_RESTARTS = 3
"""Within ten minutes, for each instance and router by itself."""
# A loaded server answers late; only one that hangs is silent for so long.
_SILENT_S, _WATCH_INTERVAL_S, _WATCH_TIMEOUT_S = 180.0, 10.0, 60.0
_READY_INTERVAL_S = 0.1
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OWN = "{own_address}"
_TRANSFER_PORT = 21001
"""Where the ports for keys and values begin when several must follow each other; vLLM's examples use it."""
_ANY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104 - compared, never bound
_MAX_KV_CACHE_BYTES = 16 << 30


def plan(  # noqa: PLR0913 - what a plan depends on, all of it
    what: Experiment | Service,
    machine: Machine,
    *,
    nodes: Sequence[Node] = (),
    python: str = sys.executable,
    router_python: str = sys.executable,
    engine: str | None = None,
    ready_timeout_s: float = READY_TIMEOUT_S,
    max_restarts: int = MAX_RESTARTS,
    versions: Mapping[str, str] | None = None,
    models: Mapping[str, Model] | None = None,
) -> Plan:
    """Decide everything about a service: commands, environment, ports, readiness, stop.

    Args:
        what: a loaded FlagScale serve file, or a `Service`.
        machine: where it will run, when there are no `nodes`.
        nodes: the hosts of the hostfile, the first of which is the head.
        python: interpreter that has the engine; the caller's own unless told.
        router_python: interpreter that has the router.
        engine: serve every item of a file with this engine, whatever the file says.
        ready_timeout_s: seconds until the first token of each instance.
        max_restarts: how often within ten minutes an instance that has been ready and ended is started again
            while the others go on; on this machine only, and 0 where an instance is several processes.
        versions: engine -> version in that interpreter; the newest known where it is not told.
        models: model directory -> what it says about itself; where it is told, the plan's facts say how
            the model fits the devices.

    Raises:
        InvalidService: what is asked contradicts itself, the machine or the engine.
    """
    if isinstance(what, Service):
        service = what
    elif is_composed(what):
        return plan_application(
            compose(what), machine, python=python, ready_timeout_s=ready_timeout_s, max_restarts=max_restarts
        )
    else:
        if not nodes and (what.runner.hostfile or what.runner.docker or what.runner.type == "cloud"):
            raise InvalidService(
                f"{what.source}: experiment.runner: several hosts, or a container: this machine alone is not "
                "what is asked for: give the hosts (`find_nodes`)"
            )
        chip = nodes[0].machine.chip if nodes else machine.chip
        service = of_experiment(what, default_engine=default_engine(chip).name, engine=engine)
    wanted = {one.name: _need(one) for one in service.instances}
    berths = place(service.instances, wanted, machine, nodes)
    _check_cpu(service.instances, berths)
    crew = _Crew(service, berths, python, versions or {}, 0 if nodes else max_restarts)
    parts = [part for instance in service.instances for part in crew.parts(instance)]
    doors = [crew.routers(front, router_python, ready_timeout_s) for front in service.fronts]
    routers = [router for door in doors for router in door]
    heads = [part for part in parts if part.seat.rank == 0]
    used = {process.host for part in parts for process in part.processes}
    files = {file.path: file for part in parts for file in part.rendered.files}
    if any(front.is_of_several_models for front in service.fronts):
        files[LAUNCHER] = File(path=LAUNCHER, text=text_of(LAUNCHER))
    probes = [_probe(part, ready_timeout_s) for part in heads]
    behind = {name: number for number, front in enumerate(service.fronts) for name in front.members}
    kinds = [(part.instance.role, part.instance.served_names) for part in heads]
    for part, kind in zip(heads, kinds, strict=True):
        if part.instance.name in behind and kinds.count(kind) == 1 and part.processes[-1].max_restarts:
            # The only one of its kind, started again, is ready when the router uses it. Where there are
            # others the router answers without it, which says nothing of it.
            _, through = doors[behind[part.instance.name]][-1]
            mine = [one for one in through if (one.body or {}).get("model") == kind[1][0]]
            probes += [replace(one, process=part.instance.name) for one in mine]
    return Plan(
        kind="serve",
        name=service.name,
        processes=tuple([one for part in parts for one in part.processes] + [one for one, _ in routers]),
        files=tuple(files.values()),
        ports=crew.ports,
        port_hosts=crew.port_hosts if nodes else {},
        probes=(*probes, *(probe for _, through in routers for probe in through)),
        watches=tuple(_watches(heads, routers)),
        stop=StopPolicy(grace_s=max(engine_named(i.engine).grace_s for i in service.instances)),
        facts={
            **_facts(service, machine, heads, berths, models or {}),
            **({"versions": dict(versions)} if versions else {}),
        },
        secrets=tuple(
            name
            for name in ("VLLM_API_KEY", "LLAMA_API_KEY")
            if any(name in process.env for part in parts for process in part.processes)
        ),
        targets=tuple(node.target for node in nodes if node.target.name in used),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The share of one host in an instance, translated."""

    instance: Instance
    berth: Berth
    berths: tuple[Berth, ...]
    seat: Seat
    rendered: Rendered
    processes: tuple[Process, ...]


_Router = tuple[Process, list[Probe]]
"""A router, and how to know that it works."""


class _Crew:
    """Turns the instances of a service into processes, and collects the ports they need."""

    def __init__(
        self,
        service: Service,
        berths: Mapping[str, tuple[Berth, ...]],
        python: str,
        versions: Mapping[str, str],
        max_restarts: int,
    ) -> None:
        self._max_restarts = max_restarts
        self._service = service
        self._berths = berths
        self._python = python
        self._versions = versions
        self._rendezvous = service.rendezvous_port
        self.ports: dict[str, int | None] = {}
        self.port_hosts: dict[str, str] = {}

    def parts(self, instance: Instance) -> list[_Part]:
        """Translate one instance for each of its hosts."""
        berths = self._berths[instance.name]
        head = berths[0]
        if head.node is not None and instance.host in _LOOPBACK:
            # Other hosts, and people, must reach it.
            instance = replace(instance, host=_OWN)
        self._lease(instance.name, instance.port, head)
        if len(berths) > 1:
            self._lease(f"{instance.name}-ranks", self._rendezvous, head)
            self._rendezvous = None  # one number serves one instance; the others take what is free
        ports = self._transfer_ports(instance, berths)
        found = []
        for rank, berth in enumerate(berths):
            seat = Seat(
                rank=rank,
                num_hosts=len(berths),
                head=_address(head),
                own="127.0.0.1" if berth.node is None else _OWN,
                rendezvous=f"{{port:{instance.name}-ranks}}",
                num_devices=berth.count,
                interface=berth.node.interface if berth.node else None,
            )
            here = replace(
                instance, options={**instance.options, **self._service.node_options.get(berth.host, {})}
            )
            context = self._context(here, berth, seat, ports)
            rendered = engine_named(here.engine).render(here, context)
            found.append(
                _Part(
                    instance=instance,
                    berth=berth,
                    berths=berths,
                    seat=seat,
                    rendered=rendered,
                    processes=self._processes(instance, rendered, berth, seat),
                )
            )
        return found

    def routers(self, front: Front, python: str, timeout_s: float) -> list[_Router]:
        """Return the router of an address, last, after those it needs behind it, all on one host."""
        members = [one for one in self._service.instances if one.name in front.members]
        head = self._berths[members[0].name][0]
        urls = {one.name: self._url(one) for one in members}
        found = []
        for inner in inner_fronts(front, members):
            behind = [one for one in members if one.name in inner.members]
            found.append(self._router(inner, behind, head, urls, python, timeout_s))
            address = _address(head) if head.node is not None else _reachable(inner.host)
            urls |= dict.fromkeys(inner.members, f"http://{address}:{{port:{inner.name}}}")
        return [*found, self._router(front, members, head, urls, python, timeout_s)]

    def _router(
        self,
        front: Front,
        members: Sequence[Instance],
        head: Berth,
        urls: Mapping[str, str],
        python: str,
        timeout_s: float,
    ) -> _Router:
        """Return a router and how to know that it works: each model answers through it."""
        self._lease(front.name, front.port, head)
        self._lease(f"{front.name}-metrics", None, head)
        host = _OWN if head.node is not None and front.host in _LOOPBACK else front.host
        address = _address(head) if head.node is not None else _reachable(front.host)
        argv = router_argv(
            front,
            members,
            python=python,
            host=host,
            own_url=f"http://{address}:{{port:{front.name}}}",
            urls=urls,
            startup_s=timeout_s,
        )
        process = Process(
            name=front.name,
            argv=argv,
            env={"RUST_LOG": self._service.env.get("RUST_LOG", router_of(front, members).told)},
            cwd=self._service.cwd,
            host=head.host,
            max_restarts=self._max_restarts,
            is_service=True,
        )
        probes = [_token_probe(front.name, address, one, timeout_s) for one in _one_of_each_model(members)]
        return process, [replace(one, process=front.name if process.max_restarts else None) for one in probes]

    def _url(self, instance: Instance) -> str:
        head = self._berths[instance.name][0]
        address = _address(head) if head.node is not None else _reachable(instance.host)
        return f"http://{address}:{{port:{instance.name}}}"

    def _lease(self, name: str, number: int | None, berth: Berth) -> None:
        self.ports[name] = number
        self.port_hosts[name] = berth.host

    def _transfer_ports(self, instance: Instance, berths: Sequence[Berth]) -> tuple[str, ...]:
        """Lease ports for keys and values.

        vLLM takes one for each device of the instance on each host, and counts on from the first one, through
        all hosts. SGLang takes one for each prefill instance, at which decode finds all others.
        """
        if instance.role is None:
            return ()
        if parted_by(instance.engine).names_bootstrap:
            return self._bootstrap_port(instance, berths[0])
        count = sum(berth.count for berth in berths)
        first = None
        if count > 1:
            first = _TRANSFER_PORT + 100 * [one.name for one in self._service.instances].index(instance.name)
        names = [f"{instance.name}-kv-{number}" for number in range(count)]
        for rank, berth in enumerate(berths):
            for number, name in enumerate(names):
                where = name if rank == 0 else f"{instance.name}-rank-{rank}-kv-{number}"
                self._lease(where, None if first is None else first + number, berth)
        return tuple(f"{{port:{name}}}" for name in names)

    def _bootstrap_port(self, instance: Instance, head: Berth) -> tuple[str, ...]:
        if instance.role != "prefill":
            return ()
        first = next(one.name for one in self._service.instances if one.role == "prefill")
        name, key = bootstrap_of(instance.name), "disaggregation_bootstrap_port"
        given = port_of(instance.settled.get(key), f"{instance.name}: {key}")
        # One number serves one instance; the others take what is free.
        self._lease(name, given if instance.name == first else None, head)
        return (f"{{port:{name}}}",)

    def _context(
        self,
        instance: Instance,
        berth: Berth,
        seat: Seat,
        transfer_ports: tuple[str, ...],
    ) -> Context:
        """Share a host's cores and memory among the instances that run there.

        Half the logical cores, because two hyper-threads of one core only wait for each other in matrix
        products; an eighth of the memory for keys and values, which leaves room for weights and for the
        machine's other users.
        """
        machine = berth.machine
        share = sum(any(one.host == berth.host for one in all_of) for all_of in self._berths.values())
        return Context(
            python=self._python,
            chip=machine.chip,
            torch_device=runtime(machine.chip).torch_device,
            num_threads=max(1, machine.num_cpus // 2 // share),
            kv_cache_bytes=min(machine.memory_bytes // 8, _MAX_KV_CACHE_BYTES) // share,
            version=self._versions.get(instance.engine),
            seat=seat,
            transfer_ports=transfer_ports,
        )

    def _processes(
        self, instance: Instance, rendered: Rendered, berth: Berth, seat: Seat
    ) -> tuple[Process, ...]:
        service, node = self._service, berth.node
        given = dict(service.env)
        if node is not None:
            given |= service.type_env.get(node.type or "", {})
            given |= service.node_env.get(node.target.name, {})
        devices = env(berth.devices) if berth.is_shared else {}
        base = instance.name if seat.rank == 0 else f"{instance.name}-rank-{seat.rank}"
        named = [(f"{base}-{one.name}", one.argv) for one in rendered.companions]
        if rendered.argv:
            named.append((base, rendered.argv))
        return tuple(
            Process(
                name=name,
                argv=(*service.shell, *argv),
                env={**rendered.env, **devices, **given},
                cwd=service.cwd,
                host=berth.host,
                rank=seat.rank if seat.num_hosts > 1 else None,
                # Half of an instance is no instance: several processes end together.
                max_restarts=self._max_restarts if len(named) == 1 else 0,
                is_service=True,
            )
            for name, argv in named
        )


def _address(berth: Berth) -> str:
    """Return how other processes of the plan reach a host, as a placeholder."""
    return "127.0.0.1" if berth.node is None else f"{{address:{berth.node.target.name}}}"


def _check_cpu(instances: Sequence[Instance], berths: Mapping[str, tuple[Berth, ...]]) -> None:
    for instance in instances:
        if instance.num_devices and berths[instance.name][0].machine.chip == "cpu":
            raise InvalidService(
                f"{instance.name}: resources.num_gpus: {instance.num_devices}: no accelerator was found "
                "on this machine: remove it to serve on the CPU"
            )


def _need(instance: Instance) -> Need:
    """Count the devices of one instance, from its parallel sizes or from `resources.num_gpus`."""
    layout = engine_named(instance.engine).layout(instance)
    if instance.num_devices is not None and instance.num_devices < layout.devices:
        raise InvalidService(
            f"{instance.name}: resources.num_gpus: {instance.num_devices}: the parallel sizes need "
            f"{layout.devices} devices: raise it, or leave it out"
        )
    per_host = None if layout.data_per_host is None else layout.data_per_host * layout.copy_devices
    count = instance.num_devices or layout.devices
    return Need(count=count, copy=layout.copy_devices, per_host=per_host)


def _probe(part: _Part, timeout_s: float) -> Probe:
    """Ask for one token: a server that answers `/health` may still be unable to generate."""
    instance = part.instance
    address = _reachable(instance.host) if part.berth.node is None else _address(part.berth)
    if part.rendered.health_path is None:
        probe = _token_probe(instance.name, address, instance, timeout_s, part.rendered.served_names[0])
    else:
        url = f"http://{address}:{{port:{instance.name}}}{part.rendered.health_path}"
        probe = Probe(url=url, interval_s=_READY_INTERVAL_S, timeout_s=timeout_s)
    return replace(probe, process=instance.name if part.processes[-1].max_restarts else None)


def _watches(heads: Sequence[_Part], routers: Sequence[_Router]) -> Iterator[Probe]:
    """Look after what can be started again: a server that hangs serves nobody, and does not end."""
    for part in heads:
        if part.processes[-1].max_restarts and part.instance.engine in ENGINES:
            yield _watch(part.instance.name, _reachable(part.instance.host), _key(part.instance))
    for process, (probe, *_) in routers:
        if process.max_restarts:
            # Its `/health` fails for as long as any instance is away, and one may be loading for an hour.
            watch = _watch(process.name, urlsplit(probe.url).netloc.partition(":{")[0], {})
            yield replace(watch, url=watch.url.replace("/health", "/liveness"))


def _watch(name: str, address: str, headers: Mapping[str, str]) -> Probe:
    return Probe(
        url=f"http://{address}:{{port:{name}}}/health",
        headers=headers,
        interval_s=_WATCH_INTERVAL_S,
        request_timeout_s=_WATCH_TIMEOUT_S,
        timeout_s=_SILENT_S,
        process=name,
    )


def _token_probe(
    port: str, address: str, instance: Instance, timeout_s: float, model: str | None = None
) -> Probe:
    return Probe(
        url=f"http://{address}:{{port:{port}}}/v1/completions",
        method="POST",
        body={
            "model": model or instance.served_names[0],
            "prompt": "Hello",
            "max_tokens": 1,
            "temperature": 0,
        },
        headers=_key(instance),
        expect="usage.completion_tokens",
        interval_s=_READY_INTERVAL_S,
        timeout_s=timeout_s,
    )


def _key(instance: Instance) -> dict[str, str]:
    return {"Authorization": f"Bearer {instance.api_key}"} if instance.api_key else {}


def _reachable(host: str) -> str:
    if host in _ANY_ADDRESS:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _facts(
    service: Service,
    machine: Machine,
    heads: Sequence[_Part],
    berths: Mapping[str, tuple[Berth, ...]],
    models: Mapping[str, Model],
) -> Mapping[str, Any]:
    warnings = [
        *service.notes,
        *unknowns({one.host: one.machine for all_of in berths.values() for one in all_of}),
        *(text for part in heads for text in part.rendered.warnings),
    ]
    behind = {name: front for front in service.fronts for name in front.members}
    doors: list[Instance | Front] = [p.instance for p in heads if p.instance.name not in behind]
    doors += service.fronts
    keyless = {part.instance.name for part in heads if part.instance.api_key is None}
    for door in doors:
        inside = door.members if isinstance(door, Front) else (door.name,)
        if set(inside) & keyless and not _is_loopback(door.host):
            warnings.append(_exposed(door))
    fits = _fits(heads, berths, models)
    warnings += [text for one in fits.values() for text in one.warnings]
    instances = []
    for part in heads:
        instance = part.instance
        facts = _facts_of(service, part)
        if instance.name in behind:
            facts["behind"] = behind[instance.name].name
        if instance.name in fits:
            facts["fit"] = fits[instance.name].to_dict()
        instances.append(facts)
    for front in service.fronts:
        members = [part.instance for part in heads if part.instance.name in front.members]
        found = [one.name for one in _one_of_each_model(members)]
        for part in (part for part in heads if part.instance.name in found):
            facts = _facts_of(service, part)
            host = facts["host"] if part.berth.node is not None else _reachable(front.host)
            instances.append({**facts, "name": front.name, "engine": ROUTER, "host": host, "options": []})
    return {
        "source": service.source,
        "chip": heads[0].berth.machine.chip if heads[0].berth.node else machine.chip,
        "warnings": warnings,
        "devices_per_host": _devices_per_host(berths),
        "instances": instances,
    }


def _fits(
    heads: Sequence[_Part], berths: Mapping[str, tuple[Berth, ...]], models: Mapping[str, Model]
) -> dict[str, Fit]:
    tenants = [
        Tenant(
            instance=part.instance,
            model=models[part.instance.model],
            layout=engine_named(part.instance.engine).layout(part.instance),
            berths=berths[part.instance.name],
            cache=_cache_on_cpu(part),
        )
        for part in heads
        if part.instance.model in models
    ]
    return {one.instance: one for one in fit_together(tenants)}


def _cache_on_cpu(part: _Part) -> Any:
    """Return what each rank on a CPU sets aside; the variable wins (vLLM 0.32, `platforms/cpu.py`)."""
    if part.berth.machine.chip != "cpu":
        return None
    counts = {one.option: one.value for one in part.rendered.chosen if not one.fate}
    gib = part.processes[-1].env.get("VLLM_CPU_KVCACHE_SPACE") if part.instance.engine == "vllm" else None
    return f"{gib}G" if gib else counts.get("kv_cache_memory_bytes")


def _devices_per_host(berths: Mapping[str, tuple[Berth, ...]]) -> int:
    """Return the most devices that the service uses on any host, which a scheduler must give each."""
    found: dict[str, int] = {}
    for berth in (one for all_of in berths.values() for one in all_of):
        found[berth.host] = found.get(berth.host, 0) + len(berth.devices)
    return max(found.values())


def _facts_of(service: Service, part: _Part) -> dict[str, Any]:
    from flagscale_config.masking import masked

    instance, node = part.instance, part.berth.node
    return {
        "name": instance.name,
        "engine": instance.engine,
        "model": instance.model,
        "served_names": list(part.rendered.served_names),
        "host": node.target.reached_as if node is not None else _reachable(instance.host),
        "needs_key": instance.api_key is not None,
        "tokenizer": str(absolute(instance.settled.get("tokenizer") or instance.model, service.cwd)),
        "chat_template": instance.settled.get("chat_template"),
        "options": [
            {**asdict(one), "value": masked({one.option: one.value})[one.option], "words": list(one.words)}
            for one in part.rendered.chosen
        ],
    }


def _one_of_each_model(members: Sequence[Instance]) -> list[Instance]:
    names = [one.served_names for one in members]
    return [one for number, one in enumerate(members) if names.index(one.served_names) == number]


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1")


def _exposed(door: Instance | Front) -> str:
    where = "its own address" if door.host == _OWN else f"host {door.host}"
    return (
        f"{door.name}: {where}: anybody who reaches this machine can use the model, "
        "because no api_key is set: use 127.0.0.1, or set engine_args.api_key"
    )
