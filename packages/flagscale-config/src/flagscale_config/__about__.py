"""The version of flagscale-config, and nothing else."""

__version__ = "0.1.0"
