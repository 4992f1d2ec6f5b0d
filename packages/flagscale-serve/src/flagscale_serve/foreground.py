"""Follow a starting service on a terminal: what it is doing, when it is ready, why it failed.

What does not live here: arguments and exit codes (`cli.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import flagscale_hw as hw
from flagscale_serve.application import ENGINE as APPLICATION
from flagscale_serve.bench import Measured
from flagscale_serve.generate import Progress as Batch
from flagscale_serve.progress import Phases, Tail
from flagscale_serve.state import InstanceStatus, ServiceStatus
from flagscale_serve.tune import Trial

__all__ = ["StartLog", "batch_progress", "level_text", "ready_text", "trial_text"]

_POLL_S = 0.05
_SILENCE_S = 15.0


class StartLog:
    """The start of one run, told line by line."""

    def __init__(
        self,
        run: hw.Run,
        instances: Sequence[InstanceStatus],
        say: Callable[[str], None],
        *,
        verbose: bool,
    ) -> None:
        """Begin to read.

        Args:
            run: a run that was just launched.
            instances: those of the run.
            say: takes one line for people.
            verbose: tell every line of the engines' logs already while they start.
        """
        self._run = run
        self._say = say
        self._verbose = verbose
        self._phases = {one.name: Phases(one.engine) for one in instances}
        self._tails = {one.name: Tail(Path(one.log)) for one in instances}
        self._began = self._told = time.monotonic()

    def until_ready(self) -> hw.RunStatus:
        """Tell the phases until the service is ready or over."""
        for name in self._phases:
            self._tell(name)
        while not ((now := self._run.status()).is_over or now.state == "ready"):
            self._drain(self._start_line)
            self._break_silence()
            time.sleep(_POLL_S)
        self._drain(self._start_line)
        return now

    def until_over(self) -> hw.RunStatus:
        """Pass the engines' logs on until the run is over."""
        while not (now := self._run.status()).is_over:
            self._drain(self._plain_line)
            time.sleep(_POLL_S)
        self._drain(self._plain_line, is_over=True)
        return now

    def _drain(self, tell: Callable[[str, str], None], *, is_over: bool = False) -> None:
        for name, tail in self._tails.items():
            for line in tail.lines(is_over=is_over):
                tell(name, line)

    def _start_line(self, name: str, line: str) -> None:
        if self._verbose:
            self._plain_line(name, line)
        if self._phases[name].read(line):
            self._tell(name)

    def _plain_line(self, name: str, line: str) -> None:
        self._say(f"{name}: {line}" if len(self._tails) > 1 else line)

    def _tell(self, name: str) -> None:
        self._told = time.monotonic()
        self._say_at(name, self._phases[name].current)

    def _say_at(self, name: str, text: str) -> None:
        who = f"{name}: " if len(self._phases) > 1 else ""
        self._say(f"[{self._told - self._began:6.1f} s] {who}{text}")

    def _break_silence(self) -> None:
        """Show that it is alive when no phase has changed for a while."""
        if time.monotonic() - self._told < _SILENCE_S:
            return
        self._told = time.monotonic()
        for name, phases in self._phases.items():
            last = f"; its last words: {phases.last_line[:120]}" if phases.last_line else ""
            self._say_at(name, f"still {phases.current}{last}")


def ready_text(status: ServiceStatus, seconds: float) -> str:
    """Say that a service is ready, where it is, and what to try."""
    lines = []
    for one in status.instances:
        if one.behind is not None:
            continue  # its router is what people ask
        if one.engine == APPLICATION:
            lines += [f"ready after {seconds:.1f} s: {one.url}", f"its fields: curl {one.url}"]
            continue
        lines.append(f"ready after {seconds:.1f} s: {one.url}  model {one.model}")
        if one.has_chat_template:
            path, asked = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
        else:
            path, asked = "completions", '"prompt": "Hello"'
        lines += [
            f"try: curl {one.url}/{path} -H 'Content-Type: application/json' \\",
            f'       -d \'{{"model": "{one.model}", {asked}, "max_tokens": 32}}\'',
        ]
    return "\n".join(lines)


def level_text(level: Measured, slo: Mapping[str, float]) -> str:
    """Say in one line what one level of load gave."""
    told = level.to_dict(slo)
    times = [
        f"{name.upper()} {told[f'{name}_ms']['p50']:.1f}/{told[f'{name}_ms']['p99']:.1f}"
        for name in ("ttft", "tpot", "e2e")
        if told[f"{name}_ms"]
    ]
    good = f", {told['within_slo']:.0%} within the SLO" if slo else ""
    failed = f", {told['failed']} failed ({'; '.join(told['errors'])})" if told["failed"] else ""
    return (
        f"{told['concurrency']:4} at a time: {told['output_tokens_per_s']:.1f} tokens/s, "
        f"{told['requests_per_s']:.2f} requests/s, p50/p99 ms {', '.join(times) or '-'}{good}{failed}"
    )


def trial_text(trial: Trial) -> str:
    """Say in one line what a trial of `tune` gave."""
    options = ", ".join(f"{name}={value}" for name, value in trial.options.items()) or "as it is"
    if trial.reason:
        return f"{options}: {trial.fate}: {trial.reason}"
    early = " (stopped early)" if trial.fate == "stopped early" else ""
    return f"{options}: {trial.goodput:.2f} requests/s, {trial.output_tokens_per_s:.1f} tokens/s{early}"


@contextmanager
def batch_progress() -> Iterator[Callable[[Batch], None]]:
    """Show how far a batch is, on a terminal; elsewhere say nothing."""
    if not sys.stderr.isatty():
        yield lambda _progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def tell(now: Batch) -> None:
            failed = f", {now.failed} failed" if now.failed else ""
            bar.update(
                task,
                total=now.total,
                completed=now.done + now.failed,
                description=f"{now.tokens_per_s:.0f} tokens/s{failed}",
            )

        yield tell
