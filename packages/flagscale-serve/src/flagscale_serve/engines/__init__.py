"""Engines: how one instance becomes a command line of the program that serves it.

An adapter translates; it never imports the engine, never reads a file and never starts anything. What an
engine cannot do is an error that names the option, never a silent difference.

What does not live here: which instances there are (`service.py`), ports and probes (`plan.py`).
"""

from __future__ import annotations

from flagscale_serve.engines.adapter import Context, Engine, Rendered
from flagscale_serve.engines.transformers import TRANSFORMERS
from flagscale_serve.engines.vllm import VLLM
from flagscale_serve.errors import InvalidService

__all__ = ["ENGINES", "Context", "Engine", "Rendered", "default_engine", "engine_named"]

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (VLLM, TRANSFORMERS)}


def default_engine(chip: str) -> Engine:
    """Choose by chip: vLLM where there is an accelerator, transformers on a plain CPU."""
    return TRANSFORMERS if chip == "cpu" else VLLM


def engine_named(name: str | None, chip: str) -> Engine:
    """Return the engine of that name, or the chip's default for None.

    Raises:
        InvalidService: this version has no adapter for it.
    """
    if name is None:
        return default_engine(chip)
    if name not in ENGINES:
        raise InvalidService(
            f"engine: {name!r}: this version serves with {' and '.join(sorted(ENGINES))}: choose one of "
            "them, or leave it out"
        )
    return ENGINES[name]
