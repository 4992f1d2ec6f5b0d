"""Ask a server whether it really answers.

Each probe asks in a process of its own, so a server that never finishes its answer cannot hold the
supervisor.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Mapping
from typing import Any

from flagscale_hw.plan import Probe
from flagscale_hw.spawn import fork_helper

__all__ = ["ProbeRun", "ask", "wait_any"]

_BODY_LIMIT = 1 << 20
_LOOPBACK = ("localhost", "127.", "::1", "0.0.0.0")  # noqa: S104 - compared, never bound
_QUOTE_LIMIT = 300


class ProbeRun:
    """One probe of one attempt: its helper process, its deadline and the last answer."""

    def __init__(self, probe: Probe, *, for_ever: bool = False) -> None:
        """Begin to ask.

        Args:
            probe: what to ask.
            for_ever: go on after it has passed, and let `has_passed` tell the last answer.
        """
        self.probe = probe
        self._for_ever = for_ever
        self.has_passed = False
        self.last_answer = "nothing yet"
        self.deadline = time.monotonic() + probe.timeout_s
        self._rest = b""
        self.handle = self._start()

    def _start(self) -> int:
        listen, report = os.pipe()
        if fork_helper() == 0:
            try:
                _keep_asking(self.probe, report, for_ever=self._for_ever)
            except BaseException as error:  # noqa: BLE001 - the last frame of a forked process
                _report(report, passed=False, text=f"the probe broke: {type(error).__name__}: {error}")
            finally:
                os._exit(0)
        os.close(report)
        os.set_blocking(listen, False)
        return listen

    def read(self) -> None:
        """Take in what the helper said; call it when `handle` is readable."""
        try:
            data = os.read(self.handle, 65536)
        except BlockingIOError:
            return
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            answer = json.loads(line)
            self.has_passed = answer["passed"]
            self.last_answer = answer["text"]
            if self._for_ever and self.has_passed:
                self.deadline = time.monotonic() + self.probe.timeout_s
        if not data and (self._for_ever or not self.has_passed):
            # The helper was killed by somebody: ask again with a new one.
            os.close(self.handle)
            time.sleep(min(self.probe.interval_s, 1.0))
            self.handle = self._start()

    def close(self) -> None:
        """Stop listening to the helper; it ends by itself or with the run."""
        os.close(self.handle)


def _keep_asking(probe: Probe, report: int, *, for_ever: bool) -> None:
    passed = False
    while for_ever or not passed:
        passed, text = ask(probe)
        _report(report, passed=passed, text=text)
        if for_ever or not passed:
            time.sleep(probe.interval_s)


def _report(report: int, *, passed: bool, text: str) -> None:
    os.write(report, json.dumps({"passed": passed, "text": text}).encode() + b"\n")


def ask(probe: Probe) -> tuple[bool, str]:
    """Ask once.

    Returns:
        Whether the probe passes, and the answer in one line for people.
    """
    import http.client
    import urllib.error
    import urllib.request

    body = None if probe.body is None else json.dumps(probe.body).encode()
    headers = {"Content-Type": "application/json", **probe.headers} if body else dict(probe.headers)
    request = urllib.request.Request(probe.url, data=body, headers=headers, method=probe.method)  # noqa: S310
    # A proxy of the environment must not see, or break, a request to this very machine.
    proxies = [urllib.request.ProxyHandler({})] if _is_loopback(request.host) else []
    try:
        with urllib.request.build_opener(*proxies).open(request, timeout=probe.request_timeout_s) as response:
            return _judge(probe, response.status, _read(response, probe.request_timeout_s))
    except urllib.error.HTTPError as error:
        with error:
            return False, f"HTTP {error.code}: {_quote(_read(error, probe.request_timeout_s))}"
    except TimeoutError:
        return False, f"no answer within {probe.request_timeout_s:g} s"
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            return False, f"no connection within {probe.request_timeout_s:g} s"
        return False, _quote(str(getattr(error, "reason", "") or error or type(error).__name__).encode())


def _is_loopback(host: str) -> bool:
    return host.lstrip("[").startswith(_LOOPBACK)


def _read(response: Any, limit_s: float) -> bytes:
    """Read the body, giving up when a server drips it for longer than the whole request may take."""
    deadline = time.monotonic() + limit_s
    body = b""
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > _BODY_LIMIT:
            break
        if time.monotonic() > deadline:
            raise TimeoutError
    return body


def _judge(probe: Probe, code: int, body: bytes) -> tuple[bool, str]:
    text = f"HTTP {code}: {_quote(body)}"
    if probe.expect is None:
        return True, text
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False, f"{text} (not JSON, `{probe.expect}` is expected in it)"
    if _at(value, probe.expect):
        return True, text
    return False, f"{text} (`{probe.expect}` is missing, null, 0 or empty)"


def _at(value: Any, path: str) -> Any:
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _quote(body: bytes) -> str:
    text = " ".join(body.decode(errors="replace").split())
    return text if len(text) <= _QUOTE_LIMIT else text[: _QUOTE_LIMIT - 3] + "..."


def wait_any(handles: list[int], timeout_s: float) -> list[int]:
    """Return the handles that can be read, after at most `timeout_s` seconds."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN | select.POLLHUP | select.POLLERR)
    return [handle for handle, _ in poll.poll(max(0.0, timeout_s) * 1000)]
