"""The router in front of several instances: vllm-router, a maintained program with prebuilt wheels.

It knows least-loaded and cache-aware policies, retries, circuit breakers, pairs of prefill and decode, and
several models behind one address (`engines/router_launch.py`).

Refused bodies (too large, not JSON, of a wrong shape) it answers in plain words and not in OpenAI's form, and
no option changes that. `sglang-router` 0.3.2 was tried beside it (0.1.17): it has OpenAI's form for chats but
not for completions, plain words too for what is too large, and SGLang's pairs but not vLLM's connectors. A
proxy of our own in front of either would read and write every token once more for the sake of those words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flagscale_serve.service import Front, Instance

__all__ = ["DISTRIBUTION", "ENGINE", "INSTALL", "LAUNCHER", "MODULE", "is_router", "router_argv"]

ENGINE = "router"
"""What stands for the engine in facts and status."""
DISTRIBUTION = "vllm-router"
MODULE = "vllm_router"
MAX_BODY_BYTES = 64 << 20
"""Larger requests are refused with 413. The longest contexts are a few MiB; pictures come to tens."""
_NEVER = str(1 << 30)
_BY_HEADER = ("consistent_hash",)
"""Policies that choose by a client's headers, of which the router of parted instances hands on none."""
INSTALL = "pip install 'flagscale-serve[router]'"
LAUNCHER = "router_launch.py"
"""What starts the router of several models; the plan places it in the run directory."""


def is_router(argv: Sequence[str]) -> bool:
    """Tell whether a command line is a router's."""
    return f"{MODULE}.launch_router" in argv


def inner_fronts(front: Front, members: Sequence[Instance]) -> tuple[Front, ...]:
    """Return the ordinary routers that stand between the router of parted instances and each half.

    Where prefill is apart from decode, vllm-router 0.1.17 tries a request once and has no circuit breaker: an
    instance that died fails its share of all requests until the health check leaves it out. An ordinary router
    before all instances of a half asks another one, and what is being computed when one dies is computed
    again. A half of one instance needs none, for there is no other to ask.
    """
    if not front.is_parted or front.policy in _BY_HEADER:
        return ()
    halves: dict[str, list[str]] = {}
    for one in members:
        halves.setdefault(str(one.role), []).append(one.name)
    return tuple(
        Front(name=f"{front.name}-{role}", host="127.0.0.1", port=None, policy=front.policy, members=tuple(names))
        for role, names in halves.items()
        if len(names) > 1
    )


def router_argv(  # noqa: PLR0913 - where everything is
    front: Front,
    members: Sequence[Instance],
    *,
    python: str,
    host: str,
    own_url: str,
    urls: Mapping[str, str],
    startup_s: float,
) -> tuple[str, ...]:
    """Return the router's command line.

    Args:
        front: where it listens and how it spreads requests.
        members: the instances behind it.
        python: interpreter that has the router.
        host: address to listen on.
        own_url: where it is reached.
        urls: instance -> base address of it, or of the router before its half.
        startup_s: seconds that the instances may take to answer.
    """
    launcher: tuple[str, ...] = ()
    failures = "2"
    if front.is_of_several_models:
        known = (f"{one.served_names[0]}={urls[one.name]}" for one in members)
        launcher = (python, f"{{run_dir}}/{LAUNCHER}", own_url, *known, "--")
        workers: tuple[str, ...] = ("--enable-igw",)
    elif front.is_parted:
        workers = ("--vllm-pd-disaggregation",)
        halves = dict.fromkeys((str(one.role), urls[one.name]) for one in members)
        for role, url in halves:
            workers += (f"--{role}", url)
        if len(halves) == len({role for role, _ in halves}):
            # Each half has one door, and there is no other to send requests to while that one is away.
            failures = _NEVER
    else:
        workers = ("--worker-urls", *(urls[one.name] for one in members))
    return (
        *launcher,
        python,
        "-m",
        f"{MODULE}.launch_router",
        *("--host", host, "--port", f"{{port:{front.name}}}"),
        *("--policy", front.policy),
        *("--worker-startup-timeout-secs", str(max(1, round(startup_s)))),
        *("--worker-startup-check-interval", "1"),
        # Its own habit is to notice a dead instance after three minutes.
        *("--health-check-interval-secs", "5", "--health-failure-threshold", failures),
        # An engine answers /health when its model is there, so that one answer is enough to be used again:
        # with its habit of two, an instance that was started again stands idle for up to ten seconds.
        *("--health-success-threshold", "1"),
        # It tries a request five times, and one that died, which has the least to do, again and again: it is
        # to be left out before the last try (its habit is ten failures), and not for a minute.
        *("--cb-failure-threshold", "3", "--cb-timeout-duration-secs", "10"),
        *("--max-payload-size", str(MAX_BODY_BYTES)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", f"{{port:{front.name}-metrics}}"),
        *workers,
    )
