"""Engines: how one instance becomes a command line of the program that serves it.

An adapter translates; it never imports the engine, never reads a file and never starts anything. What an
engine cannot do is an error that names the option, never a silent difference. Other packages add engines by
the entry-point group `flagscale_serve.engines`; see `Engine`.

What does not live here: which instances there are (`service.py`), ports and probes (`plan.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from flagscale_serve.engines.adapter import Context, Engine, Layout, Rendered, Seat
from flagscale_serve.engines.choice import Chosen
from flagscale_serve.engines.llama_cpp import LLAMA_CPP
from flagscale_serve.engines.sglang import SGLANG
from flagscale_serve.engines.transformers import TRANSFORMERS
from flagscale_serve.engines.vllm import VLLM
from flagscale_serve.errors import InvalidService

__all__ = [
    "ENGINES",
    "GROUP",
    "Chosen",
    "Context",
    "Engine",
    "Layout",
    "Rendered",
    "Seat",
    "default_engine",
    "engine_named",
    "engine_names",
]

GROUP = "flagscale_serve.engines"
"""Entry points of other packages' engines."""
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (VLLM, SGLANG, LLAMA_CPP, TRANSFORMERS)}
"""The engines of this package."""


def default_engine(chip: str) -> Engine:
    """Choose by chip: vLLM where there is an accelerator, transformers on a plain CPU."""
    return TRANSFORMERS if chip == "cpu" else VLLM


def engine_names() -> tuple[str, ...]:
    """Return the names of all engines, those of other packages included, without importing any of them."""
    others = {point.name for point in entry_points(group=GROUP)}
    return tuple(sorted({*ENGINES, *others}))


@cache
def engine_named(name: str) -> Engine:
    """Return the engine of that name.

    Raises:
        InvalidService: nobody has an adapter for it, or another package's cannot be loaded.
    """
    if name in ENGINES:
        return ENGINES[name]
    for point in entry_points(group=GROUP, name=name):
        return _loaded(point)
    raise InvalidService(
        f"engine: {name!r}: not known: {', '.join(engine_names())} are: choose one of them, or install the "
        f"package that brings it (entry point {GROUP})"
    )


def _loaded(point: EntryPoint) -> Engine:
    """Load another package's engine, whatever may be wrong with it."""
    try:
        found = point.load()
        engine: Engine = found() if isinstance(found, type) else found
        missing = [part for part in _PARTS if not hasattr(engine, part)]
    except Exception as error:
        raise InvalidService(
            f"engine {point.name!r}: {point.value} cannot be loaded ({type(error).__name__}: {error}): mend "
            "or remove the package that brings it"
        ) from error
    if missing:
        raise InvalidService(
            f"engine {point.name!r}: {point.value} has no {', '.join(missing)}: see "
            "flagscale_serve.engines.Engine"
        )
    return engine


_PARTS = (
    *("name", "program", "modules", "distributions", "install", "phases", "grace_s"),
    *("layout", "render"),
)
