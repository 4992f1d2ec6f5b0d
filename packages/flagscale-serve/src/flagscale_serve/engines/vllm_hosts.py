"""vLLM over several processes: one instance on several hosts, and prefill apart from decode.

Several hosts are vLLM's own business (`--nnodes`, `--node-rank`, `--master-addr`; ranks above 0 are
`--headless`; https://docs.vllm.ai, "Parallelism and Scaling" and "Data Parallel Deployment"), or Ray's where
the file asks for it (`distributed_executor_backend: ray`). Whatever works for the first rank leaves after it
(`leave_last.py`). Keys and values move from prefill to decode by NixlConnector (https://docs.vllm.ai,
"NixlConnector Usage Guide"); FlagScale's P2pNcclConnector is in no vLLM from 0.25 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flagscale_serve.engines.adapter import Companion, Context, Layout
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Instance

__all__ = ["LEAVE_LAST", "Rank", "across_hosts", "ray_node", "staying_for", "transfer", "uses_ray"]

LEAVE_LAST = "leave_last.py"
"""What `staying_for` runs; the plan places it in the run directory."""

_CONNECTOR = "NixlConnector"
_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
"""vLLM 0.32 says that `kv_both`, which its guide once recommended, will go; older ones do not look at it."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What one rank of an instance that spans hosts has beside the instance's own options."""

    options: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    """Options whose values are known only where the instance starts."""
    env: Mapping[str, str] = field(default_factory=dict)
    is_headless: bool = False
    """It has no API server."""


def across_hosts(instance: Instance, layout: Layout, context: Context) -> Rank:
    """Describe one rank of an instance; nothing for one that stays on its host.

    Raises:
        InvalidService: copies of the model that each span hosts; Ray on CPUs.
    """
    seat = context.seat
    if uses_ray(instance) and context.chip == "cpu":
        raise InvalidService(
            f"{instance.name}: engine_args.distributed_executor_backend: 'ray': vLLM does not use Ray on "
            "CPUs: leave it out, vLLM connects the hosts itself"
        )
    if seat.num_hosts == 1:
        return Rank()
    env = {"VLLM_HOST_IP": seat.own}
    if seat.interface:
        env |= {"GLOO_SOCKET_IFNAME": seat.interface, "NCCL_SOCKET_IFNAME": seat.interface}
    if uses_ray(instance):
        return Rank(env=env | {"RAY_ADDRESS": f"{seat.head}:{seat.rendezvous}"})
    headless = {"headless": True} if seat.rank else {}
    if layout.data == 1:
        return Rank(
            options={"nnodes": seat.num_hosts, "node_rank": seat.rank, **headless},
            words=("--master-addr", seat.head, "--master-port", seat.rendezvous),
            env=env,
            is_headless=bool(headless),
        )
    copies, rest = divmod(seat.num_devices, layout.tensor * layout.pipeline)
    if rest:
        raise InvalidService(
            f"{instance.name}: data_parallel_size: {layout.data}: each copy needs "
            f"{layout.tensor * layout.pipeline} devices, into which {seat.num_devices} devices of a host "
            "cannot be divided: choose tensor_parallel_size so that copies fit into a host, or set "
            "distributed_executor_backend to ray"
        )
    start = {"data_parallel_start_rank": copies * seat.rank} if seat.rank else {}
    return Rank(
        options={"data_parallel_size_local": copies, **start, **headless},
        words=("--data-parallel-address", seat.head, "--data-parallel-rpc-port", seat.rendezvous),
        env=env,
        is_headless=bool(headless),
    )


def uses_ray(instance: Instance) -> bool:
    """Tell whether the file wants Ray to spread the instance."""
    return bool(instance.settled.get("distributed_executor_backend") == "ray")


def staying_for(instance: Instance, context: Context) -> tuple[str, ...]:
    """Return the words in front of a command that must not end before the instance has given its answers."""
    return (context.python, f"{{run_dir}}/{LEAVE_LAST}", context.seat.head, f"{{port:{instance.name}}}")


def ray_node(instance: Instance, context: Context) -> Companion:
    """Return the Ray process of one host; the first is the head."""
    seat = context.seat
    where = (
        ("--head", "--port", seat.rendezvous)
        if seat.rank == 0
        else ("--address", f"{seat.head}:{seat.rendezvous}")
    )
    words = ("--node-ip-address", seat.own, "--num-gpus", str(seat.num_devices), "--disable-usage-stats")
    ray = (context.python, "-m", "ray.scripts.scripts", "start", "--block", *where, *words)
    return Companion(name="ray", argv=(*staying_for(instance, context), *ray))


def transfer(instance: Instance, context: Context) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the options and variables of a prefill or decode instance; none for one that does both.

    Raises:
        InvalidService: a connector whose ports are not known here.
    """
    if instance.role is None:
        return {}, {}
    given = instance.settled.get("kv_transfer_config")
    config: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    name = config.get("kv_connector") or _CONNECTOR
    if name != _CONNECTOR:
        gone = ", and vLLM 0.25 and later have no P2pNcclConnector" if name == "P2pNcclConnector" else ""
        raise InvalidService(
            f"{instance.name}: engine_args.kv_transfer_config.kv_connector: {name!r}: prefill and decode are "
            f"connected by {_CONNECTOR}{gone}: leave it out"
        )
    env = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": context.seat.own,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": context.transfer_ports[0],
    }
    return {"kv_transfer_config": {**config, "kv_connector": name, "kv_role": _KV_ROLES[instance.role]}}, env
