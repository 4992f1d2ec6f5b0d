"""Follows a run in the foreground: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import flagscale_hw as hw
from flagscale_train.events import FILE_NAME, Progress, follow

__all__ = ["duration", "event_line", "step_line", "watch"]

_Events = Iterator[dict[str, Any] | None]

_POLL_S = 0.1
_PLAIN_EVERY_S = 10.0


class _Show(Protocol):
    def event(self, event: Mapping[str, Any], progress: Progress) -> None:
        """Show one event."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def watch(run: hw.Run, say: Callable[[str], None]) -> hw.RunStatus:
    """Show the events of a run until it is over.

    Args:
        run: what to follow.
        say: prints one line.

    Returns:
        How it ended.
    """
    progress = Progress()
    show: _Show = _Live() if sys.stdout.isatty() else _Plain(say)
    try:
        last_look = False
        for event in _together([follow(folder / FILE_NAME) for folder in run.folders()]):
            if event is not None:
                progress.add(event)
                show.event(event, progress)
            elif last_look:
                break
            elif run.status().is_over:
                last_look = True  # what was written between the last look and the end
            else:
                time.sleep(_POLL_S)
    finally:
        show.close()
    return run.wait()


def _together(streams: list[_Events]) -> _Events:
    """Yield what each stream has, and None when none has anything new."""
    while True:
        is_quiet = True
        for stream in streams:
            for event in stream:
                if event is None:
                    break
                is_quiet = False
                yield event
        if is_quiet:
            yield None


def duration(seconds: float) -> str:
    """Return seconds as people say them: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _number(value: Any, shape: str) -> str:
    return format(value, shape) if isinstance(value, (int, float)) else "nan"


def step_line(progress: Progress, *, is_over: bool = False) -> str:
    """Return the newest step in one line; empty before the first.

    Args:
        progress: of the run.
        is_over: nothing is going on any more, so no time is left either.
    """
    step = progress.step
    if step is None:
        return ""
    total = progress.train_iters
    parts = [
        f"step {progress.iteration}" + (f"/{total}" if total else ""),
        f"loss {_number(step.get('loss'), '.4f')}",
        f"grad norm {_number(step.get('grad_norm'), '.3f')}",
        f"lr {_number(step.get('learning_rate'), '.2e')}",
        f"{_number(step.get('tokens_per_second'), ',.0f')} tokens/s",
    ]
    if step.get("skipped"):
        parts.insert(1, "left out")
    if (step.get("tflops_per_device") or 0) >= 1:  # a CPU's are far from it, and say nothing
        parts.append(f"{step['tflops_per_device']:.0f} TFLOP/s")
        if step.get("mfu") is not None:
            parts.append(f"MFU {100 * step['mfu']:.1f} %")
        if step.get("memory_bytes") is not None:
            parts.append(f"{step['memory_bytes'] / (1 << 30):.1f} GiB")
    if not is_over and progress.remaining_s is not None and total and progress.iteration < total:
        parts.append(f"{duration(progress.remaining_s)} left")
    return "  ".join(parts)


def event_line(event: Mapping[str, Any]) -> str:
    """Return what is said of an event other than a step, in one line; empty for nothing."""
    line = _LINES.get(event["event"])
    return line(event) if line else ""


def _start_line(event: Mapping[str, Any]) -> str:
    layout = event.get("layout", {})
    spread = [f"{name} {size}" for name, size in layout.items() if name != "world_size" and size > 1]
    size = layout.get("world_size")
    return (
        f"training {event.get('parameters', 0):,} parameters on {size} process{'' if size == 1 else 'es'}"
        f"{' (' + ', '.join(spread) + ')' if spread else ''}, {event.get('tokens_per_step', 0):,} tokens per "
        f"step, {event.get('dtype')}, from step {event.get('iteration')}"
    )


def _checkpoint_line(event: Mapping[str, Any]) -> str:
    proof = "whole" if event.get("verified") else "not verified yet"
    return f"saved {event['path']} ({proof}, {event.get('save_time_s', 0):.1f} s)"


def _eval_line(event: Mapping[str, Any]) -> str:
    loss = _number(event["loss"], ".4f")
    return f"held-out loss ({event.get('split')}) after step {event['iteration']}: {loss}"


_LINES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "start": _start_line,
    "eval": _eval_line,
    "checkpoint": _checkpoint_line,
    "notice": lambda event: str(event.get("text")),
    "error": lambda event: f"rank {event.get('rank')}: {event.get('type')}: {event.get('text')}",
    "end": lambda event: f"{event.get('reason')} after step {event.get('iteration')}",
}


class _Plain:
    """For pipes and log files: the first steps, then one line every ten seconds, and every other event."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._next_s = 0.0

    def event(self, event: Mapping[str, Any], progress: Progress) -> None:
        if event["event"] != "step":
            if line := event_line(event):
                self._say(line)
            return
        is_last = progress.iteration == progress.train_iters
        if progress.num_steps <= 1 or is_last or time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PLAIN_EVERY_S
            self._say(step_line(progress))

    def close(self) -> None:
        pass


class _Live:
    """For a terminal: a bar that moves, and the other events as lines above it."""

    def __init__(self) -> None:
        from rich import progress

        self._bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.description}"),
            progress.TimeElapsedColumn(),
        )
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()

    def event(self, event: Mapping[str, Any], progress: Progress) -> None:
        if event["event"] == "step":
            done, total = progress.iteration, progress.train_iters
            self._bar.update(self._task, description=step_line(progress), completed=done, total=total)
        elif line := event_line(event):
            self._bar.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()
