"""Ask one vendor's library and tools, all within one deadline, and never raise for what they answer.

What does not live here: reading the answers (`backends/`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from flagscale_hw.backend import Found, Source
from flagscale_hw.host import TIMEOUT_VARIABLE, Answer, Host
from flagscale_hw.machine import Device, Problem

__all__ = ["Asker", "first_answer", "is_hung", "last_line", "merge"]

_LEAST_S = 0.05
_LAST_PART = 10_000
_MOST_PROBLEMS = 20
_NO_ANSWER = "no answer within"


class Asker:
    """What is left of the time that one vendor has, and what to spend it on."""

    def __init__(self, host: Host, chip: str, timeout_s: float) -> None:
        self.host = host
        self.chip = chip
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, 0 once it is over."""
        left = self._end - time.monotonic()
        return left if left > _LEAST_S else 0.0

    def library(self, module: str, *arguments: str) -> Found:
        """Run one of our modules that talks to a library; it prints a JSON object per line.

        The lines are `{"device": {...}}`, `{"problem": {...}}` and at the end `{"done": true}`, each as soon
        as it is known, so that a hang on one card keeps the cards before it. Nothing is asked below a root
        that is not this machine's: its libraries are not ours to load.
        """
        return self.helper(module, *arguments) if self.host.is_real else Found()

    def helper(self, module: str, *arguments: str) -> Found:
        """Run one of our modules that prints such lines, whatever it talks to."""
        answer = self.host.run_module(module, self.left_s, *arguments)
        found, is_done = read_messages(answer.output)
        if answer.exit_code is None:
            return replace(found, problems=(*found.problems, self._hung("its library")))
        if not is_done and not found.problems:
            return replace(found, problems=(self.problem(f"its library: {last_line(answer)}"),))
        return found

    def tool(self, *names: str, folders: Sequence[str] = ()) -> Path | None:
        """Return the first of these tools that is installed."""
        for name in names:
            found = self.host.find_tool(name, *folders)
            if found is not None:
                return found
        return None

    def run(self, argv: Sequence[str | Path], timeout_s: float | None = None) -> Answer | Problem:
        """Run a command; a hang and a failure to start become problems."""
        name = Path(argv[0]).name
        limit_s = self.left_s if timeout_s is None else min(timeout_s, self.left_s)
        if not limit_s:
            return self._hung(name)
        try:
            return self.host.run(argv, limit_s)
        except OSError as error:
            return self.problem(f"{name}: {error.strerror}")

    def ask(self, argv: Sequence[str | Path], parse: Callable[[str], Found]) -> Found:
        """Run a command and read its answer, also the part of one that came before a hang."""
        answer = self.run(argv)
        if isinstance(answer, Problem):
            return Found(problems=(answer,))
        name = Path(argv[0]).name
        found = replace(parse(answer.output), source="tool")
        problems = found.problems[:_MOST_PROBLEMS]
        if answer.exit_code is None:
            problems = (*problems, self._hung(name))
        elif not problems and (answer.exit_code != 0 or not found.devices):
            problems = (self.problem(f"{name}: {last_line(answer)}"),)
        return replace(found, problems=problems)

    def missing(self, name: str) -> Found:
        """Say that a tool is not installed."""
        hint = "install the driver's tools"
        return Found(problems=(Problem(where=self.chip, text=f"{name}: not found", hint=hint),))

    def problem(self, text: str, hint: str = "") -> Problem:
        """Say something about this vendor's chips."""
        return Problem(where=self.chip, text=text, hint=hint)

    def _hung(self, what: str) -> Problem:
        text = f"{what}: {_NO_ANSWER} {self._timeout_s:g} s; it was killed"
        return self.problem(
            text,
            f"on a busy host give it longer ({TIMEOUT_VARIABLE}=60); "
            "else look for errors of the driver in the kernel log: a card may need a reset",
        )


def first_answer(*ways: Callable[[], Found]) -> Found:
    """Try the ways in turn until one describes devices or hangs; when none does, keep what all said."""
    problems: tuple[Problem, ...] = ()
    for way in ways:
        found = way()
        if found.devices:
            return found
        problems += found.problems
        if is_hung(found):
            break
    return Found(problems=problems)


def is_hung(found: Found) -> bool:
    """Tell whether somebody had to be killed."""
    return any(_NO_ANSWER in problem.text for problem in found.problems)


def last_line(answer: Answer) -> str:
    """Return the last thing that a command said, as an error if it can, cut at 300 characters."""
    if not answer.errors.strip() and (answer.exit_code or 0) < 0:
        return f"ended by signal {-(answer.exit_code or 0)}"
    text = answer.errors if answer.errors.strip() else answer.output[-_LAST_PART:]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with code {answer.exit_code} and no message"


def read_messages(text: str) -> tuple[Found, bool]:
    """Read the lines of a helper, and tell whether it came to its end."""
    devices: list[Device] = []
    problems: list[Problem] = []
    is_done = False
    source: Source = "library"
    for line in text.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # libraries print to standard output when they please
        if not isinstance(said, dict):
            continue
        if "device" in said:
            devices.append(Device.from_dict(said["device"]))
        elif "problem" in said:
            problems.append(Problem(**said["problem"]))
        is_done = is_done or "done" in said
    return Found(tuple(devices), tuple(problems), source), is_done


def merge(devices: Sequence[Device], more: Sequence[Device]) -> tuple[Device, ...]:
    """Fill what is unknown of the devices from another answer about the same ones, matched by index."""
    by_index = {device.index: device for device in more}
    return tuple(_filled(device, by_index.get(device.index)) for device in devices)


def _filled(device: Device, other: Device | None) -> Device:
    if other is None or (device.pci_bus and other.pci_bus and device.pci_bus != other.pci_bus):
        return device
    known = {}
    for field in fields(Device):
        value = getattr(other, field.name)
        if getattr(device, field.name) in (None, ()) and value not in (None, ()):
            known[field.name] = value
    return replace(device, **known)
