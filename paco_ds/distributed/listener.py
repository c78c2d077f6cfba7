"""Listening sockets that strangers cannot exhaust: few connections wait to say who they are, each for seconds."""

from __future__ import annotations

import errno
import resource
import selectors
import socket
import time
from collections.abc import Callable
from typing import Protocol

OPEN_FILES = 65536


class Visitor(Protocol):
    """What is made of an accepted connection."""

    socket: socket.socket


class Listener:
    """Accepts connections into a selector, where each waits as a visitor until it is admitted or dismissed.

    At most `most` visitors are held, each for `patience` seconds. One more dismisses the oldest: who has something to
    say says it at once, so a thousand idle connections do not keep it out.

    Args:
        server: listens already; see :func:`listen`.
        selector: `server` is registered with this listener as its data, a visitor's socket with the visitor.
        make: the visitor of an accepted connection.
    """

    def __init__(
        self,
        server: socket.socket,
        selector: selectors.BaseSelector,
        make: Callable[[socket.socket], Visitor],
        most: int,
        patience: float,
    ) -> None:
        self._server, self._selector, self._make = server, selector, make
        self.most, self._patience = most, patience
        self._visitors: dict[Visitor, float] = {}  # when each came, oldest first
        self._paused = False
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ, self)

    @property
    def port(self) -> int:
        return int(self._server.getsockname()[1])

    def accept(self) -> None:
        """Accept one connection. Without a free descriptor the oldest visitor goes, or nobody is let in for a while."""
        connection = None
        try:
            connection, _ = self._server.accept()
            connection.setblocking(False)
            visitor = self._make(connection)
        except OSError as error:
            if connection is not None:  # gone again
                connection.close()
            elif error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._make_room()
            return
        self._selector.register(connection, selectors.EVENT_READ, visitor)
        self._visitors[visitor] = time.monotonic()
        if len(self._visitors) > self.most:
            self.dismiss(next(iter(self._visitors)))

    def _make_room(self) -> None:
        if self._visitors:
            self.dismiss(next(iter(self._visitors)))
        elif not self._paused:
            self._selector.unregister(self._server)  # else the selector would report it without end
            self._paused = True

    def admit(self, visitor: Visitor) -> None:
        """Hold the connection for as long as it lasts; its socket stays registered."""
        del self._visitors[visitor]

    def dismiss(self, visitor: Visitor) -> None:
        """Close the connection; once, though the selector may have reported it before it was closed."""
        if self._visitors.pop(visitor, None) is None:
            return
        self._selector.unregister(visitor.socket)
        visitor.socket.close()

    def tick(self) -> None:
        """Dismiss visitors that have been here for too long, and accept again after a pause; about once a second."""
        now = time.monotonic()
        for visitor in [visitor for visitor, came in self._visitors.items() if now - came > self._patience]:
            self.dismiss(visitor)
        if self._paused:
            self._selector.register(self._server, selectors.EVENT_READ, self)
            self._paused = False

    def close(self) -> None:
        """Close the listening socket and all visitors."""
        for visitor in list(self._visitors):
            self.dismiss(visitor)
        if not self._paused:
            self._selector.unregister(self._server)
        self._server.close()


def listen(port: int, address: str | None = None, backlog: int = 128) -> socket.socket:
    """A socket that listens on `port` (0: any free one) of one address, or of all addresses, IPv4 and IPv6.

    Raises:
        OSError: EADDRINUSE, or the address is not one of this host.
    """
    if address is not None:
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(where[:2], family=family, backlog=backlog)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=backlog)  # a host without IPv6


def allow_open_files() -> None:
    """Raise this process's limit of open files towards `OPEN_FILES`; many systems allow 1024.

    Rank 0 holds two connections to every rank, and strangers who connect to torch's store or to gloo take descriptors
    of this process that nothing of ours can refuse.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
