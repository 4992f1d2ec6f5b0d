"""Load by this package itself, for servers and machines on which no maintained generator works.

`vllm bench serve` needs vLLM beside it and always sends `repetition_penalty`, and GuideLLM sends
`ignore_eos`: transformers' server refuses fields that it does not know. This sends what every
OpenAI-compatible server takes. It is one Python process: a server that generates more than some thousand
tokens per second is to be measured by `vllm bench serve`.

What does not live here: what the times mean (`measured.py`).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from flagscale_serve.bench.measured import Answered, Measured, Workload
from flagscale_serve.chat import Server, message_of
from flagscale_serve.errors import NotServing, RequestFailed

if TYPE_CHECKING:
    import httpx

__all__ = ["GENERATOR", "measure"]

GENERATOR = "flagscale-serve"
_TOKEN_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 10.0
_WORDS = (
    "time",
    "house",
    "river",
    "light",
    "stone",
    "green",
    "seven",
    "north",
    "paper",
    "ship",
    "road",
    "hand",
)
_CALIBRATION = 64


def measure(server: Server, model: str, workload: Workload, *, api_key: str | None) -> Measured:
    """Load a server once.

    Args:
        server: where.
        model: the name that clients write.
        workload: how much; the length of prompts is met by asking the server how long a word is.
        api_key: the server's key.

    Raises:
        NotServing: nobody answers.
        RequestFailed: it refuses the first request.
    """
    import asyncio

    return asyncio.run(_measure(server, model, workload, api_key))


async def _measure(server: Server, model: str, workload: Workload, api_key: str | None) -> Measured:
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=workload.concurrency)
    timeout = httpx.Timeout(_TOKEN_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    async with httpx.AsyncClient(
        headers=headers, limits=limits, timeout=timeout, trust_env=not server.is_local
    ) as client:
        url = f"{server.url}/completions"
        words_per_token = await _words_per_token(client, url, model)
        words = max(1, round(workload.input_len * words_per_token))
        # Not of the seed: every load of a sweep shares it, as the requests of one purpose do.
        prefix = _text(random.Random(0), round(workload.prefix_len * words_per_token))  # noqa: S311
        chance = random.Random(workload.seed)  # noqa: S311 - words, no secret
        total = workload.num_warmups + workload.num_requests
        bodies = [
            {
                "model": model,
                "prompt": f"{prefix} {_text(chance, words)}".lstrip(),
                "max_tokens": workload.output_len,
            }
            for _ in range(total)
        ]
        await _ask_all(client, url, iter(bodies[: workload.num_warmups]), workload.concurrency)
        began = time.perf_counter()
        found = await _ask_all(client, url, iter(bodies[workload.num_warmups :]), workload.concurrency)
        wall_s = time.perf_counter() - began
    return Measured(workload=workload, wall_s=wall_s, requests=tuple(found), generator=GENERATOR)


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(_WORDS, k=words))


async def _words_per_token(client: httpx.AsyncClient, url: str, model: str) -> float:
    """Ask how many tokens some words are."""
    import httpx

    text = _text(random.Random(0), _CALIBRATION)  # noqa: S311
    body = {"model": model, "prompt": text, "max_tokens": 1}
    try:
        response = await client.post(url, json=body)
    except httpx.TransportError as error:
        raise NotServing(f"{url}: nobody answers ({error or type(error).__name__})") from None
    if response.status_code != 200:
        raise RequestFailed(f"{url}: HTTP {response.status_code}: {message_of(response.text)}")
    tokens = (response.json().get("usage") or {}).get("prompt_tokens") or _CALIBRATION
    return float(_CALIBRATION / tokens)


async def _ask_all(
    client: httpx.AsyncClient, url: str, bodies: Iterator[dict[str, Any]], concurrency: int
) -> list[Answered]:
    import asyncio

    found: list[Answered] = []

    async def work() -> None:
        for body in bodies:  # shared: each takes the next one
            found.append(await _ask(client, url, body))  # noqa: PERF401 - as they come

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return found


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answered:
    import httpx

    began = time.perf_counter()
    arrived: list[float] = []
    told = 0
    try:
        async with client.stream("POST", url, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                return Answered(error=f"HTTP {response.status_code}: {message_of(response.text)}")
            async for line in response.aiter_lines():
                event = _event(line)
                if "error" in event:
                    return Answered(error=message_of(json.dumps(event)))
                if any(choice.get("text") for choice in event.get("choices") or ()):
                    arrived.append(time.perf_counter())
                told = (event.get("usage") or {}).get("completion_tokens") or told
    except (httpx.HTTPError, ValueError) as error:
        return Answered(error=str(error) or type(error).__name__)
    if not arrived:
        return Answered(error="no token")
    gaps = tuple(later - earlier for earlier, later in pairwise(arrived))
    # Without a count every piece is taken for a token.
    return Answered(ttft_s=arrived[0] - began, gaps_s=gaps, output_tokens=told or len(arrived))


def _event(line: str) -> dict[str, Any]:
    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
    found = json.loads(data) if data and data != "[DONE]" else {}
    return found if isinstance(found, dict) else {}
