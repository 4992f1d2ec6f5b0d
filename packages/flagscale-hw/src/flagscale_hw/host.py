"""A view of one host for probes: files below a root, and commands that cannot hang the caller.

Every probe looks through this view and nowhere else, so a directory tree with a few stub tools is a machine
too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flagscale_hw.errors import InputError
from flagscale_hw.identity import marked

__all__ = ["ROOT_VARIABLE", "TIMEOUT_VARIABLE", "Answer", "Host", "this_host"]

ROOT_VARIABLE = "FLAGSCALE_HW_ROOT"
"""Look at the files and tools below this directory instead of this host."""
TIMEOUT_VARIABLE = "FLAGSCALE_HW_TIMEOUT"
"""Seconds that each vendor's library and tools get, above 0 and at most 600; 3 where it is not set."""

_TOOL_FOLDERS = (
    "/usr/bin",
    "/usr/local/bin",
    "/usr/local/nvidia/bin",
    "/usr/lib/wsl/lib",
    "/bin",
    "/opt/bin",
)
_TIMEOUT_S, _MOST_S = 3.0, 600.0
_OUTPUT_LIMIT = 4 << 20
_KILL_WAIT_S = 0.2
_PROBE = "FLAGSCALE_HW_PROBE"
"""Marks whatever a command starts, so that all of it can be found when the command hangs."""
_START = (
    "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_module(sys.argv[2], run_name='__main__')"
)


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    output: str
    errors: str
    exit_code: int | None
    """None: it was killed because it took too long."""


@dataclass(frozen=True)
class Host:
    """This host, or a recorded or invented one below another root."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def is_real(self) -> bool:
        """Tell whether this is the machine we run on, with its libraries and its kernel."""
        return self.root == Path("/")

    @property
    def timeout_s(self) -> float:
        """How long all that is asked about one vendor may take, where the caller does not say it.

        Raises:
            InputError: `FLAGSCALE_HW_TIMEOUT` is no such number.
        """
        text = self.environ.get(TIMEOUT_VARIABLE)
        if not text:
            return _TIMEOUT_S
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= _MOST_S:
            raise InputError(f"{TIMEOUT_VARIABLE}: {text!r}: give seconds, above 0 and at most {_MOST_S:g}")
        return value

    def path(self, absolute: str) -> Path:
        """Return where an absolute path of the host lies."""
        return self.root / absolute.lstrip("/")

    def read(self, absolute: str) -> str | None:
        """Return the text of a small file without the blanks around it; None when it cannot be read."""
        try:
            return self.path(absolute).read_text(errors="replace").strip()
        except OSError:
            return None

    def names(self, folder: str) -> list[str]:
        """Return the sorted names in a folder; none when it cannot be read."""
        try:
            return sorted(entry.name for entry in self.path(folder).iterdir())
        except OSError:
            return []

    def find_tool(self, name: str, *vendor_folders: str) -> Path | None:
        """Return a vendor's tool from where it is installed, or else from PATH; None when there is none."""
        folders = [self.path(folder) for folder in (*vendor_folders, *_TOOL_FOLDERS)]
        if self.is_real:
            folders += [
                Path(folder) for folder in self.environ.get("PATH", "").split(":") if folder.startswith("/")
            ]
        for folder in folders:
            tool = folder / name
            if os.access(tool, os.X_OK) and tool.is_file():
                return tool
        return None

    def run(self, argv: Sequence[str | Path], timeout_s: float) -> Answer:
        """Run a tool; kill it and all its children when it takes longer than `timeout_s`.

        It runs in an empty temporary folder, because some tools write files where they stand.

        Raises:
            OSError: it cannot be started.
        """
        with tempfile.TemporaryDirectory(prefix="flagscale-hw-") as folder:
            return _run([str(word) for word in argv], folder, {**self.environ, "LC_ALL": "C"}, timeout_s)

    def run_module(self, module: str, timeout_s: float, *arguments: str) -> Answer:
        """Run one of our modules in its own process, where a library that hangs or crashes does no harm."""
        package_root = Path(__file__).resolve().parents[1]
        start: list[str | Path] = [sys.executable, "-I", "-S", "-c", _START, package_root, module]
        return self.run([*start, *arguments], timeout_s)


def _run(argv: list[str], folder: str, environ: dict[str, str], timeout_s: float) -> Answer:
    token = Path(folder).name
    with Path(folder, "out").open("w+b") as out, Path(folder, "err").open("w+b") as err:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=folder,
            env={**environ, _PROBE: token},
            start_new_session=True,
        )
        has_ended = False
        try:
            has_ended = _ends_within(child, timeout_s)
        finally:
            exit_code = _clean_up(child, token, has_ended=has_ended)
        return Answer(_text(out), _text(err), exit_code)


def _ends_within(child: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait without reaping, so that the number of the group stays the child's own."""
    end = time.monotonic() + timeout_s
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, 0.005))
    return True


def _clean_up(child: subprocess.Popen[bytes], token: str, *, has_ended: bool) -> int | None:
    """End everything that a command left, and return its exit code; None when it had to be killed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies only
        os.killpg(child.pid, signal.SIGKILL)
    try:
        exit_code = child.wait(_KILL_WAIT_S)
    except subprocess.TimeoutExpired:
        # Stuck inside the kernel (a driver that hangs): nobody can end it, so nobody may wait for it.
        child.returncode = -signal.SIGKILL
    if has_ended:
        return exit_code
    for who in marked(token, _PROBE):  # children that made themselves a session of their own
        with contextlib.suppress(PermissionError):
            who.send(signal.SIGKILL)
    return None


def _text(file: object) -> str:
    raw = os.pread(file.fileno(), _OUTPUT_LIMIT, 0)  # type: ignore[attr-defined]
    return raw.decode(errors="replace")


def this_host() -> Host:
    """Return this host, or the recorded or faked one that the environment names in its place."""
    return Host(Path(os.environ.get(ROOT_VARIABLE) or "/"))
