"""The router in front of several instances: a maintained program with prebuilt wheels.

vllm-router knows least-loaded and cache-aware policies, retries, circuit breakers, pairs of prefill and
decode, and several models behind one address (`engines/router_launch.py`). SGLang's pairs are of another
kind, which sglang-router knows, the program that vllm-router was made from: the two differ in what `Router`
says.

Refused bodies (too large, not JSON, of a wrong shape) it answers in plain words and not in OpenAI's form, and
no option changes that. `sglang-router` 0.3.2 was tried beside it (0.1.17): it has OpenAI's form for chats but
not for completions, plain words too for what is too large, and not vLLM's connectors. A proxy of our own in
front of either would read and write every token once more for the sake of those words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flagscale_serve.errors import InvalidService
from flagscale_serve.service import Front, Instance

__all__ = [
    "ENGINE",
    "LAUNCHER",
    "SGLANG_ROUTER",
    "VLLM_ROUTER",
    "Router",
    "bootstrap_of",
    "inner_fronts",
    "parted_by",
    "router_argv",
    "router_in",
    "router_of",
]

ENGINE = "router"
"""What stands for the engine in facts and status."""
MAX_BODY_BYTES = 64 << 20
"""Larger requests are refused with 413. The longest contexts are a few MiB; pictures come to tens."""
LAUNCHER = "router_launch.py"
"""What starts the router of several models; the plan places it in the run directory."""
_NEVER = str(1 << 30)
_BY_HEADER = "consistent_hash"
"""Chooses by a client's headers, of which vllm-router hands on none where it parts prefill from decode."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """A router program; what is not said here is the same in all."""

    distribution: str
    module: str
    extra: str
    """Of this package, which brings it."""
    parted: str
    """Its option for prefill apart from decode."""
    tries_again: bool
    """It does so where prefill is apart from decode, too."""
    names_bootstrap: bool
    """It tells both halves of a request at which port of the prefill they meet."""
    told: str
    """What its log tells, as RUST_LOG: no line for each request."""
    lacks: tuple[str, ...] = ()
    """Policies of the others that it does not know."""
    when_parted: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Options that differ where prefill is apart from decode."""

    @property
    def install(self) -> str:
        """What a person types to get it."""
        return f"pip install 'flagscale-serve[{self.extra}]'"

    @property
    def launcher(self) -> str:
        """What Python runs as a module."""
        return f"{self.module}.launch_router"


VLLM_ROUTER = Router(
    distribution="vllm-router",
    module="vllm_router",
    extra="router",
    parted="--vllm-pd-disaggregation",
    tries_again=False,
    names_bootstrap=False,
    told="info,vllm_router_rs::policies=warn",
)
SGLANG_ROUTER = Router(
    distribution="sglang-router",
    module="sglang_router",
    extra="sglang-router",
    parted="--pd-disaggregation",
    tries_again=True,
    names_bootstrap=True,
    told="info,smg::request=warn,smg::response=warn",
    lacks=(_BY_HEADER,),
    when_parted={
        # Its breakers charge a failure to both halves of a request: a dead prefill would shut out decode, and
        # all requests with it. Without them it tries again, for 3.8 s in all, until the dead one is left out.
        "--cb-failure-threshold": _NEVER,
        "--retry-max-retries": "9",
        "--health-check-interval-secs": "1",
    },
)


def parted_by(engine: str) -> Router:
    """Return the router that parts prefill from decode for an engine."""
    return SGLANG_ROUTER if engine == "sglang" else VLLM_ROUTER


def router_of(front: Front, instances: Sequence[Instance]) -> Router:
    """Return the router of an address, for the first of the instances that is behind it."""
    engine = next(one.engine for one in instances if one.name in front.members)
    return parted_by(engine) if front.is_parted else VLLM_ROUTER


def router_in(argv: Sequence[str]) -> Router | None:
    """Return the router that a command line starts; None for another program."""
    return next((one for one in (VLLM_ROUTER, SGLANG_ROUTER) if one.launcher in argv), None)


def bootstrap_of(name: str) -> str:
    """Name the port at which the halves of a request meet a prefill instance."""
    return f"{name}-bootstrap"


def inner_fronts(front: Front, members: Sequence[Instance]) -> tuple[Front, ...]:
    """Return the ordinary routers that stand between the router of parted instances and each half.

    Where prefill is apart from decode, vllm-router 0.1.17 tries a request once and has no circuit breaker: an
    instance that died fails its share of all requests until the health check leaves it out. An ordinary
    router before all instances of a half asks another one, and what is being computed when one dies is
    computed again. A half of one instance needs none, for there is no other to ask. The price: the outer
    router, started again, waits until all instances of the half are there.
    """
    if not front.is_parted or router_of(front, members).tries_again or front.policy == _BY_HEADER:
        return ()
    halves: dict[str, list[str]] = {}
    for one in members:
        halves.setdefault(str(one.role), []).append(one.name)
    return tuple(
        Front(
            name=f"{front.name}-{role}",
            host="127.0.0.1",
            port=None,
            policy=front.policy,
            members=tuple(names),
        )
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

    Raises:
        InvalidService: the router does not know how requests are to be spread.
    """
    router = router_of(front, members)
    if front.policy in router.lacks:
        raise InvalidService(
            f"{front.name}: policy: {front.policy!r}: {router.distribution}, which parts prefill from decode "
            f"for {members[0].engine}, does not know it: use another policy"
        )
    launcher: tuple[str, ...] = ()
    watched = {
        # Its own habit is to notice a dead instance after three minutes.
        "--health-check-interval-secs": "5",
        "--health-failure-threshold": "2",
        # An engine answers /health when its model is there, so that one answer is enough to be used again:
        # with its habit of two, an instance that was started again stands idle for up to ten seconds.
        "--health-success-threshold": "1",
        # It tries a request five times, and one that died, which has the least to do, again and again: it is
        # to be left out before the last try (its habit is ten failures), and not for a minute.
        "--cb-failure-threshold": "3",
        "--cb-timeout-duration-secs": "10",
        **(router.when_parted if front.is_parted else {}),
    }
    if front.is_of_several_models:
        known = (f"{one.served_names[0]}={urls[one.name]}" for one in members)
        launcher = (python, f"{{run_dir}}/{LAUNCHER}", own_url, *known, "--")
        workers: tuple[str, ...] = ("--enable-igw",)
    elif front.is_parted:
        workers = (router.parted,)
        halves = {urls[one.name]: one for one in members}
        for url, one in halves.items():
            workers += (f"--{one.role}", url)
            if router.names_bootstrap and one.role == "prefill":
                workers += (f"{{port:{bootstrap_of(one.name)}}}",)
        if len(halves) == len({one.role for one in halves.values()}):
            # Each half has one door, and there is no other to send requests to while that one is away.
            watched["--health-failure-threshold"] = _NEVER
    else:
        workers = ("--worker-urls", *(urls[one.name] for one in members))
    return (
        *launcher,
        python,
        "-m",
        router.launcher,
        *("--host", host, "--port", f"{{port:{front.name}}}"),
        *("--policy", front.policy),
        *("--worker-startup-timeout-secs", str(max(1, round(startup_s)))),
        *("--worker-startup-check-interval", "1"),
        *(word for option in watched.items() for word in option),
        *("--max-payload-size", str(MAX_BODY_BYTES)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", f"{{port:{front.name}-metrics}}"),
        *workers,
    )
