"""SGLang: `python -m sglang.launch_server`, on accelerators.

Its option table comes from its own parser (0.5.23), which reads what is rendered here; the phases come from
the log lines of 0.5.17 and 0.5.23, the rest from its documentation (https://docs.sglang.io, "Server
Arguments", "Multi-Node Deployment" and "PD Disaggregation").
"""

from __future__ import annotations

from typing import Any

from flagscale_serve.engines.adapter import Context, Layout, Rendered, Seat
from flagscale_serve.engines.choice import choose, count_of
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Instance

__all__ = ["SGLANG", "Sglang"]

_SIZES = {
    "tensor": ("tensor_parallel_size", "tp_size"),
    "pipeline": ("pipeline_parallel_size", "pp_size"),
    "data": ("data_parallel_size", "dp_size"),
}
_OLD_WORD = "enable_dp_attention"
"""With `dp_size` it says what `attn_dp_size` says since 0.5.23."""
_MEETING = "disaggregation_bootstrap_port"
_OF_ONE_RANK = ("dist_init_addr", "nnodes", "node_rank")


class Sglang:
    """The adapter; it holds no state."""

    name = "sglang"
    program = None
    modules = ("sglang", "torch")
    distributions = ("sglang",)
    install = "pip install 'flagscale-serve[sglang]'"
    phases = (
        ("server_args=", "starting the engine"),
        ("Init torch distributed begin", "connecting the devices"),  # 0.5.17
        ("Init parallel begin", "connecting the devices"),  # 0.5.23
        ("Load weight begin", "loading weights"),
        ("Load weight end", "making room for keys and values"),
        ("CUDA graph begin", "capturing graphs"),
        ("Application startup complete", "waiting for the first token"),
    )
    grace_s = 30.0

    def layout(self, instance: Instance) -> Layout:
        """Read the parallel sizes, in vLLM's words or its own; see `Engine.layout`."""
        own = instance.specific.get(self.name, {})
        sizes = {
            kind: count_of(own.get(word, instance.options.get(common)), f"{instance.name}: {common}")
            for kind, (common, word) in _SIZES.items()
        }
        if own.get(_OLD_WORD):
            sizes["data"] = 1  # the copies share the devices of tensor parallelism
        return Layout(**sizes)

    def _check_ranks(self, instance: Instance, seat: Seat) -> None:
        """Refuse what would end SGLang after a minute, as 0.5.23 checks it, and what only one rank is told.

        Raises:
            InvalidService: copies over several hosts; attention that cannot be shared by the devices.
        """
        layout, own = self.layout(instance), instance.specific.get(self.name, {})
        for key in _OF_ONE_RANK:
            if own.get(key) and (key, own[key]) != ("nnodes", 1):
                raise InvalidService(
                    f"{instance.name}: engine_args_specific.sglang.{key}: {own[key]!r}: one command starts "
                    "all hosts: name them in experiment.runner.hostfile, and remove this"
                )
        if seat.num_hosts > 1 and layout.data > 1:
            raise InvalidService(
                f"{instance.name}: data_parallel_size: {layout.data}: SGLang keeps copies on one host: on "
                f"{seat.num_hosts} hosts set engine_args_specific.sglang.attn_dp_size, which shares "
                "attention, or let each copy answer for itself with resources.num_replicas"
            )
        parts = own.get("attn_dp_size") or (
            own.get("dp_size", instance.options.get("data_parallel_size")) if own.get(_OLD_WORD) else None
        )
        if layout.tensor % count_of(parts, f"{instance.name}: attn_dp_size"):
            raise InvalidService(
                f"{instance.name}: attn_dp_size: {parts}: must divide tensor_parallel_size {layout.tensor}, "
                "among whose devices it shares attention: choose a divisor"
            )

    def render(self, instance: Instance, context: Context) -> Rendered:
        """Translate one instance; see `Engine.render`."""
        if context.chip == "cpu":
            raise InvalidService(
                f"{instance.name}: engine `sglang`: needs an accelerator, and this machine has none: use "
                "engine `vllm` or `transformers`"
            )
        if instance.api_key is not None:
            raise InvalidService(
                f"{instance.name}: api_key: SGLang takes its key on the command line only, where everybody "
                "on the machine can read it: remove it and serve on 127.0.0.1, or use engine `vllm`"
            )
        seat = context.seat
        self._check_ranks(instance, seat)
        defaults: dict[str, Any] = {"enable_metrics": True}
        meeting: tuple[str, ...] = ()
        if instance.role is not None:
            _check_half(instance)
            defaults["disaggregation_mode"] = instance.role
            instance = instance.without(_MEETING)
            if context.transfer_ports:
                meeting = ("--disaggregation-bootstrap-port", context.transfer_ports[0])
        env = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        if seat.num_hosts > 1:
            defaults |= {
                "nnodes": seat.num_hosts,
                "node_rank": seat.rank,
                "dist_init_addr": f"{seat.head}:{seat.rendezvous}",
            }
            if seat.interface:
                env |= {"GLOO_SOCKET_IFNAME": seat.interface, "NCCL_SOCKET_IFNAME": seat.interface}
        choice = choose(
            instance,
            self.name,
            label="SGLang",
            defaults=defaults,
            version=context.version,
            ignored=_unneeded(instance),
        )
        name = instance.served_names[0]
        argv = (
            context.python,
            "-m",
            "sglang.launch_server",
            "--model-path",
            instance.model,
            "--served-model-name",
            name,
            "--host",
            instance.host,
            "--port",
            f"{{port:{instance.name}}}",
            *choice.words,
            *meeting,
            *instance.extra_args,
        )
        warnings: tuple[str, ...] = ()
        if choice.skipped:
            warnings = (f"{instance.name}: SGLang has no use for {', '.join(choice.skipped)}: skipped",)
        return Rendered(
            argv=argv,
            env=env,
            warnings=warnings,
            served_names=(name,),
            chosen=choice.chosen,
            # A half refuses requests that name no other half; here it makes one up, and a token with it.
            health_path="/health_generate" if instance.role else None,
        )


def _check_half(instance: Instance) -> None:
    """Refuse what is said for both halves, although it is true of one."""
    own = instance.specific.get("sglang", {})
    if own.get("disaggregation_mode") not in (None, "null", instance.role):
        raise InvalidService(
            f"{instance.name}: engine_args_specific.sglang.disaggregation_mode: "
            f"{own['disaggregation_mode']!r}: deploy.prefill_decode_disaggregation starts both halves: "
            "remove this"
        )


def _unneeded(instance: Instance) -> tuple[str, ...]:
    """Return the wishes that need no word: with a parser, SGLang lets a model choose its tools by itself."""
    has_parser = "tool_call_parser" in {**instance.options, **instance.specific.get("sglang", {})}
    return ("enable_auto_tool_choice",) if has_parser else ()


SGLANG = Sglang()
