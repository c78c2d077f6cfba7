"""The stream against the plan: the same bytes for any ranks and workers, and bad samples in their place."""

import shutil

import numpy as np
import pytest
import torch

from paco_ds.data.manifest import load_manifest
from paco_ds.data.shard import ShardReader
from paco_ds.data.stream.order import EpochOrder
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.errors import DataError
from paco_ds.training.build import build_stream
from tests.data.tiny import flip_byte
from tests.recipes import evaluation_batches, tiny_recipe

STEP = ("step.micro_batch=2", "step.micro_batches=12")


def steps_of(recipe, manifest, world_size=1, start=0):
    """{(step, micro-batch): MicroBatch} of all ranks together."""
    found = {}
    for rank in range(world_size):
        layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, rank, world_size)
        for number, step in enumerate(build_stream(recipe, manifest, layout, start), start):
            found |= {(number, j): batch for j, batch in zip(layout.own, step, strict=True)}
    return found


def assert_same(one, two):
    assert one.keys() == two.keys()
    for place, batch in one.items():
        for name in ("query", "key", "labels", "ids"):
            assert torch.equal(getattr(batch, name), getattr(two[place], name)), (place, name)


@pytest.fixture(scope="module")
def manifest(striped_shards):
    return load_manifest(striped_shards)


@pytest.fixture(scope="module")
def one_rank(manifest):
    return steps_of(tiny_recipe(*STEP), manifest)


def test_batches_are_those_of_the_plan(one_rank, manifest):
    """Ids by the order's arithmetic, labels by the index, all epochs to the end."""
    recipe = tiny_recipe(*STEP)
    reader = ShardReader(manifest.directory, manifest.split("train"))
    for epoch in range(recipe.schedule.epochs):
        order = EpochOrder(reader.counts, 24, seed=recipe.seed, epoch=epoch, window=recipe.data.window)
        for step in range(order.steps):
            for j in range(12):
                batch = one_rank[epoch * order.steps + step, j]
                ids = order.batch(step, range(2 * j, 2 * j + 2))
                np.testing.assert_array_equal(batch.ids, ids)
                np.testing.assert_array_equal(batch.labels, reader.labels()[ids])
    assert len(one_rank) == recipe.schedule.epochs * order.steps * 12
    assert order.steps > 1


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_ranks_get_the_micro_batches_of_one_rank(one_rank, manifest, world_size):
    """Bytes of both views too, since their randomness belongs to a position, not to a rank."""
    assert_same(one_rank, steps_of(tiny_recipe(*STEP), manifest, world_size))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_bytes_of_no_worker(one_rank, manifest, workers):
    """Loader processes take micro-batches in turn."""
    assert_same(one_rank, steps_of(tiny_recipe(*STEP, f"data.workers={workers}", "schedule.epochs=2"), manifest))


def test_a_stream_may_begin_at_any_step(one_rank, manifest):
    """In mid-epoch, with another number of ranks."""
    rest = {place: batch for place, batch in one_rank.items() if place[0] >= 3}
    assert_same(rest, steps_of(tiny_recipe(*STEP), manifest, world_size=3, start=3))


def test_both_views_of_an_image_differ_between_epochs(one_rank):
    """An id seen twice is drawn anew."""
    seen = {}
    for batch in one_rank.values():
        for number, image in zip(batch.ids.tolist(), batch.query, strict=True):
            seen.setdefault(number, []).append(image)
    twice = [images for images in seen.values() if len(images) > 1]
    assert twice
    assert any(not torch.equal(*images[:2]) for images in twice)


def test_a_bad_sample_is_replaced_by_another_of_its_class_in_its_place(one_rank, manifest, tmp_path):
    """Order and all other samples stay; the reason, key and shard are told."""
    directory = tmp_path / "damaged"
    shutil.copytree(manifest.directory, directory)
    damaged = load_manifest(directory)
    shard = damaged.split("train").shards[0]
    index = np.load(directory / shard.index_file)
    victim = 5
    flip_byte(directory / shard.file, int(index[victim]["offset"] + index[victim]["image_offset"]) + 40)
    found = steps_of(tiny_recipe(*STEP), damaged, world_size=2)
    reports = []
    for place, batch in one_rank.items():
        assert torch.equal(batch.ids, found[place].ids)
        assert torch.equal(batch.labels, found[place].labels)
        same = [torch.equal(a, b) for a, b in zip(batch.query, found[place].query, strict=True)]
        assert same == [number != victim for number in batch.ids.tolist()]
        reports += found[place].replaced
    assert {(r.key, r.shard, r.reason) for r in reports} == {(f"train-{victim:08d}", shard.file, "crc_mismatch")}


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_refuses_a_bad_sample(manifest, tmp_path, workers):
    """An accuracy without it would be of another set; the error of a loader process is as plain as the rank's."""
    directory = tmp_path / "damaged"
    shutil.copytree(manifest.directory, directory)
    damaged = load_manifest(directory)
    flip_byte(directory / damaged.split("test").shards[0].file, 600)
    with pytest.raises(DataError, match=r"^sample test-00000000 of test-.*crc_mismatch.*paco-build-shards check"):
        list(evaluation_batches(tiny_recipe(f"data.workers={workers}"), damaged, "test"))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (7, 0), (2, 2)])
def test_evaluation_sees_every_image_once_in_equally_many_batches(manifest, world_size, workers):
    """Padding is marked, so that uneven splits neither hang nor count twice."""
    recipe = tiny_recipe("evaluation.batch=3", f"data.workers={workers}")
    ranks = [list(evaluation_batches(recipe, manifest, "test", rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    ids = torch.cat([b.ids[b.valid] for batches in ranks for b in batches])
    assert sorted(ids.tolist()) == list(range(20))
    assert all(b.key is None for batches in ranks for b in batches)
