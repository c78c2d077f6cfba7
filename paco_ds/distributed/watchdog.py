"""The rank watchdog: when a rank dies, the job ends on every host with a message that names the rank.

Launchers watch only the processes of their own host: without the watchdog, the ranks of other hosts wait in a
collective for ever (NCCL) or end with an error that names no rank (gloo), and pdsh waits for them.

Every rank holds one TCP connection to rank 0, idle in normal operation. When a process dies, its kernel closes the
connection; when a host vanishes, rank 0's kernel misses the answers to its keepalive probes. There are no heartbeats: a
long evaluation, checkpoint or compilation is not mistaken for a failure, and a step sends nothing. Rank 0 informs the
others; they detect the death of rank 0 themselves.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

from torch.distributed import DistError, TCPStore

from paco_ds.command import exit_status
from paco_ds.distributed.launch import environment_ranks
from paco_ds.errors import RESUMABLE, UserError

# a vanished host is detected after IDLE + PROBES * INTERVAL = 30 seconds
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 10, 5, 4
SETTLE = 1.0  # seconds to collect the ranks of one host, which die one after another, into one message
HEARSAY = 3.0  # seconds that a rank with a failed collective waits for the name of the lost rank; more than SETTLE
GRACE = 5.0  # seconds for a rank to exit after it learned of a loss
PATIENCE = 60.0  # seconds between messages about ranks that have not connected
_KEY = "paco_ds/rank_watchdog"  # key in the store: address of rank 0


class RankWatchdog:
    """Context manager around all work of a rank; does nothing in a job of one rank.

    A rank that leaves it with an exception has failed: the others print its reason and exit with its status. A rank
    that vanishes is lost: the others name it and exit with status `RESUMABLE`, at most 60 seconds later.

    Args:
        remedy: called after a loss; returns a sentence that says what to do.
        end: ends the process with a status, from any thread.
    """

    def __init__(
        self, remedy: Callable[[], str] = lambda: "Run the same command again", end: Callable[[int], Any] = os._exit
    ) -> None:
        self._remedy, self._end = remedy, end
        self.rank, self.world_size, self._local_rank = environment_ranks()
        self._links: dict[int, _Link] = {}  # by the rank at the other end
        self._over: set[int] = set()  # ranks that left without an error
        self._lost: dict[_Link, str] = {}  # links of lost ranks, and the reason
        self._known_at = 0.0  # time of the first loss, then of the verdict
        self._end_of_job: dict[str, Any] = {}  # the message to the others once the job must end
        self._verdict, self._closing, self._all_here = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RankWatchdog:
        # without an address `join_job` raises an error
        if self.world_size > 1 and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            self._connect()
            self._thread = threading.Thread(target=self._watch, name="rank-watchdog", daemon=True)
            self._thread.start()
            try:
                self._wait_for_all()
            except BaseException as error:
                self.__exit__(type(error), error, error.__traceback__)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        if self._thread is None:
            return False
        in_good_order = error is None or (isinstance(error, SystemExit) and not error.code)
        unexplained = isinstance(error, Exception) and not isinstance(error, UserError)
        if unexplained:  # most likely a collective failed because a rank was lost
            with _sigterm_ignored():  # sent by the launcher of the host, while this rank is about to print the reason
                if self._verdict.wait(HEARSAY):
                    self._end_process()
        if in_good_order:
            self._tell({"over": True})
        elif self.rank:
            self._tell({"failed": _reason(error), "status": exit_status(error) or 1})
        else:
            reason = f"{self._describe([self.rank])} failed: {_reason(error)}"
            self._tell({"end": reason, "status": exit_status(error) or 1})
        self._closing.set()
        self._wake.send(b"x")
        self._thread.join()
        for sock in (self._wake, self._woken, self._listener, *(link.socket for link in self._links.values())):
            if sock is not None:
                sock.close()
        return False

    def _connect(self) -> None:
        """Rank 0 listens; the others find its address in the job's store, connect and send their rank."""
        address = os.environ["MASTER_ADDR"]
        self._store = _store_of_the_job(self.rank, self.world_size)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        if self.rank == 0:
            _allow_open_files(4 * self.world_size)
            self._listener = _listen(self.world_size)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._token = secrets.token_hex(8)
            about = {"port": self._listener.getsockname()[1], "token": self._token, "host": socket.gethostname()}
            self._store.set(_KEY, json.dumps(about))
        else:
            about = json.loads(self._store.get(_KEY))
            try:
                first = socket.create_connection((address, about["port"]), timeout=KEEPALIVE_IDLE)
            except OSError as error:
                raise UserError(
                    f"no connection to rank 0 at {address}, TCP port {about['port']} ({error}): the hosts of a job "
                    f"must reach each other on all unprivileged ports"
                ) from None
            link = _Link(first)
            link.rank, link.host = 0, about["host"]
            link.send({"rank": self.rank, "token": about["token"], "host": socket.gethostname()})
            self._links[0] = link
            self._selector.register(first, selectors.EVENT_READ, link)

    def _wait_for_all(self) -> None:
        """Rank 0 waits until every rank has connected, so that an early failure is reported to all.

        Raises:
            UserError: some ranks did not connect; the message names them.
        """
        if self.rank == 0 and not self._all_here.wait(timeout := _start_timeout()):
            raise UserError(
                f"{_ranks(self._awaited())} of {self.world_size} did not start within {timeout / 60:g} minutes "
                f"(DEEPSPEED_TIMEOUT): look for messages of those hosts above, and whether ssh reaches them"
            )

    def _watch(self) -> None:
        """Body of the watchdog thread: wait for messages, and check the clock every second."""
        said_at = time.monotonic()
        while not self._closing.is_set():
            for key, _ in self._selector.select(SETTLE):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is not None:
                    self._hear(key.data)
            now, awaited = time.monotonic(), self._awaited()
            if self._verdict.is_set():
                # ranks that still start would not find rank 0
                if now - self._known_at >= (PATIENCE if awaited else GRACE):
                    self._end_process()
                    return
            elif self._lost and now - self._known_at >= SETTLE:
                self._conclude()
            elif awaited and now - said_at >= PATIENCE:
                said_at = now
                self._say(f"still waiting for {_ranks(awaited)} of {self.world_size} to start")

    def _awaited(self) -> list[int]:
        """Ranks that have not connected to rank 0 yet."""
        if self.rank:
            return []
        return [rank for rank in range(1, self.world_size) if rank not in self._links]

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):  # closed again
            connection, _ = self._listener.accept()
            self._selector.register(connection, selectors.EVENT_READ, _Link(connection))

    def _hear(self, link: _Link) -> None:
        try:
            messages = link.receive()
        except (OSError, ValueError) as error:
            self._selector.unregister(link.socket)
            if link.rank is None:  # not a rank of this job
                link.socket.close()
            elif link.rank not in self._over:
                self._known_at = self._known_at or time.monotonic()
                self._lost.setdefault(link, _how(error))
            return
        for message in messages:
            if link.rank is None:
                if not self._greet(link, message):
                    self._selector.unregister(link.socket)
                    link.socket.close()
                    return
            elif "over" in message:
                self._over.add(link.rank)
            elif "failed" in message:
                self._finish(f"{self._describe([link.rank])} failed: {message['failed']}", message["status"])
            elif "end" in message:
                self._finish(message["end"], message["status"], alone="alone" in message)

    def _greet(self, link: _Link, message: dict[str, Any]) -> bool:
        """Whether the connection is from a rank of this job, and the first of that rank."""
        rank = message.get("rank")
        if message.get("token") != self._token or not isinstance(rank, int):
            return False
        if rank in self._links:
            port = os.environ["MASTER_PORT"]
            there = f"{self._describe([rank])} has already joined: does another job use --master_port {port}?"
            link.send({"end": there, "status": 1, "alone": True})
            return False
        link.rank, link.host = rank, str(message.get("host"))
        self._links[rank] = link
        if self._end_of_job:
            link.send(self._end_of_job)
        if not self._awaited():
            self._all_here.set()
        return True

    def _conclude(self) -> None:
        """Report the lost ranks."""
        how = next(iter(self._lost.values()))
        lost = sorted(link.rank for link in self._lost if link.rank is not None)
        were = "was" if len(lost) == 1 else "were"
        message = f"{self._describe(lost)} {were} lost: {how}. {self._next_step()}"
        self._finish(message, RESUMABLE, alone=0 in lost)

    def _finish(self, message: str, status: int, alone: bool = False) -> None:
        """End the job; `alone`: print the message, since no other rank of this host may have received it."""
        if self._verdict.is_set():
            return
        self._end_of_job, self._known_at = {"end": message, "status": status}, time.monotonic()
        if self.rank == 0:
            self._tell(self._end_of_job)
        if self._local_rank == 0 or alone:  # once per host
            self._say(message)
        self._verdict.set()

    def _tell(self, message: dict[str, Any]) -> None:
        for link in list(self._links.values()):
            link.send(message)

    def _describe(self, lost: Iterable[int]) -> str:
        """Ranks with their hosts, as "rank 3 on host node2 (10.77.0.2)"."""
        by_host: dict[str, list[int]] = {}
        for rank in lost:
            link = self._links.get(rank)
            where = f"{link.host} ({link.address})" if link else f"{socket.gethostname()}"
            by_host.setdefault(where, []).append(rank)
        return ", ".join(f"{_ranks(ranks)} on host {where}" for where, ranks in by_host.items())

    def _next_step(self) -> str:
        try:
            return self._remedy()
        except Exception as error:  # the message must be printed in any case
            return f"Run the same command again ({error})"

    def _say(self, what: str) -> None:
        with suppress(OSError):  # the output may be closed
            # in one write, so that messages of several ranks do not mix
            print(f"watchdog (rank {self.rank} of {self.world_size}): {what}\n", end="", file=sys.stderr, flush=True)

    def _end_process(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        # not sys.exit: destructors of a process group with a lost member may wait for it
        self._end(self._end_of_job["status"])


class _Link:
    """A connection between rank 0 and another rank; messages are lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._buffer = connection, b""
        self.rank: int | None = None  # of the other end, once known
        self.host = ""
        self.address = str(connection.getpeername()[0]).removeprefix("::ffff:")
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; a closed connection is detected when reading."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages received so far.

        Raises:
            OSError: the connection is closed.
            ValueError: not the watchdog's protocol.
        """
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:  # nothing to read
            return []
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > 1 << 20:
            raise ValueError("no end of line")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages


@contextmanager
def _sigterm_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _store_of_the_job(rank: int, world_size: int) -> TCPStore:
    """The store of the job, shared with torch's process group: a process has one server per address.

    Raises:
        UserError: rank 0 cannot serve it, or cannot be reached.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves it
    try:
        return TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=_start_timeout()),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistError as error:
        remedy = "give another --master_port if another job uses this one"
        if rank:
            waited = f"waited {_start_timeout() / 60:g} minutes, DEEPSPEED_TIMEOUT"
            remedy = f"look for rank 0's own message ({waited}), and whether this host can reach {address}"
        raise UserError(f"no store of the job at {address}, TCP port {port}: {remedy}. {error}") from None


def _start_timeout() -> float:
    """Seconds to wait for ranks to start: DeepSpeed's setting, with its default."""
    return 60.0 * int(os.environ.get("DEEPSPEED_TIMEOUT", 10))


def _listen(world_size: int) -> socket.socket:
    backlog = max(128, world_size)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _allow_open_files(wanted: int) -> None:
    """Rank 0 holds a connection to every rank, here and in torch's store; many systems allow 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + 1024:
        allowed = wanted + 1024 if hard == resource.RLIM_INFINITY else min(wanted + 1024, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _how(error: Exception) -> str:
    if isinstance(error, ConnectionResetError | BrokenPipeError | ValueError):
        return "its process died (killed? out of memory? the kernel log of its host tells)"
    return f"its host does not answer ({error})"


def _reason(error: BaseException | None) -> str:
    text = str(error)[:4000]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _ranks(ranks: list[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0, 8-15"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}"
