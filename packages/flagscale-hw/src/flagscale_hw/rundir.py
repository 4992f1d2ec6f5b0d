"""The run directory: which files it has, and how they are written so that a reader never sees half of one.

What does not live here: what the files say (`status.py`, `manifest.py`), the index of all runs (`index.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flagscale_hw.identity import Identity
from flagscale_hw.plan import render_json
from flagscale_hw.status import RunStatus

__all__ = ["TOKEN", "Claim", "RunDirectory"]

TOKEN = ".token"  # noqa: S105 - nothing secret
"""File by which a host finds out whether it shares this directory with the host that launches."""

_RESERVE_BYTES = 64 * 1024


class RunDirectory:
    """One directory on disk; knows names and atomicity, nothing about processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.json"
        self.manifest = path / "manifest.json"
        self.state = path / "state.json"
        self.supervisor = path / "supervisor.json"
        self.stop_request = path / "stop.json"
        self.ports = path / "ports.json"
        """Numbers of ports that other hosts have leased."""
        self.supervisor_log = path / "supervisor.log"
        self.logs = path / "logs"
        self._reserve = path / ".reserve"

    def log(self, process: str) -> Path:
        """Return the log file of one process."""
        return self.logs / f"{process}.log"

    def files(self) -> tuple[Path, ...]:
        """Return every file that a run keeps here beside its plan and its logs."""
        of_supervisor = (self.supervisor, self.supervisor_log, self._reserve)
        return (self.manifest, self.state, self.stop_request, self.ports, *of_supervisor)

    def of_host(self, target: str) -> RunDirectory:
        """Return the directory of one host's part of the run."""
        return RunDirectory(self.path / "hosts" / target)

    def clear(self, placed: Iterable[str]) -> None:
        """Take away what an earlier attempt left, but for its logs, so that another one can be launched."""
        for path in (*self.files(), self.plan, *(self.path / path for path in placed)):
            _remove(path)

    def reserve(self) -> None:
        """Put space aside so that the end of the run can be recorded on a disk that has become full.

        Raises:
            OSError: the disk is full already.
        """
        with self._reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)

    def release_reserve(self) -> None:
        """Give the space back."""
        with contextlib.suppress(OSError):
            self._reserve.unlink()

    def write(self, path: Path, data: Any) -> None:
        """Replace a JSON file at once: a reader sees the old one or the new one, never a part.

        No fsync: a busy disk takes a minute for one, and the process cannot even be killed meanwhile.

        Raises:
            OSError: no space, no permission; the old file is untouched.
        """
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(render_json(data), encoding="utf-8")
            beside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise

    def read(self, path: Path) -> dict[str, Any] | None:
        """Read a JSON object; None when the file is missing or is not one."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def read_status(self) -> RunStatus | None:
        """Read the recorded state; None when none was recorded."""
        try:
            return RunStatus.from_dict(self.read(self.state) or {})
        except ValueError:
            return None

    def read_identity(self, role: str) -> Identity | None:
        """Read who the `supervisor` or the `guardian` is; None when that was not recorded."""
        try:
            return Identity(**(self.read(self.supervisor) or {})[role])
        except (KeyError, TypeError):
            return None


class Claim:
    """The right to put a run into a directory, given to one launcher at most.

    Every step can be undone by `give_up` wherever it was interrupted: what is ours is read from the disk,
    where the plan is a hard link to a file whose name only we know. Variables may not have been set yet.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._is_new = not directory.path.exists()
        self._has_created = False
        self._proof = directory.path / f".claim-{uuid.uuid4().hex}"

    def take(self, plan_text: str) -> bool:
        """Create the directory and its `plan.json`; False when another run has it.

        Raises:
            OSError: the directory cannot be made or written.
        """
        self._directory.path.mkdir(parents=True, exist_ok=True)
        self._proof.write_text(plan_text, encoding="utf-8")
        try:
            self._directory.plan.hardlink_to(self._proof)
        except FileExistsError:
            return False
        except OSError:
            return self._take_without_links(plan_text)
        return True

    def _take_without_links(self, plan_text: str) -> bool:
        """Create the plan on a file system that has no hard links."""
        try:
            with self._directory.plan.open("x", encoding="utf-8") as file:
                self._has_created = True
                file.write(plan_text)
        except FileExistsError:
            return False
        return True

    @property
    def is_ours(self) -> bool:
        """Tell whether the directory's plan is the one that we have put there."""
        try:
            return self._has_created or self._proof.samefile(self._directory.plan)
        except OSError:
            return False

    def settle(self) -> None:
        """Leave the directory to the run, for good."""
        self._proof.unlink()

    def give_up(self, others: Iterable[Path]) -> None:
        """Take away what this launch has put into the directory, and the directory if it was made for it.

        Args:
            others: files of the run that go too if the directory is ours.
        """
        if self.is_ours and self._is_new:
            shutil.rmtree(self._directory.path, ignore_errors=True)
        elif self.is_ours:
            for path in (*self._directory.files(), *others):
                _remove(path)
            with contextlib.suppress(OSError):
                self._directory.logs.rmdir()
            _remove(self._directory.plan)
        _remove(self._proof)
        if self._is_new:
            with contextlib.suppress(OSError):
                self._directory.path.rmdir()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
