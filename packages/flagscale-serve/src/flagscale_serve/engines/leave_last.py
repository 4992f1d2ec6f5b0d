"""Run a command that leaves only after the instance it works for; placed in the run directory by the plan.

Usage: leave_last.py HOST PORT COMMAND ...

A stop reaches every host at once. vLLM's first rank then answers what is under way, and its port stays open
so long; its other ranks, and Ray, end at once and would break those answers. So SIGTERM waits here until
nobody listens at HOST:PORT. What ends before it was asked to has failed, whatever its exit code: vLLM's other
ranks say 0 when their workers were killed. It runs in the engine's environment: standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

__all__ = ["main"]

_INTERVAL_S = 0.2
_CONNECT_S = 2.0


def main() -> None:
    """Run the command, and end as it ends, or with 1 where it should not have ended."""
    host, port, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    child = subprocess.Popen(command)
    while child.poll() is None:
        if asked and not _listens(host, port):
            child.terminate()
            child.wait()
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_INTERVAL_S)
    if child.returncode < 0:
        with contextlib.suppress(OSError):  # nobody catches SIGKILL
            signal.signal(-child.returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -child.returncode)
    if not asked and child.returncode == 0:
        sys.exit(
            "it ended although nobody had asked it to: a process below it was killed, or the first rank left"
        )
    sys.exit(child.returncode)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), _CONNECT_S):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
