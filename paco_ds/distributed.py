"""Ranks: who computes what, and the collectives between them, with every byte counted.

Everything here works with one process and no process group, so that the same code runs in a notebook.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from paco_ds.errors import RecipeError, UserError

# torch 2.14 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """A collective under way: what it makes is awaited where it is needed, and work goes on until then."""

    def __init__(self, result: Tensor, work: dist.Work | None = None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        """Its result, the same however often it is asked for."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


@dataclass
class Ranks:
    """This process among the ranks of a job; `group` None means a job of one."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    on_bytes: Callable[[str, int], None] = field(default=lambda op, count: None)
    """Called with (operation, bytes this rank sent to others) for every collective."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, vector: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return self.begin_sum(vector).wait()

    def begin_sum(self, vector: Tensor) -> Pending:
        """Begin a sum over ranks, in place."""
        return self.begin_sums([vector])[0]

    def begin_sums(self, tensors: Sequence[Tensor]) -> list[Pending]:
        """Begin the sum over ranks of each, in place. Ring all-reduce sends 2 (W-1)/W of them all."""
        if self.world_size == 1:
            return [Pending(tensor) for tensor in tensors]
        works = [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]
        both_ways = 2 * sum(tensor.nbytes for tensor in tensors)
        self.on_bytes("all_reduce", both_ways * (self.world_size - 1) // self.world_size)
        return [Pending(tensor, work) for tensor, work in zip(tensors, works, strict=True)]

    def gather(self, rows: Tensor) -> Tensor:
        """Equal-shaped tensors of all ranks, stacked: [...] -> [W, ...]."""
        return self.begin_gather(rows).wait()

    def begin_gather(self, rows: Tensor) -> Pending:
        """Begin a gathering of equal-shaped tensors of all ranks, stacked: [...] -> [W, ...]."""
        if self.world_size == 1:
            return Pending(rows[None])
        out = torch.empty((self.world_size * rows.numel(),), dtype=rows.dtype, device=rows.device)
        work = _all_gather(out, rows.contiguous().view(-1), group=self.group, async_op=True)
        self.on_bytes("all_gather", rows.nbytes * (self.world_size - 1))
        return Pending(out.view(self.world_size, *rows.shape), work)

    def begin_exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Begin an all-to-all of rows: the first send[0] go to rank 0, and so on; receive[r] come from rank r."""
        if self.world_size == 1:
            return Pending(rows)
        out = torch.empty((sum(receive), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        work = dist.all_to_all_single(
            out, rows.contiguous(), list(receive), list(send), group=self.group, async_op=True
        )
        row_bytes = rows[:1].nbytes if len(rows) else 0
        self.on_bytes("all_to_all", row_bytes * (sum(send) - send[self.rank]))
        return Pending(out, work)

    def gather_objects(self, value: Any) -> list[Any]:
        """Small host-side values of all ranks (addresses, lists of names); not for the training step."""
        if self.world_size == 1:
            return [value]
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, value, group=self.group)
        return out

    def wait_for_all(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.group)


@dataclass
class ByteCounter:
    """Bytes sent by this rank, by collective; for tests and planning."""

    sent: Counter[str] = field(default_factory=Counter)

    def __call__(self, op: str, count: int) -> None:
        self.sent[op] += count


@dataclass(frozen=True)
class MicroBatchLayout:
    """M micro-batches of m images on W ranks: rank j mod W runs micro-batch j.

    Micro-batches carry the meaning (BatchNorm, in-batch contrasts, lanes of the order); ranks only compute them.
    """

    micro_batch: int
    micro_batches: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        M, W = self.micro_batches, self.world_size
        if M % W:
            legal = ", ".join(str(w) for w in range(1, M + 1) if M % w == 0)
            raise RecipeError(
                f"{W} ranks cannot share step.micro_batches = {M} evenly; legal numbers of ranks: {legal}. "
                f"Or give each step more micro-batches (the learning rate is scaled with them): "
                f"--set step.micro_batches={(M // W + 1) * W}"
            )

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.micro_batches

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank runs in one optimizer step."""
        return self.micro_batches // self.world_size

    @property
    def own(self) -> range:
        """Micro-batches of this rank, in the order it runs them."""
        return self.owned_by(self.rank)

    def owned_by(self, rank: int) -> range:
        return range(rank, self.micro_batches, self.world_size)

    def lanes(self, micro_batch: int) -> range:
        """Lanes of the global batch that make up a micro-batch."""
        return range(micro_batch * self.micro_batch, (micro_batch + 1) * self.micro_batch)

    def global_order(self, gathered: Tensor) -> Tensor:
        """Rows gathered from all ranks, [W, A m, ...], each rank's in its own order -> [G, ...] in lane order."""
        W, A, m = self.world_size, self.accumulation, self.micro_batch
        rows = gathered.reshape(W, A, m, *gathered.shape[2:])
        return rows.transpose(0, 1).reshape(self.global_batch, *gathered.shape[2:])


def environment_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) as a launcher set them; (0, 1, 0) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Ranks of this job on this host, as a launcher set them (DeepSpeed's name, or torchrun's); all without one."""
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return next((int(size) for size in map(os.environ.get, names) if size), 1)


def join_job(threads: int | None, initialise: Callable[..., object] = dist.init_process_group) -> Ranks:
    """Join the job's process group: NCCL on CUDA, gloo on CPU, by the same code path. A job may have one rank.

    Args:
        threads: CPU threads of this rank; by default the host's cores shared by its ranks.
        initialise: called with the backend's name; DeepSpeed has its own.

    Raises:
        UserError: the environment promises several ranks, but does not say where to find them, or a launcher
            started several processes without telling which rank each is, or gloo could not be reached.
    """
    rank, world_size, local_rank = environment_ranks()
    if world_size == 1:
        _refuse_unnamed_ranks()
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({"MASTER_PORT": free_port()} | alone | os.environ)
    elif missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: launch with `deepspeed`, or set these "
            f"for every rank"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        on_host = local_world_size()
        if on_host < world_size:
            check_gloo_interface()
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // on_host))
    initialise("nccl" if cuda else "gloo")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Ranks(rank, world_size, local_rank, device, dist.group.WORLD)


def check_gloo_interface() -> None:
    """gloo announces one address of this host to the others; make sure that it means something there.

    Raises:
        UserError: GLOO_SOCKET_IFNAME names no interface of this host, or the address is a loopback address.
    """
    host, names = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME", "")
    interfaces = {
        name: [a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
    }
    usable = [f"{name} ({a[0]})" for name, a in interfaces.items() if a and not _is_loopback(a[0])]
    remedy = (
        f"Name the one that reaches the other hosts by a line GLOO_SOCKET_IFNAME=NAME in .deepspeed_env, in the "
        f"working or home folder of the host you launch from; {host} has {', '.join(usable) or 'none'}"
    )
    if names:
        for name in names.split(","):
            if not interfaces.get(name):
                raise UserError(f"GLOO_SOCKET_IFNAME={names}: no interface {name} with an address on {host}. {remedy}")
        announced = [interfaces[name][0] for name in names.split(",")]
    else:
        announced = [_address_of_host_name(host)]
    if loopback := [address for address in announced if _is_loopback(address)]:
        what = f"GLOO_SOCKET_IFNAME={names}" if names else f"GLOO_SOCKET_IFNAME is not set and the host name {host}"
        raise UserError(
            f"gloo would announce {loopback[0]} to the other hosts, where it means themselves: {what} stands for it. "
            f"{remedy}"
        )


def _address_of_host_name(host: str) -> str:
    """The address gloo takes by itself: the first that the host name stands for and that is this host's own."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    for family, kind, _, _, address in found:
        with suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return str(address[0])
    return "127.0.0.1"


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _refuse_unnamed_ranks() -> None:
    """Else each of these processes would think that it was alone, and all would write the same run."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if "WORLD_SIZE" not in os.environ and int(os.environ.get(name, 1)) > 1:
            raise UserError(
                f"{name} is {os.environ[name]}, but WORLD_SIZE is not set: this launcher starts several processes "
                f"without telling which rank each is. Set RANK, LOCAL_RANK, LOCAL_SIZE, WORLD_SIZE, MASTER_ADDR and "
                f"MASTER_PORT for each (docs/cluster.md shows how under Slurm), or WORLD_SIZE=1 to have one rank"
            )


def leave_job() -> None:
    """Leave the process group; without this a rank in a dozen ends with an error."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> str:
    """A port of this host that is free for the moment, as MASTER_PORT wants it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
