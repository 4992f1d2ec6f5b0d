"""transformers: `transformers serve`, the engine that runs wherever torch does.

It takes few options. What has no counterpart there is either a matter of speed and memory (skipped, with a
warning) or changes what clients get (an error).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from flagscale_hw import File
from flagscale_serve.engines.adapter import Context, Rendered
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Instance

__all__ = ["TRANSFORMERS", "Transformers"]

_DTYPES = {"half": "float16", "float": "float32"}
_QUANTIZATION = {"bitsandbytes": "bnb-4bit", "bnb-4bit": "bnb-4bit", "bnb-8bit": "bnb-8bit"}
_LAUNCHER = "transformers_launch.py"

# vLLM's option -> the server's own option and the translation of its value; None means: no such value there.
_MAPPED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "dtype": ("dtype", lambda value: _DTYPES.get(str(value), str(value))),
    "trust_remote_code": ("trust_remote_code", bool),
    "seed": ("default_seed", int),
    "quantization": ("quantization", lambda value: _QUANTIZATION.get(str(value))),
    "uvicorn_log_level": ("log_level", lambda value: {"trace": "debug"}.get(str(value), str(value))),
    "device": ("device", str),
    "default_chat_template_kwargs": ("chat_template_kwargs", lambda value: value),
}
# They decide how fast and in how much memory, not what comes out.
_SPEED_ONLY = frozenset(
    {
        "async_scheduling",
        "block_size",
        "compilation_config",
        "cuda_graph_sizes",
        "cudagraph_capture_sizes",
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_log_stats",
        "disable_uvicorn_access_log",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "enable_log_requests",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_dtype_skip_layers",
        "kv_cache_memory_bytes",
        "load_format",
        "max_log_len",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "max_seq_len_to_capture",
        "no_enable_chunked_prefill",
        "no_enable_prefix_caching",
        "num_gpu_blocks_override",
        "preemption_mode",
        "scheduling_policy",
        "show_hidden_metrics_for_version",
        "swap_space",
        "use_tqdm_on_load",
    }
)
_ONE_PROCESS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
# Switched off they ask for nothing, so `false`, null and 1 are no wish that could be missed.
_NOTHING_ASKED: tuple[Any, ...] = (None, False, "", 0)


class Transformers:
    """The adapter; it holds no state."""

    name = "transformers"
    modules = ("transformers", "torch", "fastapi", "uvicorn", "openai")
    distributions = ("transformers",)
    install = "pip install 'flagscale-serve[transformers]'"
    phases = (
        ("Loading weights", "loading weights"),
        ("Started server process", "opening the port"),
        ("Application startup complete", "waiting for the first token"),
    )
    # It waits for every running request before it ends; a person who stops a server does not.
    grace_s = 10.0

    def render(self, instance: Instance, context: Context) -> Rendered:
        """Translate one instance; see `Engine.render`."""
        # Imported here, because the option tables are not needed to say `--help`.
        from flagscale_config import render_engine

        if instance.api_key is not None:
            raise InvalidService(
                f"{instance.name}: api_key: `transformers serve` cannot ask clients for a key: remove it "
                "and serve on 127.0.0.1, or use engine `vllm`"
            )
        options, skipped = _translate(instance)
        options = {"device": context.torch_device, **options, **instance.specific.get(self.name, {})}
        name = instance.served_names[0]
        home = f"{{run_dir}}/huggingface-{instance.name}"
        argv = (
            context.python,
            f"{{run_dir}}/{_LAUNCHER}",
            instance.model,
            name,
            "--host",
            instance.host,
            "--port",
            f"{{port:{instance.name}}}",
            *render_engine(self.name, options),
            *instance.extra_args,
        )
        env = {
            "PYTHONUNBUFFERED": "1",
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "1",
            # Unset, every thread pool takes all cores and tiny steps spend their time waiting for each other.
            "OMP_NUM_THREADS": str(context.num_threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        launcher = files("flagscale_serve.engines").joinpath(_LAUNCHER).read_text(encoding="utf-8")
        warnings: tuple[str, ...] = ()
        if skipped:
            warnings = (
                f"{instance.name}: `transformers serve` has no use for {', '.join(skipped)}: skipped",
            )
        return Rendered(
            argv=argv,
            env=env,
            files=(File(path=_LAUNCHER, text=launcher),),
            warnings=warnings,
            served_names=(name,),
        )


def _translate(instance: Instance) -> tuple[dict[str, Any], list[str]]:
    """Translate vLLM's vocabulary; returns the server's own options and the names that were skipped."""
    found: dict[str, Any] = {}
    skipped: list[str] = []
    for key, value in instance.options.items():
        if key in _ONE_PROCESS:
            _check_one_process(instance.name, key, value)
        elif key in _MAPPED and value is not None:
            name, translate = _MAPPED[key]
            found[name] = _checked(instance.name, key, value, translate)
        elif key in _SPEED_ONLY:
            skipped.append(key)
        elif value not in _NOTHING_ASKED:
            raise InvalidService(
                f"{instance.name}: engine_args.{key}: {value!r}: `transformers serve` cannot do this: "
                "remove it, or use engine `vllm`"
            )
    return found, sorted(skipped)


def _check_one_process(instance: str, key: str, value: Any) -> None:
    if value not in (None, 1, "1"):
        raise InvalidService(
            f"{instance}: engine_args.{key}: {value!r}: `transformers serve` is one process on one device: "
            "use 1, or engine `vllm`"
        )


def _checked(instance: str, key: str, value: Any, translate: Callable[[Any], Any]) -> Any:
    try:
        result = translate(value)
    except (TypeError, ValueError):
        result = None
    if result is None:
        raise InvalidService(
            f"{instance}: engine_args.{key}: {value!r}: `transformers serve` has no such value: remove it, "
            "or use engine `vllm`"
        )
    return result


def native_options() -> Mapping[str, str]:
    """Return which of vLLM's options have a counterpart here, for documentation and tests."""
    return {key: name for key, (name, _) in _MAPPED.items()}


TRANSFORMERS = Transformers()
