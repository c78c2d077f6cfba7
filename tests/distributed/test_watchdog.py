"""The rank watchdog's talk between ranks, in one process: real sockets and store, ends that are only noted."""

import json
import os
import random
import socket
import threading
import time
from contextlib import ExitStack, suppress
from unittest.mock import patch

import pytest

from paco_ds.distributed import rendezvous, watchdog
from paco_ds.distributed.launch import check_gloo_interface, join_job
from paco_ds.distributed.watchdog import RankWatchdog
from paco_ds.errors import RESUMABLE, StorageError, UserError
from tests.pool import _free_port


class Job:
    """Watchdogs of W ranks, two on each host; `ends` are the (rank, status) that would have ended.

    Args:
        settle: seconds in which all ranks that a test kills must be seen to be gone, on a busy machine too.
    """

    def __init__(self, monkeypatch, world_size=4, started=None, settle=0.3):
        monkeypatch.setattr(watchdog, "SETTLE", settle)
        monkeypatch.setattr(watchdog, "HEARSAY", 300.0)
        monkeypatch.setattr(watchdog, "GRACE", 0.2)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(_free_port()))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        self.ends, self.watchdogs, self.errors = [], [], []
        for rank in range(world_size if started is None else started):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
            end = lambda status, rank=rank: self.ends.append((rank, status))  # noqa: E731
            self.watchdogs.append(RankWatchdog(lambda: "Go on from step 7", end))
        self.starts = [threading.Thread(target=self._enter, args=(each,)) for each in self.watchdogs]
        for start in self.starts:
            start.start()
        for start in self.starts[0 if started is None else 1 :]:  # rank 0 waits for all
            start.join()

    def _enter(self, watchdog):
        try:
            watchdog.__enter__()
        except UserError as error:
            self.errors.append(str(error))

    def kill(self, rank):
        """What the kernel does with the connections of a process that is gone."""
        for link in self.watchdogs[rank]._links.values():
            link.socket.shutdown(socket.SHUT_RDWR)

    def close(self, *ranks):
        for rank in ranks or range(len(self.watchdogs)):
            self.watchdogs[rank].__exit__(None, None, None)


def eventually(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


def test_a_job_that_ends_in_good_order_ends_nobody(monkeypatch, capfd):
    """Whatever the order in which ranks leave; all threads are gone afterwards."""
    threads = threading.active_count()
    job = Job(monkeypatch)
    job.close(2, 0, 3, 1)
    time.sleep(0.6)
    assert job.ends == []
    assert capfd.readouterr().err == ""
    eventually(lambda: threading.active_count() <= threads + 1)  # torch's store


def test_one_rank_listens_to_nobody(monkeypatch):
    """It watches itself."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    with RankWatchdog() as watchdog:
        assert watchdog._listener is None
    assert not watchdog._thread.is_alive()


def test_a_lost_rank_ends_all_others_and_is_named_once_a_host(monkeypatch, capfd):
    """With host, address, and what to do."""
    job = Job(monkeypatch)
    job.kill(3)
    eventually(lambda: {(rank, RESUMABLE) for rank in (0, 1, 2)} <= set(job.ends))
    said = [line for line in capfd.readouterr().err.splitlines() if "was lost" in line and "rank 3 on" in line]
    assert [line.split(":")[0] for line in sorted(said)] == [f"watchdog (rank {rank} of 4)" for rank in (0, 2)]
    assert f"rank 3 on host {socket.gethostname()} (127.0.0.1) was lost: its process died" in said[0]
    assert said[0].endswith("Go on from step 7")


def test_ranks_lost_together_are_named_together(monkeypatch, capfd):
    """A host takes all of its ranks along."""
    job = Job(monkeypatch, settle=3.0)
    job.kill(2)
    job.kill(3)
    eventually(lambda: {(0, RESUMABLE), (1, RESUMABLE)} <= set(job.ends))
    assert f"ranks 2-3 on host {socket.gethostname()} (127.0.0.1) were lost" in capfd.readouterr().err


def test_the_loss_of_rank_0_is_seen_by_every_other(monkeypatch, capfd):
    """Nobody is left to tell them."""
    job = Job(monkeypatch)
    job.kill(0)
    eventually(lambda: {(rank, RESUMABLE) for rank in (1, 2, 3)} <= set(job.ends))
    assert f"rank 0 on host {socket.gethostname()} (127.0.0.1) was lost" in capfd.readouterr().err


@pytest.mark.parametrize(("culprit", "error"), [(0, UserError("no shards")), (3, StorageError("disk is full"))])
def test_a_rank_that_fails_gives_its_reason_and_status_to_all(monkeypatch, capfd, culprit, error):
    """So that the job has one status, whichever rank its launcher asks."""
    job = Job(monkeypatch)
    job.watchdogs[culprit].__exit__(type(error), error, None)
    others = {(rank, error.status) for rank in range(4) if rank != culprit}
    eventually(lambda: others <= set(job.ends))
    assert f"rank {culprit} on host" in (said := capfd.readouterr().err)
    assert f"failed: {type(error).__name__}: {error}" in said
    assert "lost" not in said


def test_a_collective_that_fails_because_of_a_loss_is_explained_by_it(monkeypatch):
    """gloo's own error names nobody; the rank waits for the verdict instead of showing it."""
    job = Job(monkeypatch)
    monkeypatch.setattr(watchdog, "GRACE", 60.0)
    job.kill(3)
    error = RuntimeError("Connection closed by peer")
    job.watchdogs[1].__exit__(RuntimeError, error, None)
    assert job.ends == [(1, RESUMABLE)]
    job.close(0, 2)


def test_a_loss_that_is_known_is_waited_for(monkeypatch):
    """However late on a busy machine: the rank that saw it has no one else to hear it from."""
    job = Job(monkeypatch, world_size=2, settle=2.0)
    monkeypatch.setattr(watchdog, "GRACE", 60.0)
    monkeypatch.setattr(watchdog, "HEARSAY", 0.01)
    job.kill(1)
    eventually(lambda: job.watchdogs[0]._lost)
    error = RuntimeError("Connection closed by peer")
    job.watchdogs[0].__exit__(RuntimeError, error, None)
    assert job.ends == [(0, RESUMABLE)]
    job.close(1)


def test_another_job_on_the_same_port_ends_nobody_but_itself(monkeypatch, capfd):
    """With the setting to change."""
    job = Job(monkeypatch, world_size=2)
    monkeypatch.setenv("RANK", "1")
    double = RankWatchdog(end=lambda status: job.ends.append(("double", status))).__enter__()
    eventually(lambda: job.ends == [("double", UserError.status)])
    assert "has already joined: does another job use --master_port" in capfd.readouterr().err
    double.__exit__(UserError, UserError("sent away"), None)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"TCP port \d+: give another --master_port if another job uses this one"):
        listen_for_another_job()
    time.sleep(0.6)
    assert job.ends == [("double", UserError.status)]
    job.close()


def listen_for_another_job():
    """What rank 0 of another job meets: in this process, torch would share the store of the first."""
    with patch.object(rendezvous, "TCPStore", side_effect=AssertionError("it listens")):
        rendezvous.store_of_the_job(0, 2)


def strangers(seed, token):
    """What is sent to the watchdog's port by who does not know the token, or knows nothing else."""
    rng = random.Random(seed)
    yield from (
        b"GET / HTTP/1.1\n",
        b'{"rank": 1, "token": "guessed"}\n{"failed": "ha", "status": 1}\n',
        b"[1]\n",
        b"\n",
    )
    yield b"[" * 100_000 + b"\n"
    yield b'{"rank":' * 100_000
    yield b'{"token": "' + b"x" * 10_000_000 + b'"}\n'
    yield b'{"token": "\\ud800", "rank": ' + b"9" * 900 + b"}\n"
    for rank in (0, 2, -1, True, 1.5, "1", None, [1], 10**300):
        yield json.dumps({"rank": rank, "token": token}).encode() + b"\n"
    for _ in range(100):
        message = {"rank": 1, "token": token, "host": "h"}
        del message[rng.choice(["rank", "token"])]
        line = bytearray(json.dumps(message).encode() + b"\n")
        for _ in range(rng.randrange(4)):
            line[rng.randrange(len(line))] = rng.randrange(256)
        yield bytes(line) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 2000))


def test_strangers_are_sent_away_and_a_loss_is_still_seen(monkeypatch, capfd):
    """Whatever they send, and though others hold all the connections they can get."""
    monkeypatch.setattr(watchdog, "STRANGERS", 8)
    job = Job(monkeypatch, world_size=2)
    port, thread = job.watchdogs[0]._listener.port, job.watchdogs[0]._thread
    with ExitStack() as stack:
        for sent in strangers(3, job.watchdogs[0]._token):
            with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(OSError):
                stranger.sendall(sent)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(10) == b""
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(50)]
        idle[0].settimeout(300)
        assert idle[0].recv(10) == b""
        assert thread.is_alive()
        assert job.ends == []
        job.kill(1)
        eventually(lambda: (0, RESUMABLE) in job.ends)
    assert "rank 1 on host" in (said := capfd.readouterr().err)
    assert "Traceback" not in said
    job.close(1)


@pytest.mark.parametrize("sent", [b"[" * 200_000, b'{"failed": "x"}\n', b'{"where": true}\n', b"\xff\n"])
def test_a_rank_that_sends_what_no_rank_sends_is_lost(monkeypatch, capfd, sent):
    """By name; the thread goes on."""
    job = Job(monkeypatch, world_size=2)
    with suppress(OSError):
        job.watchdogs[1]._links[0].socket.setblocking(True)
        job.watchdogs[1]._links[0].socket.sendall(sent)
    eventually(lambda: (0, RESUMABLE) in job.ends)
    assert "was lost: it sent what no rank sends" in capfd.readouterr().err
    job.close(1)


def test_the_ranks_of_one_host_are_not_found_from_others(monkeypatch):
    """Store and watchdog listen at the address of the job alone."""
    job = Job(monkeypatch, world_size=2)
    for port in (int(os.environ["MASTER_PORT"]), job.watchdogs[0]._listener.port):
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
    job.close()


@pytest.mark.parametrize(
    ("address", "on_host", "alone"),
    [("127.0.0.1", None, True), ("node1", "2", True), ("node1", "1", False), ("node1", None, False)],
)
def test_all_ranks_are_on_one_host_if_the_launcher_or_the_address_says_so(monkeypatch, address, on_host, alone):
    """Otherwise rank 0 listens on all addresses."""
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if on_host:
        monkeypatch.setenv("LOCAL_SIZE", on_host)
    assert rendezvous.on_one_host() == alone


def test_ranks_find_each_other_however_often_their_agents_have_restarted(monkeypatch):
    """torchrun's agents count restarts apart, which matters only where the store has entries of earlier ones."""

    def key(count, kept):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(kept))
        return rendezvous.key_of_this_start()

    assert key(0, kept=False) == key(1, kept=False)
    assert key(0, kept=True) != key(1, kept=True)


def test_ranks_that_do_not_come_are_named(monkeypatch):
    """First while they are waited for, then as the reason for which the job ends."""
    said, wait_for_all = [], RankWatchdog._wait_for_all

    def time_out_once_it_was_said(self):
        if self.rank == 0:
            eventually(lambda: "still waiting for ranks 2-8 of 9 to start" in said)
            monkeypatch.setattr(watchdog, "start_timeout", lambda: 0.6)
        wait_for_all(self)

    monkeypatch.setattr(RankWatchdog, "_say", lambda self, line: said.append(line))
    monkeypatch.setattr(RankWatchdog, "_wait_for_all", time_out_once_it_was_said)
    monkeypatch.setattr(watchdog, "PATIENCE", 0.4)
    job = Job(monkeypatch, world_size=9, started=2)
    job.starts[0].join()
    assert job.errors[0].startswith("ranks 2-8 of 9 did not start within 0.01 minutes (DEEPSPEED_TIMEOUT)")
    eventually(lambda: job.ends == [(1, 2)])
    job.close(1)


def test_a_rank_that_comes_when_all_is_over_is_told(monkeypatch):
    """Else it would look for rank 0 for ten minutes."""
    monkeypatch.setattr(watchdog, "PATIENCE", 300.0)
    job = Job(monkeypatch, world_size=3, started=2)
    job.watchdogs[1].__exit__(UserError, UserError("no shards here"), None)
    eventually(job.watchdogs[0]._verdict.is_set)
    time.sleep(0.6)
    assert job.ends == []  # rank 0 stays for the third
    monkeypatch.setenv("RANK", "2")
    late = RankWatchdog(end=lambda status: job.ends.append((2, status))).__enter__()
    eventually(lambda: sorted(set(job.ends)) == [(0, 2), (2, 2)])
    late.__exit__(None, None, None)
    job.close(0)


def test_a_thousand_ranks(monkeypatch, capfd):
    """Rank 0 holds a connection to each; the loss of a host of 8 is one line."""
    job = Job(monkeypatch, world_size=1024, started=1, settle=3.0)
    first = job.watchdogs[0]
    eventually(lambda: hasattr(first, "_token"))
    port = first._listener.port
    with ExitStack() as stack:
        others = {}
        for rank in range(1, 1024):
            others[rank] = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            about = {"rank": rank, "token": first._token, "host": f"node{rank // 8}"}
            others[rank].sendall(json.dumps(about).encode() + b"\n")
        job.starts[0].join()
        for rank in range(800, 808):
            others[rank].close()
        eventually(lambda: job.ends)
        assert job.ends == [(0, RESUMABLE)]
        assert "ranks 800-807 on host node100 (127.0.0.1) were lost" in capfd.readouterr().err
        assert b'"end"' in others[1].recv(1000)
    job.close()


def test_gloo_is_not_let_announce_a_loopback_address(monkeypatch):
    """The other hosts would look for this one on themselves."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(
        UserError, match=r"gloo would announce 127.0.0.1 .*GLOO_SOCKET_IFNAME=lo gives it.*deepspeed_env"
    ):
        check_gloo_interface()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME is not set and the host name localhost gives it"):
        check_gloo_interface()
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(UserError, match=r"gloo would announce 127.0.0.1"):
        check_gloo_interface()


def test_a_mistyped_interface_is_refused_with_those_there_are(monkeypatch):
    """By name."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "etho0")
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=etho0: no interface etho0 with an address on .* has "):
        check_gloo_interface()


def test_tasks_of_a_launcher_that_names_no_ranks_are_refused(monkeypatch):
    """Else each would train alone, in the same folder."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS is 16, but WORLD_SIZE is not set"):
        join_job(threads=1)
