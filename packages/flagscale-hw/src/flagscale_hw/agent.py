"""The agent: one host's part of a run, led through standard input and output of an ssh session.

    coordinator == ssh ==> agent -> guardian -> supervisor -> planned processes

It starts the very same guardian and supervisor that a run on one host has, with itself as the launcher they
hang on, so whatever ends the agent ends the processes. It ends its part when the connection ends or falls
silent. Told: `prepare`, `start`, `stop`, `alive`, `survey`. Says: `prepared`, `refused`, `problem`, `status`,
`file`, `over`, `alive`, `survey`.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from flagscale_hw.channel import Channel, Message
from flagscale_hw.errors import HwError, LaunchRefused
from flagscale_hw.link import ALIVE_EVERY_S, SILENCE_S
from flagscale_hw.plan import Plan
from flagscale_hw.rundir import TOKEN, RunDirectory
from flagscale_hw.status import RunStatus

if TYPE_CHECKING:
    from flagscale_hw.runs import Launch

__all__ = ["main"]

_TURN_S = 0.2
_SHORT_GRACE_S = 3.0
_LATE_S = 15.0
_CHUNK_BYTES = 1 << 17
_BACKLOG_BYTES = 4 << 20


def main() -> int:
    """Serve one coordinator until the part is over or the connection is.

    Returns:
        0 when the end was told to the coordinator.
    """
    # The stream is ours alone: whatever prints by mistake goes to the errors.
    reads, writes = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    channel = Channel(reads, writes)
    _Signals.listen()
    try:
        return _serve(channel)
    except Exception:  # noqa: BLE001 - the last frame: a bug must reach the coordinator in words
        channel.send({"said": "problem", "text": traceback.format_exc()[-2000:]})
        return 1


class _Signals:
    """sshd or a person may end the agent; then it ends its part."""

    is_told = False

    @classmethod
    def listen(cls) -> None:
        def note(_signum: int, _frame: FrameType | None) -> None:
            cls.is_told = True

        for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, note)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _serve(channel: Channel) -> int:
    for message in _wait_for(channel, {"prepare", "survey"}):
        if message["do"] == "survey":
            from flagscale_hw.looking import look

            channel.send({"said": "survey", "found": look(message)})
            _drain(channel)
            return 0
        return _Part(channel, message).serve()
    return 3


def _wait_for(channel: Channel, wanted: set[str]) -> list[Message]:
    """Wait for one of some messages; none when the connection is gone first."""
    while True:
        heard = [message for message in _turn(channel) if message.get("do") in wanted]
        if heard or _is_lost(channel):
            return heard[:1]


def _turn(channel: Channel) -> list[Message]:
    from flagscale_hw.probing import wait_any

    wait_any([channel.reads], _TURN_S)
    channel.keep_alive(ALIVE_EVERY_S)
    return channel.receive()


def _is_lost(channel: Channel) -> bool:
    is_silent = time.monotonic() - channel.heard_at > SILENCE_S
    return channel.is_closed or is_silent or _Signals.is_told


def _drain(channel: Channel) -> None:
    while channel.backlog_bytes and not _is_lost(channel):
        _turn(channel)


class _Part:
    """What runs on this host."""

    def __init__(self, channel: Channel, order: Message) -> None:
        self._channel = channel
        self._plan = Plan.from_json(order["plan"])
        self._run_id = str(order["run_id"])
        self._directory = RunDirectory(Path(order["run_dir"]))
        self._is_shared = _has_token(self._directory, str(order["token"]))
        self._again = bool(order["again"])
        self._sent: dict[str, int] = {}
        self._last: RunStatus | None = None
        self._stop_deadline = float("inf")

    def serve(self) -> int:
        """Prepare, start, watch, end."""
        from flagscale_hw.runs import Launch

        if self._again:
            self._directory.clear(file.path for file in self._plan.files)
        launch = Launch(self._plan, self._directory.path)
        try:
            launch.begin(self._run_id)
        except HwError as error:
            launch.undo()
            kind = "refused" if isinstance(error, LaunchRefused) else "problem"
            self._channel.send({"said": kind, "text": str(error)})
            _drain(self._channel)
            return 2
        ports = launch.run.status().ports
        self._channel.send({"said": "prepared", "ports": dict(ports), "shared": self._is_shared})
        told = _wait_for(self._channel, {"start", "stop"})
        if not told or told[0]["do"] == "stop":
            launch.undo()
            return 3
        self._directory.write(self._directory.ports, told[0]["ports"])
        launch.complete(detach=False)
        return self._watch(launch)

    def _watch(self, launch: Launch) -> int:
        run = launch.run
        while True:
            for message in _turn(self._channel):
                if message.get("do") == "stop":
                    grace_s = float(message["grace_s"])
                    self._stop_deadline = min(self._stop_deadline, time.monotonic() + grace_s + _LATE_S)
                    run.ask_to_stop(grace_s)
            if _is_lost(self._channel):
                run.stop(_SHORT_GRACE_S)
                return 3
            if time.monotonic() > self._stop_deadline:
                run.stop(0.0)  # it was asked and did not move
            status = run.status()
            self._tell(status)
            if status.is_over:
                status = run.stop(0.0)  # proves that nothing is left
                self._send_files(everything=True)
                self._channel.send({"said": "over", "status": status.to_dict()})
                _drain(self._channel)
                return 0

    def _tell(self, status: RunStatus) -> None:
        self._send_files()
        if status != self._last:
            self._last = status
            if not status.is_over:
                self._channel.send({"said": "status", "status": status.to_dict()})

    def _send_files(self, *, everything: bool = False) -> None:
        """Send what the logs have grown by, to a coordinator that does not see this disk."""
        if self._is_shared:
            return
        for path in (*(f"logs/{process.name}.log" for process in self._plan.processes), *self._plan.collect):
            while self._send_piece(path) and everything and not _is_lost(self._channel):
                _drain(self._channel)

    def _send_piece(self, path: str) -> bool:
        if self._channel.backlog_bytes > _BACKLOG_BYTES:
            return False  # a slow line: the rest waits on this disk
        offset = self._sent.get(path, 0)
        data = b""
        with contextlib.suppress(OSError), (self._directory.path / path).open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                offset = 0  # set aside and begun again
            file.seek(offset)
            data = file.read(_CHUNK_BYTES)
        if not data:
            return False
        self._sent[path] = offset + len(data)
        self._channel.send({"said": "file", "path": path, "data": base64.b64encode(data).decode()})
        return True


def _has_token(directory: RunDirectory, token: str) -> bool:
    """Tell whether this host sees the file that the coordinator has just written to the same place."""
    try:
        return (directory.path / TOKEN).read_text(encoding="utf-8") == token
    except OSError:
        return False
