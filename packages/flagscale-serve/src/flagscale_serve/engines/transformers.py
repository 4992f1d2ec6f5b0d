"""transformers: `transformers serve`, the engine that runs wherever torch does.

It takes few options. What has no counterpart there is either a matter of speed and memory (skipped, with a
warning) or changes what clients get (an error).
"""

from __future__ import annotations

from typing import Any

from flagscale_hw import File
from flagscale_serve.engines.adapter import Context, Layout, Rendered, text_of
from flagscale_serve.engines.choice import choose
from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Instance

__all__ = ["TRANSFORMERS", "Transformers"]

_LAUNCHER = "transformers_launch.py"
_QUANTIZATION = ("bnb-4bit", "bnb-8bit")
_ONE_PROCESS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


class Transformers:
    """The adapter; it holds no state."""

    name = "transformers"
    program = None
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

    def layout(self, instance: Instance) -> Layout:
        """Refuse anything but one process; see `Engine.layout`."""
        for key in _ONE_PROCESS:
            _check_one_process(instance.name, key, instance.options.get(key))
        return Layout()

    def render(self, instance: Instance, context: Context) -> Rendered:
        """Translate one instance; see `Engine.render`."""
        if instance.role is not None:
            raise InvalidService(
                f"{instance.name}: engine `transformers`: it cannot part prefill from decode: use engine "
                "`vllm`"
            )
        if instance.api_key is not None:
            raise InvalidService(
                f"{instance.name}: api_key: `transformers serve` cannot ask clients for a key: remove it "
                "and serve on 127.0.0.1, or use engine `vllm`"
            )
        device = {"device": instance.options.get("device", context.torch_device)}
        choice = choose(
            instance,
            self.name,
            label="`transformers serve`",
            defaults=device,
            version=context.version,
            ignored=(*_ONE_PROCESS, "device"),
        )
        _check_quantization(instance, choice.options.get("quantization"))
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
            *choice.words,
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
        warnings: tuple[str, ...] = ()
        if choice.skipped:
            warnings = (
                f"{instance.name}: `transformers serve` has no use for {', '.join(choice.skipped)}: skipped",
            )
        return Rendered(
            argv=argv,
            env=env,
            files=(File(path=_LAUNCHER, text=text_of(_LAUNCHER)),),
            warnings=warnings,
            served_names=(name,),
            chosen=choice.chosen,
        )


def _check_one_process(instance: str, key: str, value: Any) -> None:
    if value not in (None, 1, "1"):
        raise InvalidService(
            f"{instance}: engine_args.{key}: {value!r}: `transformers serve` is one process on one device: "
            "use 1, or engine `vllm`"
        )


def _check_quantization(instance: Instance, value: Any) -> None:
    if value not in (None, *_QUANTIZATION):
        raise InvalidService(
            f"{instance.name}: engine_args.quantization: {value!r}: `transformers serve` has "
            f"{' and '.join(_QUANTIZATION)}: use one of them, or engine `vllm`"
        )


TRANSFORMERS = Transformers()
