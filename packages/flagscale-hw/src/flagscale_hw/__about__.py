"""The version of flagscale-hw, and nothing else."""

__version__ = "0.1.0"
