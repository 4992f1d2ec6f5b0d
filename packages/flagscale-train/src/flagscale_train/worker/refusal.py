"""What the worker tells a user: its one error, and what lies at the bottom of other people's."""

from __future__ import annotations

__all__ = ["Refusal", "innermost"]


class Refusal(Exception):
    """What was asked for cannot be trained, found out only inside the worker; shown without a traceback."""


def innermost(error: BaseException) -> BaseException:
    """Return what really happened inside torch's CheckpointException, which only says on which ranks."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        inner = next(iter(failures.values()))
        inner = inner[0] if isinstance(inner, tuple) else inner
        if isinstance(inner, BaseException):
            return innermost(inner)
    return error
