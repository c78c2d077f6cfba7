"""Ranks of a launcher that share one build. They coordinate by files beside the shards, without a process group.

Rank r of W writes shards r, r + W, ... Rank 0 writes `plan.json` to start the others, waits until each reports its
shards done, writes the manifest, and removes `plan.json`, for which the others wait. Each rank writes a heartbeat file
repeatedly. Every launch has its own id, so that files of an earlier launch are ignored.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from paco_ds.config.parse import parse_json
from paco_ds.data.storage import MissingFile, Storage
from paco_ds.distributed.folder_lock import FolderLock
from paco_ds.errors import DataError, StorageError

PLAN_FILE = "plan.json"
_BEAT_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class BuildRank:
    """This process's share of a build.

    Attributes:
        patience: seconds without a heartbeat after which another rank counts as lost.
    """

    number: int = 0
    world_size: int = 1
    patience: float = 120.0

    def takes(self, job: int) -> bool:
        """Whether this rank writes the shard of this number."""
        return job % self.world_size == self.number

    def begin(self, state: Storage, plan: str) -> None:
        """Rank 0 starts the others with this plan; they return once their own plan is the same.

        Raises:
            DataError: as `_wait`.
        """
        if self.number == 0:
            _put(state, PLAN_FILE, {"plan": plan, "launch": uuid.uuid4().hex})
        else:
            self._wait(
                state,
                "the same plan (do all hosts see the same images and options?)",
                lambda: () if _get(state, PLAN_FILE).get("plan") == plan else (0,),
            )

    def plan(self, state: Storage) -> object:
        """The digest of the current build's plan; None without a build."""
        return _get(state, PLAN_FILE).get("plan")

    def finish(self, state: Storage, conclude: Callable[[], None]) -> None:
        """Rank 0 calls `conclude()` when all ranks are done. The others report that they are done and wait for it."""
        if self.number == 0:
            launch = _get(state, PLAN_FILE)["launch"]
            others = range(1, self.world_size)
            self._wait(
                state,
                "its shards",
                lambda: [rank for rank in others if _get(state, _done(rank)).get("launch") != launch],
            )
            conclude()
            return
        said = None
        plan = _get(state, PLAN_FILE)
        while plan:
            if plan["launch"] != said:
                said = plan["launch"]
                _put(state, _done(self.number), {"launch": said})
            was = plan
            self._wait(state, "the manifest", lambda was=was: () if _get(state, PLAN_FILE) != was else (0,))  # type: ignore[misc]
            plan = _get(state, PLAN_FILE)

    def sole_builder(self, output: Storage) -> AbstractContextManager[object]:
        """Rank 0 holds the folder during the block; remote storage has no locks.

        Raises:
            UserError: another build writes there; its host, process and start are named.
        """
        held = self.number == 0 and output.is_local
        return FolderLock(output.local_directory, "built") if held else nullcontext()

    @contextmanager
    def alive(self, state: Storage) -> Iterator[None]:
        """Write this rank's heartbeat during the block; if the block fails, write the reason."""
        if self.world_size == 1:
            yield
            return
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(state, over), daemon=True)
        beat.start()
        try:
            yield
        except BaseException as error:
            over.set()
            beat.join()
            _put(state, _alive(self.number), {"failed": f"{type(error).__name__}: {error}", "launch": uuid.uuid4().hex})
            raise
        over.set()
        beat.join()
        state.remove(_alive(self.number))

    def _wait(self, state: Storage, what: str, waited_for: Callable[[], Iterable[int]]) -> None:
        """Return when `waited_for()` is empty.

        Raises:
            DataError: one of these ranks failed, or had no heartbeat for `patience` seconds.
        """
        seen: dict[int, tuple[dict[str, object], float]] = {}
        while ranks := list(waited_for()):
            for rank in ranks:
                sign, now = _get(state, _alive(rank)), time.monotonic()
                if rank not in seen or seen[rank][0] != sign:
                    seen[rank] = (sign, now)
                silent = now - seen[rank][1]
                # a file of an earlier launch is overwritten in this time by a rank that starts
                if "failed" in sign and silent > min(4 * _BEAT_EVERY, self.patience / 2):
                    raise DataError(f"rank {rank} failed: {sign['failed']}")
                if silent > self.patience:
                    raise DataError(
                        f"rank {rank} was silent for {silent:.0f} s while rank {self.number} waited for {what}. Is "
                        f"{state.url} the same folder on every host? Give the same command again: finished shards are "
                        "kept"
                    )
            time.sleep(min(0.5, self.patience / 8))

    def _beat(self, state: Storage, over: threading.Event) -> None:
        count = 0
        while not over.is_set():
            # The main thread may remove the folder between two calls of this one; where it cannot be written at all,
            # that thread meets the same error, and others see silence.
            with suppress(StorageError):
                _put(state, _alive(self.number), {"beat": count, "process": os.getpid()})
            count += 1
            over.wait(min(_BEAT_EVERY, self.patience / 8))


def rank_of_environment() -> BuildRank:
    """The rank from RANK and WORLD_SIZE; rank 0 of 1 without a launcher.

    Raises:
        DataError: they are not valid.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not rank.isdecimal() or not world.isdecimal() or int(rank) >= int(world):
        raise DataError(f"RANK={rank} and WORLD_SIZE={world} are not valid; unset both to build with one process")
    return BuildRank(int(rank), int(world))


def _alive(rank: int) -> str:
    return f"rank-{rank}.json"


def _done(rank: int) -> str:
    return f"rank-{rank}.done.json"


def _put(state: Storage, name: str, content: dict[str, object]) -> None:
    with state.write(name) as file:
        file.write(json.dumps(content).encode())


def _get(state: Storage, name: str) -> dict[str, object]:
    try:
        content = parse_json(state.read(name), name, DataError)
    except (MissingFile, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
