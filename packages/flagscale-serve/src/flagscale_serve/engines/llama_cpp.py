"""llama.cpp: `llama-server`, which serves one GGUF file on nearly anything.

It is a program, not a Python package: it is looked for on the PATH of the host that serves.
"""

from __future__ import annotations

from typing import Any

from flagscale_serve.engines.adapter import Context, Layout, Rendered
from flagscale_serve.engines.choice import choose, count_of
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Instance

__all__ = ["LLAMA_CPP", "LlamaCpp"]

_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
# A connection takes a thread of the server for as long as it sends and reads. Left alone, it has a handful of
# them and waits an hour for each byte: few slow clients then keep it from everybody.
_MANNERS = {"threads_http": 256, "timeout": 60}


class LlamaCpp:
    """The adapter; it holds no state."""

    name = "llama_cpp"
    program = "llama-server"
    modules = ()
    distributions = ()
    install = "see https://github.com/ggml-org/llama.cpp#quick-start"
    phases = (
        ("loading model", "loading weights"),
        ("load_tensors", "loading weights"),
        ("llama_kv_cache", "making room for keys and values"),
        ("warming up", "warming up"),
        ("server is listening", "waiting for the first token"),
    )
    grace_s = 10.0

    def layout(self, instance: Instance) -> Layout:
        """Count devices: it divides the model's layers over all that it sees; see `Engine.layout`."""
        tensor, pipeline = (
            count_of(instance.options.get(key), f"{instance.name}: engine_args.{key}") for key in _SIZES
        )
        return Layout(pipeline=tensor * pipeline)

    def render(self, instance: Instance, context: Context) -> Rendered:
        """Translate one instance; see `Engine.render`."""
        if context.seat.num_hosts > 1 or instance.role is not None:
            raise InvalidService(
                f"{instance.name}: engine `llama_cpp`: one process on one host is all it can be: lower the "
                "parallel sizes, or use engine `vllm`"
            )
        copies = count_of(
            instance.options.get("data_parallel_size"), f"{instance.name}: engine_args.data_parallel_size"
        )
        if copies > 1:
            raise InvalidService(
                f"{instance.name}: engine_args.data_parallel_size: {copies}: llama.cpp serves one copy per "
                "process: use resources.num_replicas"
            )
        defaults: dict[str, Any] = {"metrics": True, **_MANNERS}
        if context.chip == "cpu":
            defaults["threads"] = context.num_threads
        choice = choose(
            instance,
            self.name,
            label="llama.cpp",
            defaults=defaults,
            version=context.version,
            ignored=(*_SIZES, "data_parallel_size", "dtype"),  # a GGUF file has one number format, its own
        )
        # It answers to every name and shows the alphabetically first: of names that nobody chose, a path.
        is_chosen = instance.model not in instance.served_names
        names = instance.served_names if is_chosen else instance.served_names[:1]
        # Not on the command line, where everybody on the machine can read it.
        env = {"LLAMA_API_KEY": instance.api_key} if instance.api_key is not None else {}
        argv = (
            self.program,
            "--model",
            instance.model,
            "--alias",
            ",".join(names),
            "--host",
            instance.host,
            "--port",
            f"{{port:{instance.name}}}",
            *choice.words,
            *instance.extra_args,
        )
        warnings: tuple[str, ...] = ()
        if choice.skipped:
            warnings = (f"{instance.name}: llama.cpp has no use for {', '.join(choice.skipped)}: skipped",)
        return Rendered(
            argv=argv,
            env=env,
            warnings=warnings,
            served_names=instance.served_names,
            chosen=choice.chosen,
        )


LLAMA_CPP = LlamaCpp()
