"""The rank watchdog: when a rank dies or hangs, the job ends on every host with a message that names the rank.

Launchers watch only the processes of their own host: without the watchdog, the ranks of other hosts wait in a
collective for ever (NCCL) or end with an error that names no rank (gloo), and pdsh waits for them.

Every rank holds one TCP connection to rank 0, idle in normal operation. When a process dies, its kernel closes the
connection; when a host vanishes, rank 0's kernel misses the answers to its keepalive probes. No heartbeat is sent, and
a step sends nothing: each rank watches its own progress, and only one without any speaks up (hang.py). Rank 0 informs
the others; they detect the death of rank 0 themselves.

Strangers reach rank 0's port too: they may hold few connections, for seconds, and nothing is obeyed before the job's
token, which the store hands to the ranks.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

from paco_ds.command import exit_status
from paco_ds.distributed.end_messages import (
    how_lost,
    in_time,
    name_ranks,
    reason,
    resume_children,
    sigterm_ignored,
    stacks,
    status_in,
)
from paco_ds.distributed.hang import HangWatch
from paco_ds.distributed.heartbeat import Heartbeat
from paco_ds.distributed.launch import environment_ranks
from paco_ds.distributed.link import KEEPALIVE_IDLE, Link, Message
from paco_ds.distributed.listener import Listener, allow_open_files
from paco_ds.distributed.rendezvous import key_of_this_start, listen_for_ranks, start_timeout, store_of_the_job
from paco_ds.errors import HANG, RESUMABLE, UserError, printable

SETTLE = 1.0  # seconds to collect the ranks of one host, which die one after another, into one message
HEARSAY = 5.0  # seconds that a rank with a failed collective waits to be told of a loss: rank 0 may take 3 SETTLE
GRACE = 5.0  # seconds for a rank to exit after it learned of the end of the job
PATIENCE = 60.0  # seconds between messages about ranks that have not connected
STRANGERS = 64  # connections that have not shown the token, beside those of awaited ranks
INTRODUCTION = 10.0  # seconds for showing it
_MOST_TEXT = 8000  # characters of a message: far below a link's limit, however JSON writes them


class RankWatchdog:
    """Context manager around all work of a rank.

    A rank that leaves it with an exception has failed: the others print its reason and exit with its status. A rank
    that vanishes is lost: the others name it and exit with status `RESUMABLE`, at most 60 seconds later. If no rank
    makes progress, each prints its stacks and exits with status `HANG`; a rank alone too.

    Attributes:
        heartbeat: to be marked at each progress; its `hang_seconds` switches the search for hangs on.

    Args:
        remedy: called after a loss or a hang; returns a sentence that says what to do.
        end: ends the process with a status, from any thread.
    """

    def __init__(
        self, remedy: Callable[[], str] = lambda: "Run the same command again", end: Callable[[int], Any] = os._exit
    ) -> None:
        self._remedy, self._end = remedy, end
        self.rank, self.world_size, self._local_rank = environment_ranks()
        self.heartbeat = Heartbeat()
        self._hangs = HangWatch(self.rank, self.heartbeat, self._tell, lambda: self._links.keys() - self._over)
        self._links: dict[int, Link] = {}  # by the rank at the other end
        self._listener: Listener | None = None  # of rank 0
        self._over: set[int] = set()  # ranks that left without an error
        self._lost: dict[Link, str] = {}  # links of lost ranks, and the reason
        self._known_at = 0.0  # time of the first loss, then of the verdict
        self.message, self._status = "", 0  # of the end of the job, once it is known
        self._verdict, self._closing, self._all_here = threading.Event(), threading.Event(), threading.Event()

    def __enter__(self) -> RankWatchdog:
        allow_open_files()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        # without an address `join_job` raises an error
        if self.world_size > 1 and all(map(os.environ.get, ("MASTER_ADDR", "MASTER_PORT"))):
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
        in_good_order = error is None or (isinstance(error, SystemExit) and not error.code)
        unexplained = isinstance(error, Exception) and not isinstance(error, UserError)
        if unexplained and self._links:  # most likely a collective failed because a rank was lost
            with sigterm_ignored():  # sent by the launcher of the host, while this rank is about to print the reason
                # a loss that is known is about to be told, on a busy machine too
                if self._verdict.wait(HEARSAY) or (self._lost and self._verdict.wait(PATIENCE)):
                    self._end_process()
        status = exit_status(error) or 1
        if in_good_order:
            self._tell({"over": True})
        elif self.rank:
            self._tell({"failed": reason(error), "status": status})
        else:
            self._tell({"end": f"{self._describe([self.rank])} failed: {reason(error)}", "status": status})
        self._closing.set()
        self._wake.close()
        self._thread.join()
        if self._listener is not None:
            self._listener.close()
        for sock in (self._woken, *(link.socket for link in self._links.values())):
            sock.close()
        self._selector.close()
        return False

    def _connect(self) -> None:
        """Rank 0 listens; the others find its port and the job's token in the store, connect, and show the token."""
        self._store = store_of_the_job(self.rank, self.world_size)
        key = key_of_this_start()
        if self.rank == 0:
            server = listen_for_ranks(0, self.world_size)
            self._listener = Listener(server, self._selector, Link, STRANGERS + self.world_size, INTRODUCTION)
            self._token = secrets.token_hex(16)
            about = {"port": self._listener.port, "token": self._token, "host": socket.gethostname()}
            self._store.set(key, json.dumps(about))
            return
        about, address = json.loads(self._store.get(key)), os.environ["MASTER_ADDR"]
        try:
            link = Link(socket.create_connection((address, about["port"]), timeout=KEEPALIVE_IDLE))
        except OSError as error:
            raise UserError(
                f"no connection to rank 0 at {address}, TCP port {about['port']} ({error}): the hosts of a job "
                f"must reach each other on all unprivileged ports"
            ) from None
        link.rank, link.host = 0, about["host"]
        link.send({"rank": self.rank, "token": about["token"], "host": socket.gethostname()})
        self._links[0] = link
        self._selector.register(link.socket, selectors.EVENT_READ, link)

    def _wait_for_all(self) -> None:
        """Rank 0 waits until every rank has connected, so that an early failure is reported to all.

        Raises:
            UserError: some ranks did not connect; the message names them.
        """
        if self._awaited() and not self._all_here.wait(timeout := start_timeout()):
            raise UserError(
                f"{name_ranks(self._awaited())} of {self.world_size} did not start within {timeout / 60:g} minutes "
                f"(DEEPSPEED_TIMEOUT): look for messages of those hosts above, and whether ssh reaches them"
            )

    def _watch(self) -> None:
        """Body of the watchdog thread: wait for messages, and check the clock every second."""
        said_at = time.monotonic()
        while not self._closing.is_set():
            for key, _ in self._selector.select(SETTLE):
                if isinstance(key.data, Listener):
                    key.data.accept()
                elif isinstance(key.data, Link):
                    self._hear(key.data)
            if self._listener is not None:
                self._listener.tick()
            now, awaited = time.monotonic(), self._awaited()
            if self._verdict.is_set():
                # ranks that still start would not find rank 0
                if now - self._known_at >= (PATIENCE if awaited else GRACE):
                    self._end_process()
                    return
            elif self._lost:
                if now - self._known_at >= SETTLE:
                    self._conclude()
            elif awaited and now - said_at >= PATIENCE:
                said_at = now
                self._say(f"still waiting for {name_ranks(awaited)} of {self.world_size} to start")
            elif hang := self._hangs.tick(now):
                what = hang.describe(name_ranks, self._describe)
                self._finish(f"{what}. {in_time(self._remedy, SETTLE)}", HANG, alone=0 in hang.late)

    def _awaited(self) -> list[int]:
        """Ranks that have not connected to rank 0 yet."""
        if self._listener is None:
            return []
        return [rank for rank in range(1, self.world_size) if rank not in self._links]

    def _hear(self, link: Link) -> None:
        """Read from a connection. Whatever comes, it ends nothing but this connection."""
        try:
            for message in link.receive():
                if link.rank is not None:
                    self._obey(link.rank, message)
                elif not self._greet(link, message):
                    raise ValueError("not a rank of this job")
        except (OSError, ValueError, LookupError) as error:
            if link.rank is None:
                assert self._listener is not None
                self._listener.dismiss(link)
                return
            self._selector.unregister(link.socket)
            if link.rank not in self._over:
                self._known_at = self._known_at or time.monotonic()
                self._lost.setdefault(link, how_lost(error))

    def _obey(self, rank: int, message: Message) -> None:
        if "over" in message:
            self._over.add(rank)
        elif "failed" in message:
            self._finish(f"{self._describe([rank])} failed: {message['failed']}", status_in(message))
        elif "end" in message:
            self._finish(str(message["end"]), status_in(message), alone="alone" in message)
        else:
            self._hangs.hear(rank, message, time.monotonic())

    def _greet(self, link: Link, message: Message) -> bool:
        """Whether the connection is from a rank of this job, and the first of that rank."""
        assert self._listener is not None
        rank, token = message.get("rank"), str(message.get("token"))
        if not hmac.compare_digest(token.encode(errors="replace"), self._token.encode()):
            return False
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < self.world_size:
            return False
        if rank in self._links:
            port = os.environ["MASTER_PORT"]
            there = f"{self._describe([rank])} has already joined: does another job use --master_port {port}?"
            link.send({"end": there, "status": UserError.status, "alone": True})
            return False
        self._listener.admit(link)
        link.rank, link.host = rank, str(message.get("host"))
        self._links[rank] = link
        if self._verdict.is_set():
            link.send({"end": self.message, "status": self._status})
        if not self._awaited():
            self._all_here.set()
        return True

    def _conclude(self) -> None:
        """Report the lost ranks."""
        how = next(iter(self._lost.values()))
        lost = sorted(link.rank for link in self._lost if link.rank is not None)
        were = "was" if len(lost) == 1 else "were"
        message = f"{self._describe(lost)} {were} lost: {how}. {in_time(self._remedy, SETTLE)}"
        self._finish(message, RESUMABLE, alone=0 in lost)

    def _finish(self, message: str, status: int, alone: bool = False) -> None:
        """End the job; `alone`: print the message, since no other rank of this host may have received it."""
        if self._verdict.is_set():
            return
        self.message, self._status, self._known_at = message[:_MOST_TEXT], status, time.monotonic()
        if self.rank == 0:
            self._tell({"end": self.message, "status": status})
        if status == HANG:  # the output may be on the disk that hangs
            in_any_case = threading.Timer(3 * GRACE, self._end, [status])
            in_any_case.daemon = True
            in_any_case.start()
        if self._local_rank == 0 or alone:  # once per host
            self._say(self.message)
        if status == HANG:
            self._say(f"process {os.getpid()} on host {socket.gethostname()}, all threads\n{stacks()}")
        self._verdict.set()

    def _tell(self, message: Message) -> None:
        """Send to all other ranks (rank 0), or to rank 0."""
        for link in list(self._links.values()):
            link.send(message)

    def _describe(self, lost: Iterable[int]) -> str:
        """Ranks with their hosts, as "rank 3 on host node2 (10.77.0.2)"."""
        by_host: dict[str, list[int]] = {}
        for rank in lost:
            link = self._links.get(rank)
            where = f"{link.host} ({link.address})" if link else f"{socket.gethostname()}"
            by_host.setdefault(where, []).append(rank)
        return ", ".join(f"{name_ranks(ranks)} on host {where}" for where, ranks in by_host.items())

    def _say(self, what: str) -> None:
        with suppress(OSError):  # the output may be closed
            # in one write, so that messages of several ranks do not mix
            line = f"watchdog (rank {self.rank} of {self.world_size}): {printable(what)}\n"
            print(line, end="", file=sys.stderr, flush=True)

    def _end_process(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        if self._status == HANG:
            resume_children()
        # not sys.exit: destructors of a process group with a lost member may wait for it
        self._end(self._status)
