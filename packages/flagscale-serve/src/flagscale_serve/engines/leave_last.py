"""Run a command that leaves only after the instance it works for; placed in the run directory by the plan.

Usage: leave_last.py HOST PORT COMMAND ...

A stop reaches every host at once. vLLM's first rank then answers what is under way, and its port stays open
so long; its other ranks, and Ray, end at once and would break those answers. So SIGTERM waits here until
nobody listens at HOST:PORT, and nobody works on for a first rank that is gone. That what ends unasked has
failed, with exit code 0 too, is known to who supervises the run. It runs in the engine's environment:
standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

__all__ = ["main"]

_INTERVAL_S = 0.5
_CONNECT_S = 2.0


def main() -> None:
    """Run the command, and end as it ends."""
    host, port, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    child = subprocess.Popen(command)
    had_listened = False
    while child.poll() is None:
        is_listening = _listens(host, port)
        had_listened = had_listened or is_listening
        if not is_listening and (asked or had_listened):
            # Nobody is left to work for.
            child.terminate()
            child.wait()
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_INTERVAL_S)
    if child.returncode < 0:
        with contextlib.suppress(OSError):  # nobody catches SIGKILL
            signal.signal(-child.returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -child.returncode)
    sys.exit(child.returncode)


def _listens(host: str, port: int) -> bool:
    """Tell whether a connection is taken, or may be: a busy host answers late."""
    try:
        with socket.create_connection((host, port), _CONNECT_S):
            return True
    except ConnectionRefusedError:
        return False
    except OSError:
        return True


if __name__ == "__main__":
    main()
