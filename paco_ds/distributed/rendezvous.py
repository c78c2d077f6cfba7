"""How the ranks of a job find rank 0: the job's store, and where rank 0 listens."""

from __future__ import annotations

import errno
import os
import socket
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from paco_ds.distributed.launch import environment_int, job_port
from paco_ds.distributed.listener import listen
from paco_ds.errors import UserError

MINUTES_OF_A_YEAR = 365 * 24 * 60


def start_timeout() -> float:
    """Seconds to wait for ranks to start: DeepSpeed's setting, with its default; UserError if it is no number."""
    return 60.0 * environment_int("DEEPSPEED_TIMEOUT", 10, 1, MINUTES_OF_A_YEAR)


def on_one_host() -> bool:
    """Whether all ranks of the job are on this host, as its launcher says or as rank 0's address does."""
    launcher = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    return launcher == os.environ["WORLD_SIZE"] or os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")


def listen_for_ranks(port: int, world_size: int) -> socket.socket:
    """A socket of rank 0 for the other ranks: at MASTER_ADDR if all are on this host, else on all addresses, since the
    others may know this host by an address that it does not know.

    Raises:
        OSError: EADDRINUSE, or MASTER_ADDR is unknown.
    """
    backlog = max(128, world_size)
    if on_one_host():
        try:
            return listen(port, os.environ["MASTER_ADDR"], backlog)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # an address outside, which leads back here
                raise
    return listen(port, backlog=backlog)


def client_of_the_job(world_size: int) -> TCPStore:
    """Another connection of this process to the store of the job, which `store_of_the_job` has begun."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        job_port(),
        world_size,
        is_master=False,
        timeout=timedelta(seconds=start_timeout()),
        wait_for_workers=False,
    )


def key_of_this_start() -> str:
    """The key in the store under which rank 0 says where it listens; other entries of this start begin with it. A store
    that torchrun keeps has those of earlier starts too; where it makes one for each start, its agents count starts
    apart: one that lost no rank itself has not counted."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"paco_ds/rank_watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if kept else 0}"


def store_of_the_job(rank: int, world_size: int) -> TCPStore:
    """The store of the job, shared with torch's process group: a process has one server per port.

    Raises:
        UserError: rank 0 cannot serve it, or cannot be reached, or MASTER_PORT is no port.
    """
    address, port = os.environ["MASTER_ADDR"], job_port()
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    try:
        # torch would listen on all addresses
        listening = listen_for_ranks(port, world_size).detach() if serves else None
        return TCPStore(
            address,
            port,
            world_size,
            is_master=serves,
            timeout=timedelta(seconds=start_timeout()),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listening,
        )
    except (OSError, DistError) as error:
        remedy = "give another --master_port if another job uses this one"
        if rank:
            waited = f"waited {start_timeout() / 60:g} minutes, DEEPSPEED_TIMEOUT"
            remedy = f"look for rank 0's own message ({waited}), and whether this host can reach {address}"
        raise UserError(f"no store of the job at {address}, TCP port {port}: {remedy}. {error}") from None
