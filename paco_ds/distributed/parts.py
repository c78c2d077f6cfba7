"""Tensors of which every rank holds a part, put together on the first rank while training goes on.

Parts go through the store of the job, which every rank reaches already: collectives of another thread would meet those
of training. A rank sends when the first asks it to, so that the store never holds more than the part of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import TCPStore

from paco_ds.distributed.ranks import Ranks
from paco_ds.distributed.rendezvous import client_of_the_job, key_of_this_start

CHUNK = 4 * 2**20  # bytes of an entry; torch's store takes up to 8 MiB


class Part(NamedTuple):
    """What this rank holds of a tensor, float32.

    Attributes:
        values: flat; none on a rank that holds nothing of it.
        start: their place in the flattened tensor.
        shape: of the tensor.
    """

    values: Tensor
    start: int
    shape: torch.Size


class Parts:
    """Puts parts together. All ranks call it in the same order; each may do so in a thread of its own."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._number = ranks, 0
        self._store: TCPStore | None = None

    def whole(self, named: Mapping[str, Tensor | Part]) -> dict[str, Tensor]:
        """The tensors on the first rank, {} on the others; all have the same names in the same order.

        Raises:
            torch.distributed.DistError: the store is gone, and the job with it.
        """
        mine = {name: part for name, part in named.items() if isinstance(part, Part)}
        self._number += 1
        if not self._ranks.first:
            if mine:
                self._send(mine)
            return {}
        wholes = {name: part if isinstance(part, Tensor) else torch.zeros(part.shape) for name, part in named.items()}
        for name, part in mine.items():
            _put(wholes[name], part)
        for rank in range(1, self._ranks.world_size) if mine else ():
            self._receive(rank, {name: wholes[name] for name in mine})
        return wholes

    def _send(self, mine: Mapping[str, Part]) -> None:
        store, key = self._connected(), self._key(self._ranks.rank)
        data = torch.cat([part.values for part in mine.values()]).numpy().data.cast("B")
        store.wait([f"{key}/asked"])
        store.set(f"{key}/places", json.dumps([(part.start, len(part.values)) for part in mine.values()]))
        for begin in range(0, len(data), CHUNK):
            store.set(f"{key}/{begin}", bytes(data[begin : begin + CHUNK]))  # type: ignore[arg-type]  # a std::string

    def _receive(self, rank: int, wholes: Mapping[str, Tensor]) -> None:
        store, key = self._connected(), self._key(rank)
        store.set(f"{key}/asked", "")
        places = json.loads(self._taken(f"{key}/places"))
        data = np.empty(sum(length for _, length in places), np.float32)
        view = data.data.cast("B")
        for begin in range(0, len(view), CHUNK):
            view[begin : begin + CHUNK] = self._taken(f"{key}/{begin}")
        store.delete_key(f"{key}/asked")
        values = torch.from_numpy(data).split([length for _, length in places])
        for whole, (start, _), own in zip(wholes.values(), places, values, strict=True):
            _put(whole, Part(own, start, whole.shape))

    def _taken(self, key: str) -> bytes:
        store = self._connected()
        value: bytes = store.get(key)
        store.delete_key(key)
        return value

    def _connected(self) -> TCPStore:
        """A connection of its own: who waits for an entry keeps its connection from all others."""
        self._store = self._store or client_of_the_job(self._ranks.world_size)
        return self._store

    def _key(self, rank: int) -> str:
        return f"{key_of_this_start()}/parts/{self._number}/{rank}"


def _put(whole: Tensor, part: Part) -> None:
    whole.view(-1)[part.start : part.start + len(part.values)] = part.values
