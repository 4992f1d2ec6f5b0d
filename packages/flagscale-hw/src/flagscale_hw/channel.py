"""Messages over a byte stream that may stop moving: one JSON object a line, never blocking either side.

What does not live here: how the stream is opened (`link.py`), what the messages mean (`agent.py`).
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

__all__ = ["Channel", "Message"]

Message = dict[str, Any]

_CHUNK_BYTES = 1 << 18
_LINE_LIMIT = 64 << 20


class Channel:
    """Both directions of a connection; `heard_at` tells when the other side last gave a sign of life."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads = reads
        self._writes = writes
        for handle in (reads, writes):
            os.set_blocking(handle, False)
        self._incoming = b""
        self._outgoing = bytearray()
        self.is_closed = False
        """Whether the other side is gone."""
        self.heard_at = time.monotonic()
        self.spoken_at = 0.0

    def keep_alive(self, every_s: float) -> None:
        """Say that we are there when that was not said for so long, and send what waits."""
        if time.monotonic() >= self.spoken_at + every_s:
            self.spoken_at = time.monotonic()
            self.send({"said": "alive", "do": "alive"})
        self.flush()

    @property
    def backlog_bytes(self) -> int:
        """How much waits because the other side does not read."""
        return len(self._outgoing)

    def send(self, message: Message) -> None:
        """Queue a message and send what the stream takes now."""
        self.send_raw(json.dumps(message).encode() + b"\n")

    def send_raw(self, data: bytes) -> None:
        """Queue bytes as they are."""
        self._outgoing += data
        self.flush()

    def flush(self) -> None:
        """Send what the stream takes now."""
        while self._outgoing and not self.is_closed:
            try:
                sent = os.write(self._writes, self._outgoing[:_CHUNK_BYTES])
            except BlockingIOError:
                return
            except OSError:
                self.is_closed = True
                return
            del self._outgoing[:sent]

    def receive(self) -> list[Message]:
        """Return the whole messages that have come; notes when the stream has ended."""
        while True:
            try:
                data = os.read(self.reads, _CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.is_closed = True
                break
            self.heard_at = time.monotonic()
            self._incoming += data
            if len(self._incoming) > _LINE_LIMIT:
                self.is_closed = True
                break
        *lines, self._incoming = self._incoming.split(b"\n")
        return [message for message in map(_parse, lines) if message is not None]


def _parse(line: bytes) -> Message | None:
    """Read one message; anything else on the stream, such as a greeting of a login shell, is passed over."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
