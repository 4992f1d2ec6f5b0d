"""The version of flagscale-train, and nothing else."""

__version__ = "0.1.0"
