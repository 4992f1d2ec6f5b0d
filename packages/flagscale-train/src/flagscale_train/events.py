"""Events of a run: JSON lines that the worker appends and everything else reads.

One line per event, each an object with `event` (its kind) and `time` (unix seconds). Kinds and their fields:

- `start`: versions, layout, parameters, tokens_per_step, train_iters, iteration (0 or where it resumes)
- `notice`: text
- `step`: iteration, loss, grad_norm, learning_rate, step_time_s, tokens_per_second, tflops_per_device, mfu,
  memory_bytes; `skipped: true` where the update was dropped, `not_finite`: which of loss and grad_norm were
  not a number or infinite, and so are null
- `eval`: iteration, split (`validation` or `test`), loss
- `checkpoint`: iteration, path, verified, save_time_s
- `error`: rank, type, text (the first one that does not only tell of a lost peer is the first cause)
- `end`: iteration, reason (`finished`, `stopped`, `interrupted by a limit`)

Losses are what the step itself computed, with all digits: Megatron's own log line is a mean over steps, and
after a resume the first one mixes two steps. Not-a-number and infinity are written as null, because JSON has
neither.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FILE_NAME", "Journal", "Progress", "follow", "read"]

FILE_NAME = "events.jsonl"
"""Name of the events file in a run directory."""


class Journal:
    """Appends events to one file; several processes may hold a journal of the same file.

    Each event is one `write` of one line to a descriptor opened for appending, so that lines of different
    ranks never mix and a killed process leaves at most one torn line at the end.
    """

    def __init__(self, path: Path | None) -> None:
        """Open `path` for appending; with None every event is dropped."""
        self._descriptor: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event now.

        Args:
            event: kind of the event, see the module's list.
            **fields: plain JSON values; floats that are not finite become null.
        """
        if self._descriptor is None:
            return
        record = {
            "event": event,
            "time": time.time(),
            **{key: _plain(value) for key, value in fields.items()},
        }
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        os.write(self._descriptor, line.encode())


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file; none if the file does not exist. A torn line is skipped."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield from _parse(lines)
    except FileNotFoundError:
        return


def _parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.endswith("\n"):
            return  # still being written, or torn by a kill
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            yield record


def follow(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield events for ever, and None whenever there is nothing new; the caller decides when to end."""
    position = 0
    while True:
        found = False
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(position)
                data = stream.read()
            whole = data[: data.rfind(b"\n") + 1]
            position += len(whole)
            for record in _parse(whole.decode("utf-8", errors="replace").splitlines(keepends=True)):
                found = True
                yield record
        if not found:
            yield None


def _is_earlier(error: Mapping[str, Any], known: Mapping[str, Any] | None) -> bool:
    """Whether an error is nearer to the cause than the one known: a rank may first tell of a lost peer."""
    from flagscale_hw.cause import is_consequence

    if known is None:
        return True
    echoes = [is_consequence(f"{one.get('type')}: {one.get('text')}") for one in (known, error)]
    return echoes == [True, False]


@dataclass
class Progress:
    """What the events so far say, folded into the figures people ask for."""

    start: Mapping[str, Any] | None = None
    step: Mapping[str, Any] | None = None
    first_step: Mapping[str, Any] | None = None
    validation: Mapping[str, Any] | None = None
    checkpoint: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    end: Mapping[str, Any] | None = None
    notices: list[str] = field(default_factory=list)
    num_steps: int = 0
    """Steps seen in these events; less than `iteration` after a resume."""

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Progress:
        """Fold all of `events`."""
        progress = cls()
        for event in events:
            progress.add(event)
        return progress

    def add(self, event: Mapping[str, Any]) -> None:
        """Fold one more event."""
        match event["event"]:
            case "start":
                self.start = event
            case "step":
                self.first_step = self.first_step or event
                self.step = event
                self.num_steps += 1
            case "eval" if event.get("split") == "validation":
                self.validation = event
            case "checkpoint":
                self.checkpoint = event
            case "error":
                self.error = event if _is_earlier(event, self.error) else self.error
            case "notice":
                self.notices.append(str(event.get("text", "")))
            case "end":
                self.end = event

    @property
    def iteration(self) -> int:
        """Last finished iteration; where the run starts before its first step."""
        latest = self.step or self.start or {}
        return int(latest.get("iteration", 0))

    @property
    def train_iters(self) -> int | None:
        """How many iterations the run aims at, once it has started."""
        return self.start.get("train_iters") if self.start else None

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds to the end, from the mean pace of this run; None before its second step."""
        if self.step is None or self.first_step is None or self.num_steps < 2 or not self.train_iters:
            return None
        pace_s: float = (self.step["time"] - self.first_step["time"]) / (self.num_steps - 1)
        return max(0.0, float((self.train_iters - self.iteration) * pace_s))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON, for `status --json`."""
        step = self.step or {}
        return {
            "iteration": self.iteration,
            "train_iters": self.train_iters,
            **{
                key: step.get(key)
                for key in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "step_time_s")
            },
            **{key: step.get(key) for key in ("tflops_per_device", "mfu", "memory_bytes")},
            "remaining_s": self.remaining_s,
            "validation": dict(self.validation) if self.validation else None,
            "checkpoint": dict(self.checkpoint) if self.checkpoint else None,
            "error": dict(self.error) if self.error else None,
            "end": dict(self.end) if self.end else None,
            "notices": list(self.notices),
        }
