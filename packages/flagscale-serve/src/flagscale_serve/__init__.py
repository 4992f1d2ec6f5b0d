"""Serving runner of FlagScale on vLLM, SGLang, llama.cpp and transformers."""

from flagscale_serve.__about__ import __version__

__all__ = ["__version__"]
