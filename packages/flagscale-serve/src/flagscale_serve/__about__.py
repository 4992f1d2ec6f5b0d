"""The version of flagscale-serve, and nothing else."""

__version__ = "0.1.0"
