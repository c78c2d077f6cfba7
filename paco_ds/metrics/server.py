"""The HTTP server of /metrics: one thread, few connections, each for seconds, whatever clients do.

The libraries' servers start a thread per connection. It holds a descriptor of the training process for as long as its
client likes, so that a thousand idle clients end the training.
"""

from __future__ import annotations

import selectors
import socket
from http import HTTPStatus
from threading import Thread

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from paco_ds.distributed.listener import Listener, listen

CONNECTIONS = 64
PATIENCE = 5.0  # seconds of a connection, from its beginning to the last byte of the response
REQUEST_BYTES = 8192  # request line and headers


class MetricsServer:
    """Answers GET of / and /metrics with the registry's metrics, and of /targets, until it is closed.

    Args:
        port: 0 takes any free one.
        address: of this host; by default all, IPv4 and IPv6.

    Attributes:
        targets: JSON that GET of /targets answers, for Prometheus' http_sd_configs; None: not found.

    Raises:
        OSError: the port cannot be served.
    """

    def __init__(self, port: int, registry: CollectorRegistry, address: str | None = None) -> None:
        server = listen(port, address)
        self.targets: bytes | None = None
        self._registry, self._selector = registry, selectors.DefaultSelector()
        self._listener = Listener(server, self._selector, _Request, CONNECTIONS, PATIENCE)
        self.port = self._listener.port
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, close all connections and release the port."""
        self._wake.close()
        self._thread.join()
        self._listener.close()
        self._selector.close()
        self._woken.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(1.0):
                if key.fileobj is self._woken:
                    return
                if key.data is self._listener:
                    self._listener.accept()
                else:
                    self._continue(key.data)
            self._listener.tick()

    def _continue(self, request: _Request) -> None:
        """Read a part of the request, or write a part of the response."""
        try:
            if not request.response and request.read():
                request.response = self._respond(request.received)
                self._selector.modify(request.socket, selectors.EVENT_WRITE, request)
            elif request.response and request.write():
                self._listener.dismiss(request)
        except BlockingIOError:
            pass
        except OSError:  # the client is gone
            self._listener.dismiss(request)

    def _respond(self, request: bytes) -> bytes:
        if len(request) >= REQUEST_BYTES:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        first, *headers = request.decode("latin-1").splitlines()
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/"):
            return _response(HTTPStatus.BAD_REQUEST)
        if words[0] != "GET":
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, allow="GET")
        path = words[1].partition("?")[0]
        if path == "/targets" and self.targets is not None:
            return _response(HTTPStatus.OK, self.targets, content_type="application/json")
        if path not in ("/", "/metrics"):
            return _response(HTTPStatus.NOT_FOUND)
        named = (header.partition(":") for header in headers)
        accept = next((value for name, _, value in named if name.strip().lower() == "accept"), "")
        try:
            encode, content_type = choose_encoder(accept)
            return _response(HTTPStatus.OK, encode(self._registry), content_type=content_type)
        except Exception as error:  # a header that the library cannot read must not end the thread
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR, f"{error!r}\n".encode())


class _Request:
    """A connection with what it has received, and the part of the response that is not sent yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received, self.response = b"", b""

    def read(self) -> bool:
        """Receive; whether the request is complete, or too long.

        Raises:
            OSError: closed by the client, or nothing to read.
        """
        data = self.socket.recv(REQUEST_BYTES - len(self.received))
        if not data:
            raise ConnectionResetError
        self.received += data
        return b"\r\n\r\n" in self.received or b"\n\n" in self.received or len(self.received) >= REQUEST_BYTES

    def write(self) -> bool:
        """Send; whether all of the response is sent."""
        self.response = self.response[self.socket.send(self.response) :]
        return not self.response


def _response(status: HTTPStatus, body: bytes | None = None, **headers: str) -> bytes:
    body = f"{status.phrase}\n".encode() if body is None else body
    headers = {"content_type": "text/plain; charset=utf-8", **headers, "content_length": str(len(body))}
    lines = [f"{name.replace('_', '-').title()}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"HTTP/1.1 {status.value} {status.phrase}", *lines, "Connection: close", "", ""])
    return head.encode("latin-1") + body
