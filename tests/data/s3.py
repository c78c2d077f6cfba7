"""A real S3-compatible server on loopback behind a proxy that can be told to fail, stall and cut connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

BUCKET = "paco"


@dataclass
class Proxy:
    """A TCP proxy. `trouble` connections from now on are refused, stalled or cut after `cut_after` answered bytes."""

    target: tuple[str, int]
    kind: str = ""
    trouble: int = 0
    cut_after: int = 0
    connections: int = 0
    closing: bool = False
    server: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def __post_init__(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def make(self, kind: str, connections: int, cut_after: int = 0) -> None:
        """`kind`: "refuse", "stall" or "cut"."""
        self.kind, self.trouble, self.cut_after = kind, connections, cut_after

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                self.connections += 1
                kind = self.kind if self.trouble > 0 else ""
                self.trouble -= bool(kind)
                threading.Thread(target=self._serve, args=(client, kind), daemon=True).start()

    def _serve(self, client: socket.socket, kind: str) -> None:
        if kind == "refuse":
            client.close()
            return
        if kind == "stall":
            while not self.closing:
                time.sleep(0.05)
            client.close()
            return
        upstream = socket.create_connection(self.target)
        threading.Thread(target=_pump, args=(client, upstream, None), daemon=True).start()
        _pump(upstream, client, self.cut_after if kind == "cut" else None)

    def close(self) -> None:
        self.closing = True
        self.server.close()


def _pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    """Bytes from one socket to the other; both are cut after `limit` of them."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data if limit is None else data[:limit])
            if limit is not None:
                limit -= len(data)
                if limit <= 0:
                    break
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """moto's server with an empty bucket, behind a proxy."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    ).create_bucket(Bucket=BUCKET)
    proxy = Proxy((host, port))
    try:
        yield proxy
    finally:
        proxy.close()
        server.stop()
