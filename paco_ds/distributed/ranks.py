"""Ranks: which micro-batches each computes, and collectives that count their bytes.

Everything works with one process and no process group, so that the same code runs in a notebook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paco_ds.errors import RecipeError

# torch 2.14 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """An asynchronous collective: `wait` for its result where it is needed.

    Args:
        kept: tensors that are read until then.
    """

    def __init__(self, result: Tensor, *works: dist.Work | None, kept: Sequence[Tensor] = ()) -> None:
        self._result, self._works, self._kept = result, works, kept

    def wait(self) -> Tensor:
        """The result; may be called repeatedly."""
        for work in filter(None, self._works):
            work.wait()
        self._works, self._kept = (), ()
        return self._result


class HostCopy:
    """A tensor on its way to the host, behind the work that makes it: nobody waits for the device before `wait`."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = tensor.clone()

    def wait(self) -> Tensor:
        """The tensor on the host; may be called repeatedly."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._host


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. From page-locked memory, so that the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
        """Begin a sum over ranks, in place. Ring all-reduce sends 2 (W-1)/W of the vector."""
        if self.world_size == 1:
            return Pending(vector)
        work = dist.all_reduce(vector, group=self.group, async_op=True)
        self.on_bytes("all_reduce", 2 * vector.nbytes * (self.world_size - 1) // self.world_size)
        return Pending(vector, work)

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

    def begin_exchange(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], *, among_peers: bool = False
    ) -> Pending:
        """Begin an all-to-all of rows: the first send[0] go to rank 0, and so on; receive[r] come from rank r.

        Args:
            among_peers: by sends and receives between ranks that have rows for each other. NCCL's all-to-all connects
                every rank with every other, even for no bytes. The same on all ranks.
        """
        if self.world_size == 1:
            return Pending(rows)
        rows = rows.contiguous()
        out = torch.empty((sum(receive), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        row_bytes = rows[:1].nbytes if len(rows) else 0
        op = "send_receive" if among_peers else "all_to_all"
        self.on_bytes(op, row_bytes * (sum(send) - send[self.rank]))
        if among_peers:
            return Pending(out, *self._send_and_receive(rows, out, send, receive), kept=[rows])
        return Pending(
            out, dist.all_to_all_single(out, rows, list(receive), list(send), group=self.group, async_op=True)
        )

    def _send_and_receive(
        self, rows: Tensor, out: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> list[dist.Work]:
        outgoing, arriving = rows.split(list(send)), out.split(list(receive))
        arriving[self.rank].copy_(outgoing[self.rank])
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        transfers = [
            dist.P2POp(op, parts[rank], group=self.group, group_peer=rank)
            for op, parts in ((dist.isend, outgoing), (dist.irecv, arriving))
            for rank in others
            if len(parts[rank])
        ]
        return list(dist.batch_isend_irecv(transfers)) if transfers else []

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


class SharedFlag:
    """A flag that is up on all ranks once it was up on one of them, each at the same call.

    A call is a collective that nobody waits for: it learns what was so at the call before.

    Args:
        raised: whether this rank raises it.
    """

    def __init__(self, ranks: Ranks, raised: Callable[[], bool]) -> None:
        self._ranks, self._raised = ranks, raised
        self._asked: Pending | None = None

    def __call__(self) -> bool:
        before = self._asked
        self._asked = self._ranks.begin_sum(torch.tensor(int(self._raised()), device=self._ranks.device))
        return before is not None and bool(before.wait().item())


@dataclass
class ByteCounter:
    """Bytes sent by this rank, by collective; for tests and planning."""

    sent: Counter[str] = field(default_factory=Counter)

    def __call__(self, op: str, count: int) -> None:
        self.sent[op] += count


def legal_world_sizes(micro_batches: int) -> tuple[int, ...]:
    """Numbers of ranks that can share the micro-batches of a step evenly, ascending."""
    return tuple(ranks for ranks in range(1, micro_batches + 1) if micro_batches % ranks == 0)


@dataclass(frozen=True)
class MicroBatchLayout:
    """M micro-batches of m images on W ranks: rank j mod W runs micro-batch j.

    Results depend on the micro-batches (BatchNorm, in-batch contrasts, batch slots), not on the number of ranks.
    """

    micro_batch: int
    micro_batches: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        M, W = self.micro_batches, self.world_size
        if M % W:
            legal = ", ".join(map(str, legal_world_sizes(M)))
            raise RecipeError(
                f"{W} ranks cannot share step.micro_batches = {M} evenly; legal numbers of ranks: {legal}. "
                f"Or use more micro-batches per step (the learning rate is scaled with them): "
                f"--set step.micro_batches={(M // W + 1) * W}"
            )

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.micro_batches

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in one optimizer step."""
        return self.micro_batches // self.world_size

    @property
    def own(self) -> range:
        """Micro-batches of this rank, in the order it runs them."""
        return self.owned_by(self.rank)

    def owned_by(self, rank: int) -> range:
        return range(rank, self.micro_batches, self.world_size)

    def slots(self, micro_batch: int) -> range:
        """Batch slots of a micro-batch."""
        return range(micro_batch * self.micro_batch, (micro_batch + 1) * self.micro_batch)

    def global_order(self, gathered: Tensor) -> Tensor:
        """Rows gathered from all ranks, [W, A m, ...], in each rank's order -> [G, ...] in the order of batch slots."""
        W, A, m = self.world_size, self.accumulation, self.micro_batch
        rows = gathered.reshape(W, A, m, *gathered.shape[2:])
        return rows.transpose(0, 1).reshape(self.global_batch, *gathered.shape[2:])
