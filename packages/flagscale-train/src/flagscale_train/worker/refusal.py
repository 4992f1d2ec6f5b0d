"""What the worker tells a user: its one error, and what lies at the bottom of other people's."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["Refusal", "first_line", "innermost"]


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


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; of one that says nothing where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines:
        return lines[0]
    frames = traceback.extract_tb(error.__traceback__)
    # Many of Megatron's assertions say nothing but themselves.
    return (
        f"{frames[-1].line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else repr(error)
    )
