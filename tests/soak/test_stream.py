"""The stream at length: 10,000 mutations, real loader processes, the size of iNaturalist, S3 that keeps failing."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from paco_ds.config.data import StorageSettings
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import Manifest, load_manifest, open_data
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import load_card
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.storage import Storage
from paco_ds.data.stream.partition import TrainingPlan
from paco_ds.data.stream.sampler import ClassSampler
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.build import build_stream
from tests.data.mutations import fuzz
from tests.data.s3 import BUCKET, s3_server
from tests.data.test_stream_scale import many_shards
from tests.data.tiny import TINY_CARD, TINY_COUNTS, write_idx
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.soak
Record = Callable[[str, str, bool], None]


@pytest.fixture
def tiny(tmp_path: Path) -> Manifest:
    """47 training images in several shards."""
    return _build(tmp_path, TINY_COUNTS, shard_bytes=20_000)


def _build(tmp_path: Path, counts_of: Mapping[str, tuple[int, ...]], shard_bytes: int) -> Manifest:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for split, counts in counts_of.items():
        labels = np.repeat(np.arange(3, dtype=np.uint8), counts)
        write_idx(tmp_path / "images" / f"{split}-labels", labels)
        write_idx(tmp_path / "images" / f"{split}-images", rng.integers(0, 256, (len(labels), 8, 8), dtype=np.uint8))
    (tmp_path / "tiny.yaml").write_text(TINY_CARD)
    options = BuildOptions(shard_bytes=shard_bytes)
    return build_shards(load_card(tmp_path / "tiny.yaml"), tmp_path / "images", tmp_path / "shards", options)


def test_ten_thousand_mutations(tiny: Manifest, record: Record) -> None:
    """None crashes, hangs or goes uncounted."""
    outcomes = fuzz(tiny.directory, 10_000, seed=int(time.time()))
    record("10,000 mutations of shards: " + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())), "-", True)


def digests(
    recipe: Recipe, manifest: Manifest, W: int, start: int = 0, steps: int | None = None
) -> dict[tuple[int, int], str]:
    """{(step, micro-batch): digest of its bytes} over all ranks."""
    found = {}
    for rank in range(W):
        layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, rank, W)
        stream = build_stream(recipe, manifest, layout, start)
        last = stream.plan.total_steps if steps is None else min(start + steps, stream.plan.total_steps)
        for step in range(start, last):
            for j, batch in zip(layout.own, next(stream), strict=True):
                parts = (batch.query, batch.key, batch.labels, batch.ids)
                found[step, j] = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        stream.close()
    return found


@pytest.mark.parametrize("sampler", ["instance_balanced", "progressively_balanced"])
def test_real_loader_processes_and_changes_of_ranks(striped_shards: Path, record: Record, sampler: str) -> None:
    """W = 1, 2, 4, 12 with 0, 1, 3 and 8 processes each, and three changes of both within an epoch."""
    manifest = load_manifest(striped_shards)
    common = ("step.micro_batch=8", "step.micro_batches=12", "schedule.epochs=6", f"data.sampler={sampler}")

    def recipe(workers: int) -> Recipe:
        return tiny_recipe(*common, f"data.workers={workers}")

    one = digests(recipe(0), manifest, 1)
    for W, workers in ((1, 3), (1, 8), (2, 3), (4, 1), (12, 0)):
        assert digests(recipe(workers), manifest, W) == one, (W, workers)
    found, step = {}, 0
    for W, workers, steps in ((1, 3, 1), (4, 0, 1), (2, 8, 2), (3, 1, None)):
        found |= digests(recipe(workers), manifest, W, step, steps)
        step += steps or 0
    assert found == one
    record(f"batches of 1, 2, 4, 12 ranks with 0 to 8 loader processes, {sampler}", f"{len(one)} digests equal", True)


def test_first_batch_of_437_400_samples(tmp_path: Path, record: Record) -> None:
    """300 shards of as many samples as iNaturalist 2018 has; from the first step and from a far one."""
    one = _build(tmp_path, {"train": (1000, 300, 158), "test": (4, 4, 4)}, shard_bytes=10**8)
    manifest = many_shards(one, tmp_path / "many", 300)
    samples = manifest.split("train").samples
    common = ("step.micro_batch=32", "step.micro_batches=4", "data.window=64", "schedule.epochs=90")
    for start in (0, 200_000):
        for workers in (0, 2):
            recipe = tiny_recipe(*common, f"data.shards={tmp_path / 'many'}", f"data.workers={workers}")
            began = time.perf_counter()
            stream = build_stream(recipe, open_data(recipe.data, ["train"]), MicroBatchLayout(32, 4, 3, 4), start=start)
            next(stream)
            seconds = time.perf_counter() - began
            stream.close()
            what = f"first batch of {samples} samples in {len(manifest.split('train').shards)} shards, step {start}, "
            record(what + f"{workers} loader processes", f"{seconds:.2f} s", seconds < 3 + 5 * (workers > 0))
            assert seconds < 3 + 5 * (workers > 0)


class _Labels:
    def __init__(self, labels: np.ndarray) -> None:
        self._labels = labels

    def labels(self) -> np.ndarray:
        return self._labels


def test_order_of_fourteen_million(record: Record) -> None:
    """By arithmetic, and laid out by a sampler."""
    counts = (1400,) * 10_000
    for G in (128, 32_768):
        layout = MicroBatchLayout(32, G // 32, 0, G // 32)
        began = time.perf_counter()
        plan = TrainingPlan(counts, layout, seed=1, window=64, start=300, epochs=90)
        next(plan.windows(range(32)))
        seconds = time.perf_counter() - began
        record(f"order of 14,000,000 samples, 10,000 shards, G = {G}", f"{1000 * seconds:.1f} ms", seconds < 1)
        assert seconds < 1
    weights = 1 / np.arange(20, 20_020)
    of_class = np.maximum(14_000_000 * weights / weights.sum(), 2).astype(int)
    of_class[0] += 14_000_000 - of_class.sum()
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(20_000, dtype=np.int32), of_class))
    sampler = ClassSampler("class_balanced", counts, _Labels(labels), tuple(of_class), seed=1, epochs=90)
    began = time.perf_counter()
    sampler.sequence(0)
    first = time.perf_counter() - began
    began = time.perf_counter()
    sampler.sequence(1)
    later = time.perf_counter() - began
    record("the same laid out class-balanced", f"{first:.1f} s, later epochs {later:.1f} s", later < 10)
    assert later < 10


def test_s3_in_lasting_trouble(tiny: Manifest, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream with loader processes, while connections are refused, stalled and cut all the time, loses nothing."""
    common = ("step.micro_batch=2", "step.micro_batches=4", "data.window=8", "schedule.epochs=12", "data.workers=2")
    expected = digests(tiny_recipe(*common), tiny, 1)
    with s3_server() as s3:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        url = f"s3://{BUCKET}/tiny"
        storage = Storage(url, StorageSettings(tries=8, timeout=3))
        for path in tiny.directory.iterdir():
            with storage.write(path.name) as file:
                file.write(path.read_bytes())
        stop = threading.Event()

        def trouble() -> None:
            for number in range(10**6):
                if stop.wait(0.5):
                    return
                s3.make(("refuse", "stall", "cut")[number % 3], 1, 900)

        thread = threading.Thread(target=trouble)
        thread.start()
        try:
            recipe = tiny_recipe(*common, f"data.shards={url}", "data.storage={tries: 12, timeout: 3}")
            began = time.perf_counter()
            found = digests(recipe, open_data(recipe.data, ["train"]), 1)
        finally:
            stop.set()
            thread.join()
    assert found == expected
    record("stream from S3 with a connection refused, stalled or cut twice a second", "all batches equal", True)
    assert time.perf_counter() - began < 300
