"""Owns how ranks that a launcher started share one build, by files beside the shards: no process group is needed.

Rank r of W writes shards r, r + W, ...; rank 0 begins the build, waits for the records of the others' shards and
writes the manifest. A rank shows that it lives by a counter in a file that it writes again and again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from paco_ds.data.storage import MissingFile, Storage
from paco_ds.errors import DataError

BUILD_FOLDER = ".build"
_BEAT_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Rank:
    """This process's share of a build.

    Attributes:
        patience: seconds without a sign of life after which another rank is given up.
    """

    number: int = 0
    world_size: int = 1
    patience: float = field(default=120.0, compare=False)

    def takes(self, job: int) -> bool:
        """Whether the shard of this number is ours."""
        return job % self.world_size == self.number

    @contextmanager
    def alive(self, output: Storage) -> Iterator[None]:
        """Show the others that this rank lives, and, if it ends with an error, why."""
        if self.world_size == 1:
            yield
            return
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(output, over), daemon=True)
        beat.start()
        try:
            yield
        except BaseException as error:
            over.set()
            beat.join()
            _put(output, self.number, {"failed": f"{type(error).__name__}: {error}"})
            raise
        over.set()
        beat.join()

    def wait_for(self, output: Storage, what: str, ready: Callable[[], bool], others: Iterator[int] | range) -> None:
        """Return when `ready()`.

        Raises:
            DataError: one of the other ranks has failed, or shown no sign of life for `patience` seconds.
        """
        last: dict[int, tuple[str, float]] = {}
        ranks = list(others)
        while not ready():
            for rank in ranks:
                state, now = _get(output, rank), time.monotonic()
                if rank not in last or last[rank][0] != state:
                    last[rank] = (state, now)
                silent = now - last[rank][1]
                # What an earlier run left does not change; a rank that starts late overwrites it meanwhile.
                if "failed" in state and silent > min(self.patience, 4 * _BEAT_EVERY):
                    raise DataError(f"rank {rank} failed: {json.loads(state)['failed']}")
                if silent > self.patience:
                    raise DataError(
                        f"rank {rank} has given no sign of life for {silent:.0f} s while rank {self.number} waits for "
                        f"{what}: is {output.url} the same folder on every host? Give the same command again: the "
                        "shards that are finished are kept"
                    )
            time.sleep(min(0.5, self.patience / 4))

    def _beat(self, output: Storage, over: threading.Event) -> None:
        count = 0
        while not over.is_set():
            _put(output, self.number, {"beat": count, "process": os.getpid()})
            count += 1
            over.wait(min(_BEAT_EVERY, self.patience / 4))


def rank_of_environment() -> Rank:
    """The rank that a launcher gave this process; rank 0 of 1 without one.

    Raises:
        DataError: RANK and WORLD_SIZE are not such numbers.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not rank.isdecimal() or not world.isdecimal() or int(rank) >= int(world):
        raise DataError(f"RANK={rank} and WORLD_SIZE={world} are no rank of a launch; unset both to build alone")
    return Rank(int(rank), int(world))


def _file(rank: int) -> str:
    return f"{BUILD_FOLDER}/rank-{rank}.json"


def _put(output: Storage, rank: int, state: dict[str, object]) -> None:
    with output.write(_file(rank)) as file:
        file.write(json.dumps(state).encode())


def _get(output: Storage, rank: int) -> str:
    try:
        return output.read(_file(rank)).decode()
    except MissingFile:
        return ""
