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
INSTALL = "pip install 'flagscale-serve[router]'"
LAUNCHER = "router_launch.py"
"""What starts the router of several models; the plan places it in the run directory."""


def is_router(argv: Sequence[str]) -> bool:
    """Tell whether a command line is a router's."""
    return f"{MODULE}.launch_router" in argv


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
        urls: instance -> base address.
        startup_s: seconds that the instances may take to answer.
    """
    launcher: tuple[str, ...] = ()
    if front.is_of_several_models:
        known = (f"{one.served_names[0]}={urls[one.name]}" for one in members)
        launcher = (python, f"{{run_dir}}/{LAUNCHER}", own_url, *known, "--")
        workers: tuple[str, ...] = ("--enable-igw",)
    elif members[0].role is None:
        workers = ("--worker-urls", *(urls[one.name] for one in members))
    else:
        workers = ("--vllm-pd-disaggregation",)
        for one in members:
            workers += (f"--{one.role}", urls[one.name])
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
        *("--health-check-interval-secs", "5", "--health-failure-threshold", "2"),
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
