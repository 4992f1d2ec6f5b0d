"""Typed configuration contract for FlagScale: load, check and explain experiment files."""

from flagscale_config.__about__ import __version__

__all__ = ["__version__"]
