"""Fixtures that tests share: pools of ranks and small shards of real tar files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.multinode.hosts import TwoHosts, why_not
from tests.pool import RankPool, start_fork_server

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and tests of it would wait for ever

TINY_COUNTS = {"train": (80, 40, 20, 8), "val": (6, 6, 6, 6), "test": (5, 5, 5, 5)}


@pytest.fixture(scope="session", autouse=True)
def fork_server(request: pytest.FixtureRequest) -> None:
    """Where ranks will be needed, what they are forked from starts while the first tests run."""
    if any("pool" in getattr(item, "fixturenames", ()) for item in request.session.items):
        start_fork_server()


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """`pool(W)`: W ranks that live for the whole session."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in pools or not pools[world_size].alive:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield get
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def striped_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 148 training images of 4 classes, 12 x 12 pixels, that a small network can tell apart."""
    from paco_ds.data.pack.command import main

    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, counts in TINY_COUNTS.items():
        for label, count in enumerate(counts):
            folder = root / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 120, (12, 12, 3), dtype=np.uint8)
                image[3 * label : 3 * label + 3] += 100
                cv2.imwrite(str(folder / f"{number}.png"), image)
    arguments = [
        "build",
        "--source",
        "folder",
        "--root",
        str(root / "images"),
        "--output",
        str(root / "shards"),
    ]
    assert main([*arguments, "--shard-bytes", "40000"]) == 0
    return root / "shards"


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    """node1 and node2, where the machine lets them be made; gone afterwards, whatever happened."""
    if reason := why_not():
        pytest.skip(f"no two hosts on this machine: {reason}")
    hosts = TwoHosts(tmp_path)
    yield hosts
    hosts.close()
