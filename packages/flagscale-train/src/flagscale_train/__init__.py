"""Training runner of FlagScale on megatron-core's own trainer."""

from flagscale_train.__about__ import __version__

__all__ = ["__version__"]
