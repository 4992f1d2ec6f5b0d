"""How busy a server is, from the numbers that engines publish for Prometheus at `/metrics`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Load", "parse", "read_load"]

_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)")
# Field -> the names under which vLLM, SGLang and llama.cpp publish it.
_NAMES = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred"),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
    "generated": (
        "vllm:generation_tokens_total",
        "sglang:generation_tokens_total",
        "llamacpp:tokens_predicted_total",
    ),
    # SGLang counts the tokens of a request when it ends, so that its counter stands still under long ones.
    "tokens_per_s": ("sglang:gen_throughput",),
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy one instance is; None where its engine does not say."""

    running: int | None = None
    """Requests that generate."""
    waiting: int | None = None
    """Requests in the queue."""
    kv_usage: float | None = None
    """Part of the room for keys and values that is taken, 0..1."""
    tokens_per_s: float | None = None
    """Generated over the moment in which it was looked at; SGLang's own figure, of its last steps."""


def parse(text: str) -> dict[str, float]:
    """Read the text format of Prometheus; values of one name with several labels are added."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        found[match[1]] = found.get(match[1], 0.0) + value
    return found


def read_load(url: str, *, over_s: float = 0.5, timeout_s: float = 2.0) -> Load | None:
    """Ask an instance how busy it is; None where it does not tell.

    Args:
        url: base address of the server, with or without `/v1`.
        over_s: seconds between two looks, from which the rate of tokens follows; 0 looks once.
        timeout_s: seconds that it may take to answer.
    """
    first = _look(url, timeout_s)
    if first is None:
        return None
    rate = first.numbers.get("tokens_per_s")
    if rate is None and over_s > 0 and "generated" in first.numbers:
        time.sleep(over_s)
        second = _look(url, timeout_s)
        if second is not None and "generated" in second.numbers:
            grown = second.numbers["generated"] - first.numbers["generated"]
            # A restarted engine counts from 0 again.
            rate = max(0.0, grown) / (second.at - first.at)
            first = second
    return Load(
        running=_whole(first.numbers.get("running")),
        waiting=_whole(first.numbers.get("waiting")),
        kv_usage=first.numbers.get("kv_usage"),
        tokens_per_s=rate,
    )


@dataclass(frozen=True)
class _Look:
    """What an instance published, and when."""

    numbers: Mapping[str, float]
    at: float


def _look(url: str, timeout_s: float) -> _Look | None:
    import httpx

    base = url.removesuffix("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY")
    try:
        response = httpx.get(f"{base}/metrics", timeout=timeout_s, trust_env=False)
        if response.status_code == 401 and key:  # llama.cpp shows them to its clients only
            headers = {"Authorization": f"Bearer {key}"}
            response = httpx.get(f"{base}/metrics", headers=headers, timeout=timeout_s, trust_env=False)
    except (httpx.HTTPError, UnicodeEncodeError):  # the key may be no key at all
        return None
    at = time.monotonic()
    if response.status_code != 200:
        return None
    numbers = parse(response.text)
    known = {
        field: next((numbers[name] for name in names if name in numbers), None)
        for field, names in _NAMES.items()
    }
    found = {field: value for field, value in known.items() if value is not None}
    return _Look(found, at) if found else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
