"""A link: the connection to one host's agent, from the side of whoever leads."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flagscale_hw.bootstrap import first_bytes
from flagscale_hw.channel import Channel, Message
from flagscale_hw.ssh import argv_of, explain
from flagscale_hw.target import Target

__all__ = ["ALIVE_EVERY_S", "SILENCE_S", "Link", "Starter"]

ALIVE_EVERY_S = 3.0
"""How often each side of a link says that it is there."""
SILENCE_S = 30.0
"""After so long without a word the other side counts as gone."""

Starter = Callable[[Sequence[str], int, Path], int]
"""Starts a command with a socket as standard input and output and a file for errors; returns its pid."""

_LOG_TAIL_BYTES = 16384


class Link:
    """One host, as far as it can be reached."""

    def __init__(self, target: Target, log: Path) -> None:
        self.target = target
        self.log = log
        """What ssh says: the reason when there is no connection."""
        self.pid: int | None = None
        self.channel: Channel | None = None
        self._socket: socket.socket | None = None

    def open(self, start: Starter) -> None:
        """Begin to connect; whatever goes wrong shows as the end of the channel.

        Raises:
            OSError: the command cannot be started.
        """
        ours, theirs = socket.socketpair()
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_bytes(b"")
            self.pid = start(argv_of(self.target), theirs.fileno(), self.log)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        self.channel = Channel(ours.fileno(), ours.fileno())
        self.channel.send_raw(first_bytes())

    @property
    def is_open(self) -> bool:
        """Tell whether the other side may still say something."""
        return self.channel is not None and not self.channel.is_closed

    @property
    def handle(self) -> int:
        """What becomes readable when the other side says something."""
        assert self.channel is not None  # noqa: S101 - asked of open links only
        return self.channel.reads

    def tell(self, message: Message) -> None:
        """Send a message; one to a link that has ended is lost, which its end tells already."""
        if self.channel is not None and self.is_open:
            self.channel.send(message)

    def keep_alive(self) -> None:
        """Say that we are there, when it is time, and send what waits."""
        if self.channel is not None and self.is_open:
            self.channel.keep_alive(ALIVE_EVERY_S)

    def hear(self) -> list[Message]:
        """Return what has been said."""
        return self.channel.receive() if self.channel is not None else []

    @property
    def is_silent(self) -> bool:
        """Tell whether nothing was heard for so long that the host counts as gone."""
        return self.channel is not None and time.monotonic() - self.channel.heard_at > SILENCE_S

    def reason(self) -> str:
        """Say why there is no connection, and what to do."""
        return explain(self.target, self._said())

    def _said(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def close(self) -> None:
        """Hang up; an agent that is still there ends its part of the run."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self.channel is not None:
            self.channel.is_closed = True
