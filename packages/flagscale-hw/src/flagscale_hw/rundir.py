"""The run directory: which files it has, and how they are written so that a reader never sees half of one.

What does not live here: what the files say (`status.py`, `manifest.py`), the index of all runs (`index.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from flagscale_hw.identity import Identity
from flagscale_hw.plan import render_json
from flagscale_hw.status import RunStatus

__all__ = ["RunDirectory"]

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
        self.supervisor_log = path / "supervisor.log"
        self.logs = path / "logs"
        self._reserve = path / ".reserve"

    def log(self, process: str) -> Path:
        """Return the log file of one process."""
        return self.logs / f"{process}.log"

    def files(self) -> tuple[Path, ...]:
        """Return every file that a run keeps here beside its logs."""
        of_supervisor = (self.supervisor, self.supervisor_log, self._reserve)
        return (self.plan, self.manifest, self.state, self.stop_request, *of_supervisor)

    def claim(self, plan_text: str) -> bool:
        """Take the directory for one run by creating its `plan.json`; False when another run has it.

        Raises:
            OSError: the directory cannot be made or written.
        """
        is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(self.plan, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(plan_text)
        except BaseException:  # a full disk, or Ctrl-C: no half claim may stay
            self.plan.unlink()
            if is_new:
                self.path.rmdir()
            raise
        return True

    def reserve(self) -> None:
        """Put space aside so that the end of the run can be recorded on a disk that has become full.

        Raises:
            OSError: the disk is full already.
        """
        with self._reserve.open("wb") as file:
            file.write(b"\0" * _RESERVE_BYTES)
            os.fsync(file.fileno())

    def release_reserve(self) -> None:
        """Give the space back."""
        with contextlib.suppress(OSError):
            self._reserve.unlink()

    def write(self, path: Path, data: Any) -> None:
        """Replace a JSON file at once: a reader sees the old one or the new one, also after a power cut.

        Raises:
            OSError: no space, no permission; the old file is untouched.
        """
        text = render_json(data)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        self._sync_names()

    def _sync_names(self) -> None:
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

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
