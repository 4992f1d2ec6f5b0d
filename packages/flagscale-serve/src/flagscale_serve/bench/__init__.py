"""Measure a server under real load: a row of concurrencies, percentiles, goodput under an SLO, one page.

`measured.py` holds what a load gave, `subject.py` what was loaded, `vllm_client.py` and `client.py` make the
load, `page.py` shows it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flagscale_serve.bench import client, vllm_client
from flagscale_serve.bench.measured import Answered, Measured, Workload, parse_slo, percentile
from flagscale_serve.bench.page import render_page
from flagscale_serve.bench.subject import subject_of
from flagscale_serve.chat import Server, find_server, key_of, listed_model
from flagscale_serve.checks import has_modules
from flagscale_serve.errors import InvalidService
from flagscale_serve.targets import file_of

__all__ = [
    "GENERATORS",
    "Answered",
    "Benched",
    "Measured",
    "Workload",
    "bench",
    "make_folder",
    "measure",
    "parse_slo",
    "percentile",
    "profile_of",
]

GENERATORS = {"vllm": vllm_client.GENERATOR, "own": client.GENERATOR}
"""What people choose -> what makes the load."""
# Engines that refuse the fields which `vllm bench serve` sends.
_STRICT = frozenset({"transformers"})


def profile_of(target: str | None, overrides: Sequence[str] = ()) -> Workload:
    """Return the load that a serve file says it is tuned for: the `profile` of its first item.

    Args:
        target: serve file or recipe; anything else has no profile.
        overrides: Hydra overrides of the file.

    Raises:
        ConfigError: the file is wrong.
        InvalidService: the lengths of its profile are spread, which no generator here does.
    """
    experiment = file_of(target, overrides) if target is not None else None
    profile = experiment.serve[0].profile if experiment is not None and experiment.serve else None
    if profile is None:
        return Workload()
    # All lengths alike: 1 in vLLM's older generator, for which the files were written, and 0 in newer ones.
    if profile.range_ratio not in (0, 1):
        raise InvalidService(
            f"{target}: serve[0].profile.range_ratio: {profile.range_ratio:g}: lengths are all alike here: "
            "set it to 1"
        )
    return Workload(
        prefix_len=profile.prefix_len,
        input_len=profile.input_len,
        output_len=profile.output_len,
        num_requests=profile.num_prompts,
    )


@dataclass(frozen=True, kw_only=True)
class Benched:
    """A whole sweep."""

    url: str
    model: str
    slo: Mapping[str, float]
    """Bound -> seconds."""
    levels: tuple[Measured, ...]
    at: float
    """Unix seconds at the start."""
    subject: Mapping[str, Any] = field(default_factory=dict)
    """What was loaded, to do it again; see `subject_of`."""

    @property
    def best(self) -> Measured:
        """The level of the highest goodput."""
        return max(self.levels, key=lambda one: one.goodput(self.slo))

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return {
            "url": self.url,
            "model": self.model,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.at)),
            "subject": dict(self.subject),
            "slo_ms": {name: 1e3 * bound for name, bound in self.slo.items()},
            "best_concurrency": self.best.workload.concurrency,
            "levels": [one.to_dict(self.slo) for one in self.levels],
        }

    def write(self, folder: Path) -> None:
        """Write `bench.json` and `bench.html`.

        Raises:
            InvalidService: the folder cannot be written.
        """
        make_folder(folder)
        try:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
            (folder / "bench.json").write_text(text, encoding="utf-8")
            (folder / "bench.html").write_text(render_page(self), encoding="utf-8")
        except OSError as error:
            raise _unwritable(folder, error) from None


def make_folder(folder: Path) -> None:
    """Make the folder that takes what a benchmark gives.

    Raises:
        InvalidService: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> InvalidService:
    return InvalidService(f"out: {folder}: {error.strerror}: choose a folder that can be written")


def bench(  # noqa: PLR0913 - what people set on a benchmark
    target: str | None = None,
    overrides: Sequence[str] = (),
    *,
    workload: Workload | None = None,
    concurrencies: Sequence[int] = (1, 8, 32),
    slo: Mapping[str, float] | None = None,
    generator: str | None = None,
    python: str | None = None,
    tokenizer: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    tell: Callable[[Measured], None] | None = None,
) -> Benched:
    """Load a server at several concurrencies, one after the other.

    Args:
        target: address of any OpenAI-compatible server, or what `find_run` takes.
        overrides: Hydra overrides of a serve file.
        workload: the load; its concurrency is replaced. None: the file's profile, where it has one.
        concurrencies: levels, in the order in which they are run.
        slo: bound (`BOUNDS`) -> seconds.
        generator: key of `GENERATORS`; None takes `vllm bench serve` where it works, else our own.
        python: interpreter that has vLLM; else the one that runs the engine, `$FLAGSCALE_SERVE_PYTHON`, or
            this one.
        tokenizer: directory of the tokenizer, for an address of which nothing else is known.
        model: which of several served models.
        api_key: the server's key; else `$OPENAI_API_KEY`.
        tell: called after each level.

    Raises:
        InvalidService: a number is out of range, or the generator cannot be had.
        NotServing: nobody answers.
        RequestFailed: no request at all was answered.
    """
    server = find_server(target, model, overrides)
    if tokenizer is not None:
        server = replace(server, tokenizer=tokenizer)
    key = key_of(api_key)
    chosen = _choose(server, generator, python)
    name = server.model or listed_model(server, key)
    base, began = workload or profile_of(target, overrides), time.time()
    levels: list[Measured] = []
    for number, concurrency in enumerate(concurrencies):
        # Another seed each time: a prompt that was seen before would come from the prefix cache.
        load = replace(base, concurrency=concurrency, seed=base.seed + number)
        levels.append(measure(server, name, load, generator=chosen, python=python, api_key=key))
        if tell is not None:
            tell(levels[-1])
    if not levels:
        raise InvalidService("concurrency: none given: give at least one level")
    return Benched(
        url=server.url,
        model=name,
        slo=dict(slo or {}),
        levels=tuple(levels),
        at=began,
        subject=subject_of(server.run_dir),
    )


def measure(
    server: Server,
    model: str,
    workload: Workload,
    *,
    generator: str,
    python: str | None = None,
    api_key: str | None = None,
) -> Measured:
    """Load a server once with a generator of `GENERATORS`; see `bench`."""
    if generator == "own":
        return client.measure(server, model, workload, api_key=api_key)
    return vllm_client.measure(server, model, workload, python=_python(server, python), api_key=api_key)


def _choose(server: Server, wanted: str | None, python: str | None) -> str:
    """Take `vllm bench serve` where there is one, a tokenizer, and a server that takes its requests."""
    if wanted not in (None, *GENERATORS):
        raise InvalidService(f"generator: {wanted!r}: not known: choose {' or '.join(GENERATORS)}")
    if wanted == "own":
        return wanted
    problem = ""
    if server.tokenizer is None:
        problem = "the directory of the tokenizer is not known: give --tokenizer"
    elif _STRICT & set(server.engines):
        problem = f"{' and '.join(server.engines)} refuses its requests: use --generator own"
    elif not has_modules(_python(server, python), ("vllm",)):
        problem = f"{_python(server, python)} has no vllm: name the Python that has it with --python"
    if problem and wanted == "vllm":
        raise InvalidService(f"generator: {GENERATORS['vllm']}: {problem}")
    return "own" if problem else "vllm"


def _python(server: Server, python: str | None) -> str:
    import sys

    return python or server.python or os.environ.get("FLAGSCALE_SERVE_PYTHON") or sys.executable
