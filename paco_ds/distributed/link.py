"""A connection between rank 0 and another rank: short messages, and the end of the other side noticed by the kernel."""

from __future__ import annotations

import errno
import json
import socket
from contextlib import suppress

# a vanished host is detected after IDLE + PROBES * INTERVAL = 30 seconds
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 10, 5, 4
GREETING_BYTES = 1024  # of a message of somebody who has not shown the job's token
MESSAGE_BYTES = 1 << 17

Message = dict[str, str | int]


class Link:
    """Messages are lines of JSON, each an object of strings, integers and booleans.

    Attributes:
        rank: of the other end, None until it is known.
        host, address: of the other end.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._received = connection, b""
        self.rank: int | None = None
        self.host = ""
        self.address = str(connection.getpeername()[0]).removeprefix("::ffff:")
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)

    def send(self, message: Message) -> None:
        """Send a message; a closed connection is detected when reading."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """The messages received so far.

        Raises:
            OSError: the connection is closed.
            ValueError: not a message, or too long.
        """
        most = GREETING_BYTES if self.rank is None else MESSAGE_BYTES
        try:
            data = self.socket.recv(most - len(self._received))
        except BlockingIOError:  # nothing to read
            return []
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) >= most:
            raise ValueError("a message is too long")
        return [parse(line) for line in lines]


def parse(line: bytes) -> Message:
    """The message of a line.

    Raises:
        ValueError: it is none.
    """
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested") from None
    if not isinstance(message, dict) or not all(isinstance(value, str | int) for value in message.values()):
        raise ValueError("not a flat object")
    return message
