"""Convert model checkpoints between Hugging Face and Megatron without a GPU."""

from flagscale_convert.__about__ import __version__

__all__ = ["__version__"]
