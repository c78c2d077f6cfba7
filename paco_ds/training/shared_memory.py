"""The mean over ranks of one host through memory that they share.

gloo sends through sockets, and the kernel copies each byte in and out. Here each rank writes its numbers once, averages
its share of everybody's, and reads what the others averaged (tools/bench/gradients.py compares). DeepSpeed's collective
in shared memory waits in a loop that never ends where a rank does not come; this one waits at a socket, which wakes
when the process at its other end dies, and gives up in time.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from paco_ds.distributed.ranks import Ranks

CHUNK = 2**19  # numbers: few meetings, and yet few ranks find in the cache what the others wrote
_BUFFERS = 2  # of what ranks wrote, and of their means: one is filled while the other is read
_FLOAT = torch.float32.itemsize
_MESSAGE = struct.Struct("<q")


class NoSharedMemoryError(Exception):
    """A rank cannot share memory with the others. Every rank raises it."""


def shared_bytes(world_size: int) -> int:
    """Bytes that the ranks of a host share, once for all of them."""
    return _BUFFERS * (world_size + 1) * CHUNK * _FLOAT


def resident_bytes(world_size: int, numbers: int) -> int:
    """Bytes of them that become resident in a rank by a mean of so many numbers: its row, the means, its share of the
    other rows."""
    return int(min(numbers, _BUFFERS * CHUNK) * _FLOAT * (3 - 1 / world_size)) if world_size > 1 else 0


class SharedMemoryMean:
    """Mean of float32 tensors over the ranks of a host, in place.

    All meet before each stage of a call. In stage k each rank writes chunk k, averages its share of chunk k - 1 and
    reads chunk k - 2: between the last reading of a buffer and its next filling lies a meeting, from one call to the
    next too. A number is averaged by one rank, so that all ranks have the same to the bit.

    Made and called by all ranks of a job together, two or more. (A child forked without exec would keep the socket of a
    dead rank open; the processes of the loaders come from a fork server.)

    Args:
        timeout: seconds to wait for another rank.

    Raises:
        NoSharedMemoryError: with the reason of the first rank that has one.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self._rank, self._world_size, self._timeout = ranks.rank, ranks.world_size, timeout
        self._links: dict[int, socket.socket] = {}  # rank 0's to every other rank, and theirs to rank 0
        with ExitStack() as stack:
            offer = _attempt(_Offer, stack, self._world_size) if ranks.first else None
            address = _agree(ranks, offer.address if isinstance(offer, _Offer) else offer)[0]
            with ExitStack() as failed:
                failed.callback(self.close)
                _agree(ranks, None if offer else _attempt(self._connect, address))  # else rank 0 would wait in vain
                memory = _attempt(self._give if offer else self._take, offer)
                _agree(ranks, memory if isinstance(memory, Exception) else None)
                failed.pop_all()
        rows = torch.frombuffer(memory, dtype=torch.float32).view(_BUFFERS, self._world_size + 1, CHUNK)
        self._written, self._means = rows[:, :-1], rows[:, -1]

    def close(self) -> None:
        """Wake the ranks that wait for this one. They raise, and so does every further call."""
        for link in self._links.values():
            link.close()

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Replace flat tensors by their means; every rank gives as many, of the same lengths, in the same order.

        Raises:
            ConnectionError: another rank has ended, or gave up.
            TimeoutError: another rank did not come.
            ValueError: a tensor is not float32, or ranks do not give as many numbers.
        """
        if other := {tensor.dtype for tensor in tensors} - {torch.float32}:
            raise ValueError(f"means in shared memory are of float32, not of {other}")
        chunks, numbers = list(_chunks(tensors)), sum(map(len, tensors))
        for stage in range(len(chunks) + 2):
            self._meet(numbers)
            if stage < len(chunks):
                row = self._written[stage % _BUFFERS, self._rank]
                for place, part in chunks[stage]:
                    row[place].copy_(part)
            if 0 < stage <= len(chunks):
                self._average((stage - 1) % _BUFFERS, chunks[stage - 1][-1][0].stop)
            if stage > 1:
                means = self._means[(stage - 2) % _BUFFERS]
                for place, part in chunks[stage - 2]:
                    part.copy_(means[place])

    def _average(self, buffer: int, length: int) -> None:
        share = slice(length * self._rank // self._world_size, length * (self._rank + 1) // self._world_size)
        first, second, *others = self._written[buffer, :, share]
        mean = torch.add(first, second, out=self._means[buffer, share])  # twice as fast as torch.mean for two rows
        for row in others:
            mean.add_(row)
        mean.mul_(1 / self._world_size)

    def _meet(self, numbers: int) -> None:
        """Return once every rank has come to average as many numbers. Rank 0 hears of all, and then tells all."""
        peer = 0
        try:
            if self._rank:
                self._links[0].send(_MESSAGE.pack(numbers))
            for peer, link in self._links.items():
                if (theirs := _receive(link)) != numbers:
                    raise ValueError(
                        f"rank {peer} has {theirs} numbers to average and rank {self._rank} {numbers}: a parameter has "
                        f"a gradient on some ranks only"
                    )
            if not self._rank:
                for peer, link in self._links.items():  # noqa: B007  errors name it
                    link.send(_MESSAGE.pack(numbers))
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise TimeoutError(
                    f"rank {self._rank} waited {self._timeout:g} s (DEEPSPEED_TIMEOUT) to average gradients with rank "
                    f"{peer}, which did not come"
                ) from None
            if isinstance(error, OSError):
                raise ConnectionError(
                    f"rank {peer} ended, or gave up, while rank {self._rank} averaged gradients with it"
                ) from error
            raise

    def _connect(self, address: str) -> None:
        self._links[0] = link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.settimeout(self._timeout)
        link.connect(address)
        link.send(_MESSAGE.pack(self._rank))

    def _give(self, offer: _Offer) -> mmap.mmap:
        try:
            offer.listener.settimeout(self._timeout)
            for _ in range(1, self._world_size):
                link = offer.listener.accept()[0]
                link.settimeout(self._timeout)
                self._links[_receive(link)] = link
            for link in self._links.values():
                socket.send_fds(link, [b"memory"], [offer.memory])
            return mmap.mmap(offer.memory, 0)
        except BaseException:
            offer.listener.close()  # else the others would wait for their turn
            self.close()
            raise

    def _take(self, offer: None) -> mmap.mmap:
        files = socket.recv_fds(self._links[0], len(b"memory"), 1)[1]
        if not files:
            raise ConnectionError("rank 0 did not share its memory")
        try:
            return mmap.mmap(files[0], 0)
        finally:
            os.close(files[0])


class _Offer:
    """Rank 0's memory, which has no name and goes with the processes that map it, and where to ask for it.

    Attributes:
        memory: file descriptor.
        listener: socket.
        address: of the socket.
    """

    def __init__(self, stack: ExitStack, world_size: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("only Linux has memory without a name")
        self.memory = os.memfd_create("paco_ds gradients")
        stack.callback(os.close, self.memory)
        os.posix_fallocate(self.memory, 0, shared_bytes(world_size))  # too little is said now, not by a bus error later
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="paco_ds-"))
        self.address = f"{folder}/rank0"
        self.listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.listener.bind(self.address)
        self.listener.listen(world_size)


def _attempt(step: Callable[..., Any], *arguments: Any) -> Any:
    """What a step returns, or why it could not be taken."""
    try:
        return step(*arguments)
    except OSError as error:
        return error


def _agree(ranks: Ranks, outcome: Any) -> list[Any]:
    """The outcomes of all ranks.

    Raises:
        NoSharedMemoryError: one of them is an exception.
    """
    outcomes = ranks.gather_objects(outcome)
    for rank, of_rank in enumerate(outcomes):
        if isinstance(of_rank, Exception):
            raise NoSharedMemoryError(f"rank {rank}: {of_rank}")
    return outcomes


def _receive(link: socket.socket) -> int:
    message = link.recv(_MESSAGE.size)
    if not message:
        raise ConnectionResetError("closed at its other end")
    return int(_MESSAGE.unpack(message)[0])


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[tuple[slice, Tensor]]]:
    """Flat tensors one after the other, cut into chunks: parts of tensors, and where in the chunk each lies."""
    chunk: list[tuple[slice, Tensor]] = []
    used = 0
    for tensor in tensors:
        rest = tensor
        while len(rest):
            part, rest = rest[: CHUNK - used], rest[CHUNK - used :]
            chunk.append((slice(used, used + len(part)), part))
            used += len(part)
            if used == CHUNK:
                yield chunk
                chunk, used = [], 0
    if chunk:
        yield chunk
