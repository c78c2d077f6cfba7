"""The mean over ranks of one host through memory that they share.

gloo sends through sockets, and the kernel copies each byte in and out. Here each rank writes its numbers once, averages
its share of everybody's, and reads what the others averaged (tools/bench/gradients.py compares). DeepSpeed's collective
in shared memory waits in a loop that never ends where a rank does not come; this one waits at a socket, which wakes
when the rank at its other end dies, and gives up in time.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from paco_ds.distributed import Ranks

CHUNK = 2**19  # numbers: few meetings, and yet what one rank writes the others still find in the cache
_BUFFERS = 3  # one is written while another is averaged and a third is read
_FOLDER = "/dev/shm"


def shared_bytes(world_size: int, numbers: int = _BUFFERS * CHUNK) -> int:
    """Bytes that the ranks of a host share, once for all of them; as many as a mean of so many numbers touches."""
    return (world_size + 1) * min(numbers, _BUFFERS * CHUNK) * torch.float32.itemsize if world_size > 1 else 0


class SharedMemoryMean:
    """Mean of float32 tensors over the ranks of a host, in place.

    In stage k of a call each rank writes chunk k, averages its share of chunk k - 1 and reads chunk k - 2; before each
    stage all meet. A number is averaged by one rank, so that all ranks have the same to the bit.

    Made and called by all ranks of the job together.

    Args:
        timeout: seconds to wait for another rank.

    Raises:
        OSError: a rank cannot have the memory; raised by every rank.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self._rank, self._world_size, self._timeout = ranks.rank, ranks.world_size, timeout
        self._links: list[socket.socket] = []  # rank 0's to every other rank, and theirs to rank 0
        with ExitStack() as stack:  # once all have opened them, memory and socket need no name; nothing is left behind
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            folder = self._create(listener, stack) if ranks.first else None
            folder = ranks.gather_objects(folder)[0]
            failure = folder if isinstance(folder, OSError) else self._open(Path(folder))
            for of_rank in ranks.gather_objects(failure):
                if of_rank is not None:
                    raise of_rank
            if ranks.first:
                self._links = [listener.accept()[0] for _ in range(self._world_size - 1)]
        for link in self._links:
            link.settimeout(timeout)

    def _create(self, listener: socket.socket, stack: ExitStack) -> str | OSError:
        """Folder of the memory and of a socket, removed with `stack`; or why there is none."""
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="paco_ds-", dir=_FOLDER))
            with Path(folder, "memory").open("wb") as file:
                # else a full /dev/shm would be noticed by a bus error, in mid-step
                os.posix_fallocate(file.fileno(), 0, shared_bytes(self._world_size))
            listener.bind(f"{folder}/meeting")
            listener.listen(self._world_size)
        except OSError as error:
            return error
        return folder

    def _open(self, folder: Path) -> OSError | None:
        try:
            with (folder / "memory").open("r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
            if self._rank:
                self._links = [socket.socket(socket.AF_UNIX)]
                self._links[0].connect(f"{folder}/meeting")
        except OSError as error:
            return error
        buffers = torch.frombuffer(memory, dtype=torch.float32).view(_BUFFERS, self._world_size + 1, CHUNK)
        self._written, self._averaged = buffers[:, :-1], buffers[:, -1]
        return None

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Replace flat tensors by their means; every rank gives as many, of the same lengths, in the same order.

        Raises:
            ConnectionError: a rank has ended.
            TimeoutError: a rank did not come.
        """
        chunks = list(_chunks(tensors))
        for stage in range(len(chunks) + 2):
            self._meet()
            if stage < len(chunks):
                row = self._written[stage % _BUFFERS, self._rank]
                for place, part in chunks[stage]:
                    row[place].copy_(part)
            if 0 < stage <= len(chunks):
                self._average((stage - 1) % _BUFFERS, chunks[stage - 1][-1][0].stop)
            if stage > 1:
                means = self._averaged[(stage - 2) % _BUFFERS]
                for place, part in chunks[stage - 2]:
                    part.copy_(means[place])

    def _average(self, buffer: int, length: int) -> None:
        share = slice(length * self._rank // self._world_size, length * (self._rank + 1) // self._world_size)
        first, second, *others = self._written[buffer, :, share]
        mean = torch.add(first, second, out=self._averaged[buffer, share])  # twice as fast as torch.mean for two rows
        for row in others:
            mean.add_(row)
        mean.mul_(1 / self._world_size)

    def _meet(self) -> None:
        """Return once every rank has come. Rank 0 hears of all, and tells all."""
        try:
            if self._rank:
                self._links[0].sendall(b".")
            for link in self._links:
                if not link.recv(1):
                    raise ConnectionResetError("a rank ended while the others waited to average gradients with it")
            if not self._rank:
                for link in self._links:
                    link.sendall(b".")
        except TimeoutError:
            raise TimeoutError(
                f"rank {self._rank} waited {self._timeout:g} s to average gradients with a rank that did not come"
            ) from None


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
