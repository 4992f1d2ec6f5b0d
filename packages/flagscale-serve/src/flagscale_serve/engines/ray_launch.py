"""Wait until Ray has all its hosts, then become the engine; placed in the run directory by the plan.

Usage: ray_launch.py NUM_HOSTS COMMAND ...      (RAY_ADDRESS names the cluster)

An engine that starts before the cluster is complete does not wait: it starts a cluster of its own, or fails
because devices are missing. It runs in the engine's environment: standard library and Ray only.
"""

from __future__ import annotations

import importlib
import os
import sys
import time

__all__ = ["main"]

_INTERVAL_S = 1.0


def main() -> None:
    """Wait, then replace this process."""
    wanted, command = int(sys.argv[1]), sys.argv[2:]
    ray = importlib.import_module("ray")
    seen = -1
    while seen < wanted:
        try:
            ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
            now = sum(1 for node in ray.nodes() if node["Alive"])
        except (ConnectionError, RuntimeError, ValueError):
            now = 0
        finally:
            ray.shutdown()
        if now != seen:
            print(f"Ray has {now} of {wanted} hosts", flush=True)  # noqa: T201 - the engine's log
        seen = now
        if seen < wanted:
            time.sleep(_INTERVAL_S)
    os.execvp(command[0], command)  # noqa: S606 - the words of the plan, no shell


if __name__ == "__main__":
    main()
