"""What one load on a server gave: each request's times, and what follows from them.

Terms are those of vLLM's benchmarks: TTFT, time to the first token; ITL, the gaps between the pieces of an
answer; TPOT, (E2E - TTFT) / (tokens - 1), the mean time of a further token; E2E, the whole request; goodput,
requests per second that keep every bound of the SLO (DistServe, arXiv 2401.09670, section 2).

What does not live here: making the load (`vllm_client.py`, `client.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale_serve.errors import InvalidService

__all__ = ["BOUNDS", "Answered", "Measured", "Workload", "parse_slo", "percentile"]

BOUNDS = ("ttft", "tpot", "itl", "e2e")
"""What an SLO may bound."""
_PERCENTILES = (50, 90, 95, 99)
_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s)?")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One level of load: random prompts, so many at a time."""

    input_len: int = 512
    """Tokens of each prompt, 1 or more."""
    prefix_len: int = 0
    """Tokens more in front of it, the same ones in every prompt."""
    output_len: int = 128
    """Tokens of each answer, 1 or more; fewer where the engine cannot be told to go on."""
    concurrency: int = 32
    """Requests under way at a time, 1 or more."""
    num_requests: int = 128
    """Requests that are counted, 1 or more."""
    num_warmups: int = 0
    """Requests before them that are not."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "concurrency", "num_requests"):
            if getattr(self, name) < 1:
                raise InvalidService(f"{name}: {getattr(self, name)}: at least 1 is needed: raise it")
        for name in ("prefix_len", "num_warmups"):
            if getattr(self, name) < 0:
                raise InvalidService(f"{name}: {getattr(self, name)}: 0 or more is needed: raise it")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One request; seconds."""

    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    """Between one piece of the answer and the next."""
    output_tokens: int = 0
    error: str = ""
    """Why there is no answer; empty when there is one."""

    @property
    def e2e_s(self) -> float:
        """From the request to the last piece."""
        return self.ttft_s + math.fsum(self.gaps_s)

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for an answer of one."""
        return math.fsum(self.gaps_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def keeps(self, slo: Mapping[str, float]) -> bool:
        """Tell whether it was answered within every bound; an answer of one token has no TPOT to miss."""
        found = {
            "ttft": self.ttft_s,
            "tpot": self.tpot_s,
            "itl": max(self.gaps_s, default=None),
            "e2e": self.e2e_s,
        }
        return not self.error and all(
            value is None or value <= slo[name] for name, value in found.items() if name in slo
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one load gave."""

    workload: Workload
    wall_s: float
    requests: tuple[Answered, ...]
    generator: str
    """What made the load."""

    @property
    def answered(self) -> tuple[Answered, ...]:
        """The requests that were answered."""
        return tuple(one for one in self.requests if not one.error)

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens of all answers over the wall time."""
        return sum(one.output_tokens for one in self.answered) / self.wall_s

    def goodput(self, slo: Mapping[str, float]) -> float:
        """Return the requests per second that keep every bound; without bounds, that were answered."""
        return sum(one.keeps(slo) for one in self.requests) / self.wall_s

    def times_s(self, name: str) -> list[float]:
        """Return all times of one kind (`BOUNDS`)."""
        if name == "itl":
            return [gap for one in self.answered for gap in one.gaps_s]
        found = [getattr(one, f"{name}_s") for one in self.answered]
        return [value for value in found if value is not None]

    def to_dict(self, slo: Mapping[str, float]) -> dict[str, Any]:
        """Render as plain JSON: rates, and percentiles in milliseconds."""
        errors = [one.error for one in self.requests if one.error]
        return {
            **vars(self.workload),
            "generator": self.generator,
            "wall_s": round(self.wall_s, 4),
            "answered": len(self.answered),
            "failed": len(errors),
            "errors": list(dict.fromkeys(errors))[:3],
            "output_tokens": sum(one.output_tokens for one in self.answered),
            "requests_per_s": round(len(self.answered) / self.wall_s, 4),
            "output_tokens_per_s": round(self.output_tokens_per_s, 3),
            "goodput_requests_per_s": round(self.goodput(slo), 4),
            "within_slo": round(sum(one.keeps(slo) for one in self.requests) / len(self.requests), 4),
            **{f"{name}_ms": _summary(self.times_s(name)) for name in BOUNDS},
        }


def _summary(times_s: Sequence[float]) -> dict[str, float] | None:
    if not times_s:
        return None
    found = {f"p{rank}": percentile(times_s, rank) for rank in _PERCENTILES}
    found = {"mean": math.fsum(times_s) / len(times_s), **found, "max": max(times_s)}
    return {name: round(1e3 * value, 3) for name, value in found.items()}


def percentile(values: Sequence[float], rank: float) -> float:
    """Interpolate linearly between the nearest ranks, as NumPy does by default.

    Args:
        values: at least one.
        rank: 0..100.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * rank / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def parse_slo(text: str) -> dict[str, float]:
    """Read `ttft=200ms,tpot=20ms,e2e=5s` into seconds; a bare number is milliseconds.

    Raises:
        InvalidService: another name, or no time.
    """
    slo: dict[str, float] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, _, given = word.partition("=")
        match = _TIME.fullmatch(given)
        if name not in BOUNDS or match is None or float(match[1]) == 0:
            raise InvalidService(
                f"slo: {word!r}: {', '.join(BOUNDS)} can be bounded, by a time above 0: write, for example, "
                "ttft=200ms,tpot=20ms"
            )
        if name in slo:
            raise InvalidService(f"slo: {name}: bounded twice: give one bound")
        slo[name] = float(match[1]) / (1 if match[2] == "s" else 1e3)
    return slo
