"""From what is asked and the machine to a plan: pure, so that a laptop can plan for any machine.

What does not live here: whether the model and the engine are really there (`checks.py`), starting anything
(`runs.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flagscale_hw import Machine, Plan, Probe, Process, StopPolicy, env, runtime
from flagscale_serve.engines import Context, Rendered, default_engine, engine_named
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Instance, Service, absolute, of_experiment

if TYPE_CHECKING:
    from flagscale_config import Experiment

__all__ = ["READY_TIMEOUT_S", "plan"]

READY_TIMEOUT_S = 1800.0
"""Loading and compiling a large model can take this long."""
_LOOPBACK = ("localhost", "::1")
_ANY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104 - compared, never bound
_MAX_KV_CACHE_BYTES = 16 << 30


def plan(
    what: Experiment | Service,
    machine: Machine,
    *,
    python: str = sys.executable,
    engine: str | None = None,
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> Plan:
    """Decide everything about a service: commands, environment, ports, readiness, stop.

    Args:
        what: a loaded FlagScale serve file, or a `Service`.
        machine: where it will run.
        python: interpreter that has the engine; the caller's own unless told.
        engine: serve every item of a file with this engine, whatever the file says.
        ready_timeout_s: seconds until the first token of each instance.

    Raises:
        InvalidService: what is asked contradicts itself, the machine or the engine.
    """
    if isinstance(what, Service):
        service = what
    else:
        service = of_experiment(what, default_engine=default_engine(machine.chip).name, engine=engine)
    devices = _assign_devices(service.instances, machine)
    rendered = [
        engine_named(instance.engine, machine.chip).render(instance, _context(service, machine, python))
        for instance in service.instances
    ]
    pairs = list(zip(service.instances, rendered, strict=True))
    files = {file.path: file for one in rendered for file in one.files}
    return Plan(
        kind="serve",
        name=service.name,
        processes=tuple(
            Process(
                name=instance.name,
                argv=(*service.shell, *one.argv),
                env={**one.env, **devices[instance.name], **service.env},
                cwd=service.cwd,
            )
            for instance, one in pairs
        ),
        files=tuple(files.values()),
        ports={instance.name: instance.port for instance in service.instances},
        probes=tuple(_probe(instance, one, ready_timeout_s) for instance, one in pairs),
        stop=StopPolicy(grace_s=max(engine_named(i.engine, machine.chip).grace_s for i in service.instances)),
        facts=_facts(service, machine, pairs),
        secrets=("VLLM_API_KEY",) if any(i.api_key for i in service.instances) else (),
    )


def _context(service: Service, machine: Machine, python: str) -> Context:
    """Share the host's cores and memory among the instances.

    Half the logical cores, because two hyper-threads of one core only wait for each other in matrix products;
    an eighth of the memory for keys and values, which leaves room for weights and for the machine's other
    users.
    """
    share = len(service.instances)
    return Context(
        python=python,
        chip=machine.chip,
        torch_device=runtime(machine.chip).torch_device,
        num_threads=max(1, machine.num_cpus // 2 // share),
        kv_cache_bytes=min(machine.memory_bytes // 8, _MAX_KV_CACHE_BYTES) // share,
    )


def _assign_devices(instances: Sequence[Instance], machine: Machine) -> dict[str, dict[str, str]]:
    """Give each instance devices of its own; a single instance keeps what the user's environment shows it."""
    wanted = {instance.name: _num_devices(instance) for instance in instances}
    if machine.chip == "cpu":
        for instance in instances:
            if instance.num_devices:
                raise InvalidService(
                    f"{instance.name}: resources.num_gpus: {instance.num_devices}: no accelerator was found "
                    "on this machine: remove it to serve on the CPU"
                )
        return {name: {} for name in wanted}
    total, free = sum(wanted.values()), machine.visible
    if total > len(free):
        asked = ", ".join(f"{name} {count}" for name, count in wanted.items())
        raise InvalidService(
            f"devices: {total} asked for ({asked}): this process may use {len(free)} ({machine.chip}): lower "
            "tensor_parallel_size, or serve fewer instances"
        )
    if len(instances) == 1:
        return {name: {} for name in wanted}
    assigned: dict[str, dict[str, str]] = {}
    for name, count in wanted.items():
        assigned[name] = env(free[:count])
        free = free[count:]
    return assigned


def _num_devices(instance: Instance) -> int:
    """Count the devices of one instance, from its parallel sizes or from `resources.num_gpus`."""
    options = instance.settled
    size = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        size *= _count(options.get(key), f"{instance.name}: engine_args.{key}")
    if instance.num_devices is not None and instance.num_devices < size:
        raise InvalidService(
            f"{instance.name}: resources.num_gpus: {instance.num_devices}: the parallel sizes need {size} "
            "devices: raise it, or leave it out"
        )
    return instance.num_devices or size


def _count(value: Any, where: str) -> int:
    try:
        number = int(1 if value is None else value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise InvalidService(f"{where}: {value!r}: a whole number of at least 1 is needed: correct it")
    return number


def _probe(instance: Instance, rendered: Rendered, timeout_s: float) -> Probe:
    """Ask for one token: a server that answers `/health` may still be unable to generate."""
    headers = {"Authorization": f"Bearer {instance.api_key}"} if instance.api_key else {}
    return Probe(
        url=f"http://{_reachable(instance.host)}:{{port:{instance.name}}}/v1/completions",
        method="POST",
        body={"model": rendered.served_names[0], "prompt": "Hello", "max_tokens": 1, "temperature": 0},
        headers=headers,
        expect="usage.completion_tokens",
        interval_s=0.25,
        timeout_s=timeout_s,
    )


def _reachable(host: str) -> str:
    if host in _ANY_ADDRESS:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _facts(
    service: Service, machine: Machine, pairs: Sequence[tuple[Instance, Rendered]]
) -> Mapping[str, Any]:
    warnings = [text for _, one in pairs for text in one.warnings]
    warnings += [_exposed(instance) for instance, _ in pairs if _is_exposed(instance)]
    return {
        "source": service.source,
        "chip": machine.chip,
        "warnings": warnings,
        "instances": [
            {
                "name": instance.name,
                "engine": instance.engine,
                "model": instance.model,
                "served_names": list(one.served_names),
                "host": _reachable(instance.host),
                "needs_key": instance.api_key is not None,
                "tokenizer": str(absolute(instance.settled.get("tokenizer") or instance.model, service.cwd)),
                "chat_template": instance.settled.get("chat_template"),
            }
            for instance, one in pairs
        ],
    }


def _is_exposed(instance: Instance) -> bool:
    is_loopback = instance.host.startswith("127.") or instance.host in _LOOPBACK
    return not is_loopback and instance.api_key is None


def _exposed(instance: Instance) -> str:
    return (
        f"{instance.name}: host {instance.host}: anybody who reaches this machine can use the model, "
        "because no api_key is set: use 127.0.0.1, or set engine_args.api_key"
    )
