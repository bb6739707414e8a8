"""The engine's end of the socket: never waits while there are steps to run.

What the socket does not take at once stays in a buffer and goes out later, so a busy HTTP process
cannot hold up a step.
"""

import select
import socket
from typing import Any

from engine.server.wire import FrameReader, encode

_READ_BYTES = 1 << 20


class EngineChannel:
    """Framed messages over a non-blocking socket.

    Args:
        sock: Connected to the HTTP process; the channel sets it non-blocking.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._frames = FrameReader()
        self._outgoing = bytearray()
        self.is_closed = False
        """Whether the other side has gone."""

    def send(self, message: Any) -> None:
        """Send a message, now as far as the socket takes it."""
        self._outgoing += encode(message)
        self._flush()

    def receive(self, timeout_s: float | None) -> list[Any]:
        """Return the messages that have come.

        Args:
            timeout_s: How long to wait for one, or for the end of the other side; None is forever.
        """
        self._flush()
        messages = self._read()
        while timeout_s != 0 and not messages and not self.is_closed:
            writers = [self._socket] if self._outgoing else []
            readable, writable, _ = select.select([self._socket], writers, [], timeout_s)
            if not readable and not writable:
                break
            self._flush()
            messages = self._read()
        return messages

    def drain(self, timeout_s: float) -> None:
        """Send what is left, but give up if the other side takes nothing for that long."""
        while self._outgoing and not self.is_closed:
            _, writable, _ = select.select([], [self._socket], [], timeout_s)
            if not writable:
                return
            self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except BlockingIOError:
                return
            except OSError:  # the reader has gone
                self.is_closed = True
                self._outgoing.clear()
                return
            del self._outgoing[:sent]

    def _read(self) -> list[Any]:
        messages: list[Any] = []
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return messages
            except OSError:
                data = b""
            if not data:
                self.is_closed = True
                return messages
            messages += self._frames.feed(data)
