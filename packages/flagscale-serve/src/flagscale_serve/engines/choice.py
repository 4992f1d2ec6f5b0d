"""Which options an instance starts with, in its engine's own words, and where each comes from.

The one place where precedence is decided: what is said for the engine alone (`engine_args_specific`) wins
over `engine_args`, and both over our defaults. What the engine has no word for is skipped, with a warning,
when it only concerns speed and memory, and refused when it would change what clients get.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flagscale_serve.errors import InvalidService

if TYPE_CHECKING:
    from flagscale_serve.service import Instance

__all__ = ["OURS", "Choice", "Chosen", "choose", "count_of"]

OURS = "default of flagscale-serve"
"""The source of an option that nobody asked for."""

# They decide how fast and in how much memory, not what comes out.
_SPEED_ONLY = frozenset(
    {
        "async_scheduling",
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "cuda_graph_sizes",
        "cudagraph_capture_sizes",
        "data_parallel_backend",
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_log_stats",
        "disable_uvicorn_access_log",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "enable_expert_parallel",
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
        "trust_remote_code",
        "uvicorn_log_level",
        "use_tqdm_on_load",
    }
)
# Switched off they ask for nothing, so `false`, null and 0 are no wish that could be missed.
_NOTHING_ASKED: tuple[Any, ...] = (None, False, "", 0)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """One option, and how it came to be."""

    option: str
    """The engine's own name; the asked one where the engine has none."""
    value: Any
    source: str
    """`engine_args`, `engine_args_specific.<engine>` or `OURS`."""
    asked: str
    """The key in that section."""
    place: str = ""
    """File, line and column, or the override, where it is known."""
    fate: str = ""
    """Empty when it counts; else `overridden` or `skipped`."""
    words: tuple[str, ...] = ()
    """What stands on the engine's command line."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The options of one instance."""

    options: Mapping[str, Any]
    """By the engine's own name; what is null is left out."""
    chosen: tuple[Chosen, ...]
    words: tuple[str, ...]
    """All options as words of the engine's command line."""
    skipped: tuple[str, ...]
    """Keys that the engine has no use for."""


def choose(
    instance: Instance,
    engine: str,
    *,
    label: str,
    defaults: Mapping[str, Any],
    version: str | None,
    ignored: tuple[str, ...] = (),
) -> Choice:
    """Settle the options of one instance.

    Args:
        instance: what is asked.
        engine: whose words are meant, as flagscale-config calls it.
        label: what people call the engine, for messages.
        defaults: our own, in the engine's words.
        version: the engine's, None for the newest known.
        ignored: keys of `engine_args` that the adapter handles itself.

    Raises:
        InvalidService: the engine cannot do what is asked.
        ConfigError: the engine of this version has no such option, or not this value of it.
    """
    # Imported here, because the option tables are not needed to say `--help`.
    from flagscale_config import option_table, render_engine
    from flagscale_config.translation import translate

    choosing = _Choosing(instance, defaults)
    for key, value in instance.options.items():
        if key in ignored:
            continue
        said = translate(engine, {key: value}, version=version)
        for option, word in said.options.items():
            choosing.take(option, word, "engine_args", key)
        if key in said.untranslated:
            choosing.fallen += _unsaid(instance, key, value, label)
    table = option_table(engine, version)
    for key, value in instance.specific.get(instance.engine, {}).items():
        known = table.find(key)
        name = known[0].name if known is not None else key
        word = not value if known is not None and known[1] else value
        choosing.take(name, word, f"engine_args_specific.{instance.engine}", key)
    options = choosing.options()
    chosen = [
        replace(one, words=render_engine(engine, {name: one.value}, version=version))
        for name, one in choosing.found.items()
        if one.value is not None
    ]
    return Choice(
        options=options,
        chosen=(*chosen, *choosing.fallen),
        words=render_engine(engine, options, version=version),
        skipped=tuple(sorted({one.asked for one in choosing.fallen if one.fate == "skipped"})),
    )


class _Choosing:
    """Options taken one after the other, each over the one before it."""

    def __init__(self, instance: Instance, defaults: Mapping[str, Any]) -> None:
        self._places = instance.places
        self.found = {
            name: Chosen(option=name, value=value, source=OURS, asked=name)
            for name, value in defaults.items()
        }
        self.fallen: list[Chosen] = []

    def take(self, option: str, value: Any, source: str, asked: str) -> None:
        if option in self.found:
            self.fallen.append(replace(self.found[option], fate="overridden"))
        place = self._places.get(f"{source}.{asked}", "")
        self.found[option] = Chosen(option=option, value=value, source=source, asked=asked, place=place)

    def options(self) -> dict[str, Any]:
        """Return what counts; a null takes back what came before it and says nothing itself."""
        return {name: one.value for name, one in self.found.items() if one.value is not None}


def _unsaid(instance: Instance, key: str, value: Any, label: str) -> list[Chosen]:
    """Judge a wish that the engine has no word for."""
    if key in _SPEED_ONLY:
        place = instance.places.get(f"engine_args.{key}", "")
        return [Chosen(option=key, value=value, source="engine_args", asked=key, place=place, fate="skipped")]
    if value in _NOTHING_ASKED or (isinstance(value, (list, tuple, Mapping)) and not value):
        return []
    raise InvalidService(
        f"{instance.name}: engine_args.{key}: {value!r}: {label} cannot do this: remove it, say it under "
        f"engine_args_specific.{instance.engine} in its own words, or use engine `vllm`"
    )


def count_of(value: Any, where: str) -> int:
    """Read a size; None is 1.

    Raises:
        InvalidService: it is not a whole number of at least 1.
    """
    try:
        number = int(1 if value is None else value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise InvalidService(f"{where}: {value!r}: a whole number of at least 1 is needed: correct it")
    return number
