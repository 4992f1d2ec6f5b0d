"""The worker's one error for what a user asked for and cannot have."""

__all__ = ["Refusal"]


class Refusal(Exception):
    """What was asked for cannot be trained, found out only inside the worker; shown without a traceback."""
