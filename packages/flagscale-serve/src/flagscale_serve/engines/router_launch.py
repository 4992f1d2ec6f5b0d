"""Become the router of several models, and tell it who serves which; placed in the run directory by the plan.

Usage: router_launch.py ROUTER_URL MODEL=URL ... -- COMMAND ...

vllm-router's command line takes servers of one model only. With `--enable-igw` it starts with none, and
chooses by the `model` of a request among those that are told to `/workers`. They are told all at once, when
all of them answer `/health`: one that is asked before would be left out for a while, and requests for a model
that the router has not heard of go to the others. It runs in the router's environment: standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import urllib.request
from http.client import HTTPException

__all__ = ["main"]

_INTERVAL_S = 0.5
_ANSWER_S = 10.0


def main() -> None:
    """Leave the telling to a child, and replace this process by the router."""
    split = sys.argv.index("--")
    router, servers, command = sys.argv[1], sys.argv[2:split], sys.argv[split + 1 :]
    if os.fork() == 0:
        _tell(router, [server.split("=", 1) for server in servers], parent=os.getppid())
        os._exit(0)
    os.execvp(command[0], command)  # noqa: S606 - the words of the plan, no shell


def _tell(router: str, servers: list[list[str]], *, parent: int) -> None:
    """Tell the router of all servers when all are up, unless it is gone by then."""
    addresses = [f"{router}/liveness", *(f"{url}/health" for _, url in servers)]
    while os.getppid() == parent:
        if all(_answers(address) for address in addresses):
            told = [_answers(f"{router}/workers", {"url": url, "model_id": model}) for model, url in servers]
            if all(told):
                return
        time.sleep(_INTERVAL_S)


def _answers(url: str, body: dict[str, str] | None = None) -> bool:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - the plan's
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError, HTTPException), opener.open(request, timeout=_ANSWER_S) as answer:
        return bool(answer.status == 200)
    return False


if __name__ == "__main__":
    main()
