"""vLLM over several processes: one instance on several hosts, and prefill apart from decode.

Several hosts are vLLM's own business (`--nnodes`, `--node-rank`, `--master-addr`; ranks above 0 are
`--headless`; https://docs.vllm.ai, "Parallelism and Scaling" and "Data Parallel Deployment"), or Ray's where
the file asks for it (`distributed_executor_backend: ray`, `data_parallel_backend: ray`). Whatever works for
the first rank leaves after it (`leave_last.py`). Keys and values move from prefill to decode by NixlConnector
(https://docs.vllm.ai, "NixlConnector Usage Guide"); FlagScale's P2pNcclConnector is in no vLLM from 0.25 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flagscale_serve.engines.adapter import Companion, Context, Layout, Seat
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import RAY_KEYS, Instance

__all__ = [
    "LEAVE_LAST",
    "Rank",
    "across_hosts",
    "ray_node",
    "staying_for",
    "transfer",
    "uses_ray",
    "without_ranks",
]

LEAVE_LAST = "leave_last.py"
"""What `staying_for` runs; the plan places it in the run directory."""

_OF_ONE_RANK = (
    "data_parallel_address",
    "data_parallel_rank",
    "data_parallel_start_rank",
    "headless",
    "master_addr",
    "nnodes",
    "node_rank",
)
"""One file starts all ranks, so that none of these can stand in it: the hostfile says them all."""
_SEVERAL_DOORS = (
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "data_parallel_multi_port_external_lb",
)
"""With these every host, or every rank, has an address of its own."""
_SETTLED = ("data_parallel_rpc_port", "data_parallel_size_local", "master_port")
"""What the file says of these has gone into ports and places already."""
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
        InvalidService: the file says what only one rank can be told; copies of the model that cannot be
            shared among the hosts; Ray on CPUs.
    """
    seat = context.seat
    _check_ranks(instance)
    if uses_ray(instance) and context.chip == "cpu":
        raise InvalidService(
            f"{instance.name}: engine_args.{RAY_KEYS[0]} or {RAY_KEYS[1]}: 'ray': vLLM does not use Ray on "
            "CPUs: leave it out, vLLM connects the hosts itself"
        )
    if seat.num_hosts == 1:
        return Rank()
    env = {"VLLM_HOST_IP": seat.own}
    if seat.interface:
        env |= {"GLOO_SOCKET_IFNAME": seat.interface, "NCCL_SOCKET_IFNAME": seat.interface}
    copies, rest = divmod(layout.data, seat.num_hosts)
    if uses_ray(instance):
        return _by_ray(layout, seat, env, None if rest else copies)
    headless = {"headless": True} if seat.rank else {}
    if layout.data == 1:
        return Rank(
            options={"nnodes": seat.num_hosts, "node_rank": seat.rank, **headless},
            words=("--master-addr", seat.head, "--master-port", seat.rendezvous),
            env=env,
            is_headless=bool(headless),
        )
    if rest:
        raise InvalidService(
            f"{instance.name}: data_parallel_size: {layout.data}: copies of {layout.copy_devices} devices "
            f"cannot be shared evenly by {seat.num_hosts} hosts of {seat.num_devices} devices: choose "
            "tensor_parallel_size so that copies fit into a host; or let each copy answer for itself with "
            f"resources.num_replicas: {layout.data} instead; or, for a mixture of experts, set "
            "data_parallel_backend to ray"
        )
    start = {"data_parallel_start_rank": copies * seat.rank} if seat.rank else {}
    return Rank(
        options={"data_parallel_size_local": copies, **start, **headless},
        words=("--data-parallel-address", seat.head, "--data-parallel-rpc-port", seat.rendezvous),
        env=env,
        is_headless=bool(headless),
    )


def _by_ray(layout: Layout, seat: Seat, env: dict[str, str], copies: int | None) -> Rank:
    """Leave the ranks to Ray; `copies` of each host, None where a copy takes several hosts."""
    env = env | {"RAY_ADDRESS": f"{seat.head}:{seat.rendezvous}"}
    if layout.data == 1:
        return Rank(env=env)
    options: dict[str, Any] = {"data_parallel_backend": "ray"}
    if copies is None:
        return Rank(options=options, env=env | {"VLLM_RAY_DP_PACK_STRATEGY": "span"})
    return Rank(options={**options, "data_parallel_size_local": copies}, env=env)


def _check_ranks(instance: Instance) -> None:
    """Refuse what would be told to every rank, although it is true of one."""
    for key in (*_OF_ONE_RANK, *_SEVERAL_DOORS):
        value = instance.settled.get(key)
        if value in (None, False, 0) or (key == "nnodes" and value == 1):
            continue
        if key in _OF_ONE_RANK:
            what = "one command starts all hosts: name them in experiment.runner.hostfile, and remove this"
        else:
            what = (
                "an instance has one address: leave it out, and vLLM spreads requests from the first host "
                "(more of its servers there: api_server_count); or serve copies behind a router with "
                "resources.num_replicas"
            )
        raise InvalidService(f"{instance.name}: engine_args.{key}: {value!r}: {what}")


def without_ranks(instance: Instance, rank: Rank) -> Instance:
    """Return it without what is said for its ranks one by one."""
    for key in (*_OF_ONE_RANK, *_SEVERAL_DOORS, *_SETTLED):
        instance = instance.without(key)
    return instance.without("api_server_count") if rank.is_headless else instance


def uses_ray(instance: Instance) -> bool:
    """Tell whether the file wants Ray to spread the instance."""
    return any(instance.settled.get(key) == "ray" for key in RAY_KEYS)


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
    if instance.role == "decode":
        # Else what a prefill has computed that died before it was fetched fails the request.
        config = {"kv_load_failure_policy": "recompute", **config}
    return {"kv_transfer_config": {**config, "kv_connector": name, "kv_role": _KV_ROLES[instance.role]}}, env
