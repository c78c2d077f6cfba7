"""The server of /metrics against clients that are idle, slow, many or malicious."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest
from prometheus_client import CollectorRegistry, Gauge

from paco_ds.metrics import server as server_module
from paco_ds.metrics.server import MetricsServer


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    """With one gauge."""
    registry = CollectorRegistry()
    Gauge("paco_step", "Steps.", registry=registry).set(7)
    made = MetricsServer(0, registry)
    yield made
    made.close()


def answer(server: MetricsServer, request: bytes, host: str = "127.0.0.1") -> bytes:
    """All that the server sends until it closes; empty where it closes without an answer."""
    with socket.create_connection((host, server.port), timeout=60) as client:
        client.sendall(request)
        with client.makefile("rb") as received:
            try:
                return received.read()
            except ConnectionResetError:
                return b""


def scrape(server: MetricsServer) -> bytes:
    return answer(server, b"GET /metrics HTTP/1.1\r\nHost: node1\r\n\r\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ipv4_and_ipv6_are_served(server: MetricsServer, host: str) -> None:
    """Targets name either."""
    assert answer(server, b"GET / HTTP/1.0\r\n\r\n", host).endswith(b"paco_step 7.0\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics?x=1 HTTP/1.1\r\n\r\n", b"200 OK"),
        (b"GET /metrics HTTP/1.1\nAccept: application/openmetrics-text; version=1.0.0\n\n", b"200 OK"),
        (b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=x.y\r\n\r\n", b"500 "),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", b"400 Bad Request"),
        (b"\r\n\r\n", b"400 Bad Request"),
        (b"GET /" + b"a" * 8187, b"431 Request Header Fields Too Large"),
        (b"GET / HTTP/1.1\r\n" + (b"x: y\r\n" * 1363)[:8176], b"431 Request Header Fields Too Large"),
    ],
    ids=lambda value: value[:24].decode("latin-1").strip() if isinstance(value, bytes) else None,
)
def test_a_request_is_answered_by_its_first_line(server: MetricsServer, request_: bytes, status: bytes) -> None:
    """Two paths, one method, 8 KB."""
    assert answer(server, request_).startswith(b"HTTP/1.1 " + status)


def test_a_scrape_answers_while_idle_clients_hold_all_they_can(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one thread and with few descriptors; the oldest clients go, nobody waits for their time to be up."""
    monkeypatch.setattr(server._listener, "_patience", 3600.0)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    idle = 3 * server_module.CONNECTIONS
    with ExitStack() as stack:
        for _ in range(idle):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert b"paco_step 7.0" in scrape(server)
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) <= files + idle + server_module.CONNECTIONS


def test_slow_clients_are_left_after_some_seconds(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they send slowly or do not read."""
    monkeypatch.setattr(server._listener, "_patience", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(b"GET / HT")
        assert client.recv(100) == b""


def test_no_bytes_end_the_thread(server: MetricsServer) -> None:
    """Seeded garbage, and pieces of real requests."""
    rng = random.Random(5)
    pieces = [
        b"GET ",
        b"/metrics",
        b" HTTP/1.1",
        b"\r\n",
        b"\n\n",
        b"Accept:",
        b"text/plain;version=",
        b":",
        b"\x00\xff",
    ]
    for number in range(300):
        request = b"".join(rng.choice(pieces) if rng.random() < 0.8 else rng.randbytes(9) for _ in range(8))
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request)
            if number % 2:
                client.shutdown(socket.SHUT_WR)
                client.settimeout(60)
                assert client.recv(4)[:4] in (b"", b"HTTP")
    assert b"paco_step 7.0" in scrape(server)


def test_close_ends_the_thread_and_gives_all_descriptors_back() -> None:
    """Those of clients too. Its own are counted: other threads of the test process open files as they like."""
    server = MetricsServer(0, CollectorRegistry())
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        assert scrape(server)
        assert len(sockets_at(server.port)) >= 2, "the listening one and the client's"
        server.close()
        assert client.recv(1) == b""
    assert sockets_at(server.port) == []


def sockets_at(port: int) -> list[int]:
    """Descriptors of this process whose own end is at the port."""
    return [c.fd for c in psutil.Process().net_connections("tcp") if c.laddr and c.laddr.port == port]
