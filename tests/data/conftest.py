"""Fixtures: the tiny data set as a card, as shards, and as shards to damage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paco_ds.data import storage as storage_module
from paco_ds.data.manifest import Manifest, load_manifest
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import load_card
from paco_ds.data.pack.shards import build_shards
from tests.data.s3 import Proxy, s3_server
from tests.data.tiny import TINY_CARD, TINY_COUNTS, write_idx


@pytest.fixture(scope="session")
def tiny_card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of a set of 8 x 8 grey images, 47 for training and 12 for testing; do not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for split, counts in TINY_COUNTS.items():
        labels = np.repeat(np.arange(3, dtype=np.uint8), counts)
        write_idx(folder / "images" / f"{split}-labels", labels)
        pixels = rng.integers(0, 256, (len(labels), 8, 8), dtype=np.uint8)
        write_idx(folder / "images" / f"{split}-images", pixels)
    (folder / "tiny.yaml").write_text(TINY_CARD)
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_shards(tiny_card: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards of the tiny set, several to a split; do not change them."""
    directory = tmp_path_factory.mktemp("shards")
    return build_shards(load_card(tiny_card), tiny_card.parent / "images", directory, BuildOptions(shard_bytes=20_000))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries. For each test, not with `s3`, which a test may ask for while this is set already."""
    monkeypatch.setattr(storage_module, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def s3() -> Iterator[Proxy]:
    """An S3 server that storage of this module finds, and that can be told to fail."""
    with pytest.MonkeyPatch.context() as patch, s3_server() as proxy:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def damaged(tiny_shards: Manifest, tmp_path: Path) -> Manifest:
    """A copy of the tiny shards for the test to damage."""
    shutil.copytree(tiny_shards.directory, tmp_path / "shards")
    return load_manifest(tmp_path / "shards")
