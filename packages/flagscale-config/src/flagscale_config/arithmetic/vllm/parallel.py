"""How vLLM is spread over devices and nodes.

Twins of `ParallelConfig`, of the launch options in `EngineArgs.create_engine_config` and of `vllm serve`.
"""

from __future__ import annotations

from flagscale_config.arithmetic.options import Rule, divisors, listed
from flagscale_config.arithmetic.vllm.options import VllmCheck, VllmOptions

__all__ = ["CHECKS"]

_RANK, _LOCAL, _HYBRID = "data_parallel_rank", "data_parallel_size_local", "data_parallel_hybrid_lb"
_EXTERNAL, _START = "data_parallel_external_lb", "data_parallel_start_rank"
_BACKEND, _MICROBATCHED = "distributed_executor_backend", ("deepep_low_latency", "deepep_high_throughput")


def _nodes(options: VllmOptions) -> int:
    return int(options["nnodes"] or 1)


def _check_backend(options: VllmOptions) -> None:
    backend = options[_BACKEND]
    if options.pp > 1 and backend not in {None, "ray", "mp", "external_launcher"}:
        message = f"{backend} does not go with pipeline_parallel_size {options.pp}; use mp or ray"
        options.error(_BACKEND, message)
    if _nodes(options) > 1 and backend == "ray":
        options.error(_BACKEND, f"ray does not go with nnodes {_nodes(options)}; use mp, or leave nnodes out")
    if options["ray_workers_use_nsight"] and backend != "ray":
        options.error("ray_workers_use_nsight", "needs distributed_executor_backend ray")


def _check_nodes(options: VllmOptions) -> None:
    nodes, rank = _nodes(options), options["node_rank"] or 0
    if nodes == 1:
        return
    world = options.dp * options.pp * options.tp * options.pcp
    if options["data_parallel_backend"] not in {None, "mp"}:
        options.error("data_parallel_backend", f"must be mp where nnodes is more than 1 ({nodes} given)")
    if world % nodes:
        near = listed([number for number in divisors(world) if number > 1]) or "1"
        options.error("nnodes", f"{world} processes cannot be shared by {nodes} nodes; use one of {near}")
    if not 0 <= rank < nodes:
        options.error("node_rank", f"must be between 0 and {nodes - 1} ({rank} given)")


def _check_balancing(options: VllmOptions) -> None:
    """Check who spreads requests over data-parallel ranks: vLLM, something outside, or both."""
    if options[_HYBRID] and options.is_external:
        options.error(_HYBRID, f"does not go with {options.blame(_EXTERNAL, _RANK)}; keep one")
    elif options.is_external:
        _check_external(options)
    elif options[_HYBRID] and options[_LOCAL] is None and _nodes(options) == 1:
        options.error(_HYBRID, f"needs {_LOCAL}, the data-parallel ranks of this node")
    if options.is_external and options[_START] is not None and not options[_HYBRID]:
        options.error(_START, f"does not go with {options.blame(_EXTERNAL, _RANK)}; keep one")


def _check_external(options: VllmOptions) -> None:
    name, dp, nodes = options.blame(_EXTERNAL, _RANK), options.dp, _nodes(options)
    model, local = options.model, options[_LOCAL]
    if dp <= 1:
        options.error(name, f"needs data_parallel_size of more than 1 ({dp} given)")
        return
    if options[_RANK] is None and (nodes == 1 or nodes % dp):
        options.error(name, f"needs {_RANK}, or nnodes a multiple of data_parallel_size {dp}")
    if local not in {None, 1}:
        options.error(_LOCAL, f"must be 1 with {name} ({local} given)")
    if model is not None and not model.is_moe:
        options.error(name, "needs a model with experts; start independent copies of a dense one")


def _check_ranks(options: VllmOptions) -> None:
    local, rank = options[_LOCAL], options[_RANK]
    start = None if options.is_external or local is None else options[_START]
    if local is not None and local > options.dp and not options.is_external:
        options.error(_LOCAL, f"{local} is more than data_parallel_size {options.dp}")
    for name, value in ((_RANK, rank), (_START, start)):
        if value is not None and not 0 <= value < options.dp and options.dp > 1:
            options.error(name, f"must be between 0 and {options.dp - 1} ({value} given)")


def _check_context(options: VllmOptions) -> None:
    """Check into how many parts the cache is cut."""
    tp, pcp, dcp = options.tp, options.pcp, options.dcp
    if pcp == 1 and tp % dcp:
        message = f"{dcp} does not divide tensor_parallel_size {tp}; use one of {listed(divisors(tp))}"
        options.error("decode_context_parallel_size", message)
    elif pcp > 1 and dcp not in {1, pcp, tp * pcp}:
        message = (
            f"must be 1, prefill_context_parallel_size {pcp} or {tp * pcp}, that times tensor_parallel_size"
        )
        options.error("decode_context_parallel_size", f"{message} ({dcp} given)")


def _check_experts(options: VllmOptions) -> None:
    """Check how the load of experts is balanced."""
    part, world = options.part("eplb_config"), options.tp * options.pcp * options.dp
    if options["enable_eplb"]:
        if not options["enable_expert_parallel"]:
            options.error("enable_eplb", "needs enable_expert_parallel")
        if world == 1:
            options.error("enable_eplb", "needs tensor, prefill-context or data parallelism")
    elif part.get("num_redundant_experts"):
        options.error("eplb_config", "num_redundant_experts needs enable_eplb")
    is_async = part.get("use_async", True)
    if is_async and part.get("policy", "default") != "default":
        options.error("eplb_config", "use_async goes with policy default only; set use_async: false")
    if is_async and part.get("communicator") in ("torch_nccl", "pynccl"):
        options.error("eplb_config", "use_async needs communicator torch_gloo or nixl, or none")


def _check_elastic(options: VllmOptions) -> None:
    """Check data parallelism that grows and shrinks."""
    if not options["enable_elastic_ep"]:
        return
    limit = options["elastic_ep_max_dp_size"]
    if not options["enable_eplb"]:
        options.error("enable_elastic_ep", "needs enable_eplb")
    if options.pp > 1:
        options.error("enable_elastic_ep", "does not go with pipeline parallelism")
    if options.is_external or options[_HYBRID]:
        name = options.blame(_EXTERNAL, _RANK, _HYBRID)
        options.error("enable_elastic_ep", f"does not go with {name}")
    if limit is not None and limit < options.dp:
        options.error("elastic_ep_max_dp_size", f"{limit} is less than data_parallel_size {options.dp}")


def _check_microbatches(options: VllmOptions) -> None:
    size = 2 if options["enable_dbo"] else options["ubatch_size"] or 0
    if size < 2:
        return
    name = options.blame("enable_dbo", "ubatch_size")
    kinds = (*_MICROBATCHED, "nixl_ep")
    if options["all2all_backend"] not in kinds:
        options.error(name, f"needs all2all_backend {', '.join(kinds)} ({options['all2all_backend']} given)")
    for threshold in ("dbo_decode_token_threshold", "dbo_prefill_token_threshold"):
        if (options[threshold] or 0) < size:
            options.error(threshold, f"must be at least {size}, the number of micro batches")


def _check_moonep(options: VllmOptions) -> None:
    if options["all2all_backend"] != "moonep":
        return
    for is_odd, words in (
        (options["quantization"] is not None, f"quantization {options['quantization']}"),
        (options["dtype"] not in {"auto", "bfloat16"}, f"dtype {options['dtype']}"),
        (options["enable_eplb"], "enable_eplb"),
        (options["expert_placement_strategy"] != "linear", "expert_placement_strategy other than linear"),
    ):
        if is_odd:
            options.error("all2all_backend", f"moonep does not go with {words}")


def _check_pinning(options: VllmOptions) -> None:
    nodes, devices = options.values("numa_bind_nodes"), options.values("device_ids")
    for name in ("numa_bind_nodes", "numa_bind_cpus"):
        if options[name] is not None and not options["numa_bind"]:
            options.error(name, "needs numa_bind")
    if any(int(node) < 0 for node in nodes):
        options.error("numa_bind_nodes", "must be 0 or more each")
    if len(devices) == 1 and isinstance(devices[0], str):
        devices = tuple(word.strip() for word in devices[0].split(","))
    if len(set(devices)) < len(devices):
        options.error("device_ids", "names a device twice")
    if len({str(device).isdigit() for device in devices}) > 1:
        options.error("device_ids", "mixes numbers and UUIDs; use one kind")


CHECKS: tuple[VllmCheck, ...] = (
    _check_backend,
    _check_nodes,
    _check_balancing,
    _check_ranks,
    _check_context,
    _check_experts,
    _check_elastic,
    _check_microbatches,
    _check_moonep,
    _check_pinning,
    Rule(
        "enable_fault_tolerance",
        lambda o: o["enable_fault_tolerance"] and not o.is_external,
        f"needs {_EXTERNAL} or {_RANK}",
    ),
    Rule(
        "api_server_count",
        lambda o: o["headless"] and (o["api_server_count"] or 0) > 0,
        "does not go with headless, which starts no API server",
    ),
    Rule(_HYBRID, lambda o: o["headless"] and o[_HYBRID], "does not go with headless"),
    Rule(
        "data_parallel_multi_port_external_lb",
        lambda o: o["data_parallel_multi_port_external_lb"] and (o.is_external or o[_HYBRID]),
        "does not go with another way of balancing; keep one",
    ),
)
