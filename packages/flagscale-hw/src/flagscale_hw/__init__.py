"""Which accelerators are here, and how to run processes on hosts."""

from flagscale_hw.__about__ import __version__

__all__ = ["__version__"]
