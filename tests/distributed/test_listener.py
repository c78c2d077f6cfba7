"""A listener's visitors: few, each for seconds, and never a reason to stop listening."""

from __future__ import annotations

import os
import resource
import selectors
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from paco_ds.distributed.listener import OPEN_FILES, Listener, allow_open_files, listen


class Guest:
    """A connection and nothing else."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Of at most two visitors."""
    made = Listener(listen(0, "127.0.0.1"), selectors.DefaultSelector(), Guest, most=2, patience=3600.0)
    yield made
    made.close()


def turn(listener: Listener, seconds: float = 0.0) -> list[Guest]:
    """One turn of the selector's loop; the visitors that have something to say."""
    speaking = []
    for key, _ in listener._selector.select(seconds):
        if key.data is listener:
            listener.accept()
        else:
            speaking.append(key.data)
    return speaking


def visit(listener: Listener, stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", listener.port), timeout=60))


def test_the_oldest_visitor_makes_room_for_the_newest(listener: Listener) -> None:
    """But not one that was admitted."""
    with ExitStack() as stack:
        known = visit(listener, stack)
        turn(listener, 60)
        known.send(b"x")
        (guest,) = turn(listener, 60)
        listener.admit(guest)
        guest.socket.recv(1)
        visitors = []
        for _ in range(3):
            visitors.append(visit(listener, stack))
            turn(listener, 60)
        assert visitors[0].recv(1) == b""
        for still_here in (known, *visitors[1:]):
            still_here.setblocking(False)
            with pytest.raises(BlockingIOError):
                still_here.recv(1)


def test_a_visitor_that_says_nothing_goes_after_its_time(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next tick."""
    with ExitStack() as stack:
        silent = visit(listener, stack)
        turn(listener, 60)
        listener.tick()
        assert len(listener._visitors) == 1
        monkeypatch.setattr(listener, "_patience", -1.0)
        listener.tick()
        assert silent.recv(1) == b""


def take_all_descriptors() -> Iterator[int]:
    with suppress(OSError):
        while True:
            yield os.open("/dev/null", os.O_RDONLY)


@pytest.mark.parametrize("visitors", [0, 1])
def test_without_a_free_descriptor_it_listens_on_afterwards(listener: Listener, visitors: int) -> None:
    """The oldest visitor's is used, or connections wait until there is one; the selector is not kept busy."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        for _ in range(visitors):
            visit(listener, stack)
            turn(listener, 60)
        client = stack.enter_context(socket.socket())
        highest = max(int(number) for number in os.listdir("/proc/self/fd"))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
            taken = list(take_all_descriptors())
            client.connect(("127.0.0.1", listener.port))
            turn(listener, 60)
            assert turn(listener, 0.1) == []
            assert len(listener._visitors) == (1 if visitors else 0)
            assert listener._paused == (not visitors)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for number in taken:
                os.close(number)
        listener.tick()
        turn(listener, 0.1)
        assert len(listener._visitors) == 1
        client.send(b"x")
        assert len(turn(listener, 60)) == 1


def test_a_port_is_listened_on_by_ipv4_and_ipv6_or_at_one_address() -> None:
    """Who listens on one address is not found at another."""
    with listen(0) as everywhere, listen(0, "127.0.0.1") as here:
        for address in ("127.0.0.1", "127.0.0.2", "::1"):
            socket.create_connection((address, everywhere.getsockname()[1]), timeout=60).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", here.getsockname()[1]), timeout=60)
        with pytest.raises(OSError, match="in use"):
            listen(everywhere.getsockname()[1])


def test_open_files_are_allowed_up_to_the_hard_limit() -> None:
    """And never fewer than before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(OPEN_FILES, hard), hard)
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(OPEN_FILES, hard), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
