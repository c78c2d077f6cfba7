"""The stream at the size of iNaturalist and beyond: counted in operations, since wall time is the machine's."""

import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from paco_ds.data import shard as shard_module
from paco_ds.data.manifest import Manifest, load_manifest
from paco_ds.data.stream.partition import TrainingPlan
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.build import build_stream
from tests.data.tiny import same_views
from tests.recipes import tiny_recipe


def many_shards(source: Manifest, directory: Path, copies: int) -> Manifest:
    """Shards of one tar under many names, as hard links: as many samples as asked for, without their bytes."""
    directory.mkdir()
    split = source.split("train")
    shards = []
    for number in range(copies):
        original = split.shards[number % len(split.shards)]
        name = f"train-{number:05d}"
        for ending in (".tar", ".index.npy"):
            os.link(source.directory / f"{original.name}{ending}", directory / f"{name}{ending}")
        shards.append(original.model_dump() | {"name": name})
    indexes = [np.load(directory / f"train-{number:05d}.index.npy") for number in range(len(split.shards))]
    labels = np.concatenate([indexes[number % len(split.shards)]["label"] for number in range(copies)])
    tree = json.loads((source.directory / "manifest.json").read_text())
    tree["splits"] = {
        "train": {
            "name": "train",
            "samples": len(labels),
            "class_counts": np.bincount(labels, minlength=len(source.classes)).tolist(),
            "bytes": sum(s["bytes"] for s in shards),
            "shards": shards,
        }
    }
    (directory / "manifest.json").write_text(json.dumps(tree))
    return load_manifest(directory)


@pytest.mark.parametrize(("G", "start"), [(128, 0), (128, 9_000_000), (32_768, 0), (32_768, 38_000)])
def test_fourteen_million_samples_are_planned_from_any_step_in_little_memory(G: int, start: int) -> None:
    """Ten thousand shards: a rank's first windows cost memory of its own slots and of the list of shards."""
    layout = MicroBatchLayout(32, G // 32, G // 32 - 1, G // 32)
    counts = (1400,) * 10_000
    tracemalloc.start()
    plan = TrainingPlan(counts, layout, seed=1, window=64, start=start, epochs=90)
    slots = [slot for of_slot in plan.slots_of(0, 1) for slot in of_slot]
    window = next(plan.windows(slots))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert window.ids.shape[0] == 32
    assert window.start == start
    assert peak < 3 * 2**20  # 10,000 numbers of a few kinds, and 32 x 64 ids; all ids would be 112 MB


@pytest.mark.parametrize("start", [0, 1000])
def test_the_first_batch_opens_only_the_shards_of_its_lanes(
    tiny_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    """Of 1,500 shards, one or two for each slot; whatever step a run goes on from."""
    manifest = many_shards(tiny_shards, tmp_path / "many", 1500)
    loaded: list[str] = []
    load_index = shard_module.load_index
    monkeypatch.setattr(shard_module, "load_index", lambda s, shard: loaded.append(shard.name) or load_index(s, shard))
    recipe = tiny_recipe("step.micro_batch=4", "step.micro_batches=4", "data.window=4", "schedule.epochs=2")
    layout = MicroBatchLayout(4, 4, 3, 4)
    stream = build_stream(recipe, manifest, layout, start=start)
    batch = next(stream)[0]
    assert len(batch.labels) == 4
    assert 1 <= len(set(loaded)) <= 2 * 4
    assert len(loaded) == len(set(loaded))
    del stream


def test_labels_of_all_are_read_for_samplers_once(
    tiny_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every index once for the labels; epochs after the first read none for them."""
    manifest = many_shards(tiny_shards, tmp_path / "many", 60)
    loaded: list[str] = []
    load_index = shard_module.load_index
    monkeypatch.setattr(shard_module, "load_index", lambda s, shard: loaded.append(shard.name) or load_index(s, shard))
    recipe = tiny_recipe(
        "step.micro_batch=4",
        "step.micro_batches=4",
        "data.window=4",
        "schedule.epochs=3",
        "data.sampler=class_balanced",
    )
    digest = hashlib.sha256()
    for step in build_stream(recipe, manifest, MicroBatchLayout(4, 4, 0, 1)):
        for batch in step:
            digest.update(batch.query.numpy().tobytes())
    assert len(loaded) <= 2 * 60  # once for the labels, once for reading; all of them stay in memory
    assert digest.digest() != hashlib.sha256().digest()


@pytest.mark.parametrize("sampler", ["class_balanced", "progressively_balanced"])
def test_samplers_resume_and_change_ranks_like_the_default(tiny_shards: Manifest, sampler: str) -> None:
    """Bytes of both views too, from a step within an epoch on."""
    common = ("step.micro_batch=2", "step.micro_batches=4", "data.window=4", "schedule.epochs=3")
    recipe = tiny_recipe(*common, f"data.sampler={sampler}")
    one = list(build_stream(recipe, tiny_shards, MicroBatchLayout(2, 4, 0, 1)))
    for rank in range(2):
        for step, own in enumerate(build_stream(recipe, tiny_shards, MicroBatchLayout(2, 4, rank, 2), start=7), 7):
            for slot, batch in enumerate(own):
                expected = one[step][2 * slot + rank]
                assert batch.ids.tolist() == expected.ids.tolist()
                assert same_views(batch, expected)
    default = list(build_stream(tiny_recipe(*common), tiny_shards, MicroBatchLayout(2, 4, 0, 1)))
    assert len(default) == len(one)  # the same steps an epoch, whatever the sampler
    rare = [sum(int((batch.labels == 2).sum()) for step in run for batch in step) for run in (default, one)]
    assert rare[1] > 1.5 * rare[0]
