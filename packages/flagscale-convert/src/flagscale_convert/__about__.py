"""The version of flagscale-convert, and nothing else."""

__version__ = "0.1.0"
