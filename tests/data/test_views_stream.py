"""Photographs through the stream: the published views have the same bytes for any ranks and workers, and images that
cannot be decoded are replaced and named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from paco_ds.data.manifest import load_manifest
from paco_ds.data.pack.command import main
from paco_ds.data.stream.batches import evaluation_stream
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.build import build_stream
from tests.data.tiny import same_views
from tests.recipes import tiny_recipe

VIEWS = (
    "step.micro_batch=2",
    "step.micro_batches=6",
    "schedule.epochs=1",
    "views.query={name: randclsstack, size: 16}",
    "views.key={name: cifar_key, size: 16}",
)

ON_DEVICE = "views.device=accelerator"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """25 JPEGs of two classes and several sizes, some turned by EXIF; the last one is cut in half."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(25):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((40 + 9 * number, 300 - 9 * number), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        file, folder = io.BytesIO(), root / "images" / "train" / f"class{number % 2}"
        image.save(file, "JPEG", exif=exif)
        folder.mkdir(parents=True, exist_ok=True)
        data = file.getvalue()
        (folder / f"{number}.jpg").write_bytes(data[: len(data) // 2] if number == 24 else data)
    arguments = ["build", "--source", "folder", "--root", str(root / "images"), "--output", str(root / "shards")]
    assert main(arguments) == 0
    return load_manifest(root / "shards")


def micro_batches(recipe, manifest, world_size=1):
    """All of them in the order of the plan."""
    streams = [build_stream(recipe, manifest, MicroBatchLayout(2, 6, rank, world_size)) for rank in range(world_size)]
    steps = [list(stream) for stream in streams]
    return [steps[j % world_size][step][j // world_size] for step in range(len(steps[0])) for j in range(6)]


@pytest.fixture(scope="module")
def one_rank(photographs):
    return micro_batches(tiny_recipe(*VIEWS), photographs)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 0), (6, 0), (1, 2)])
def test_ranks_and_workers_make_the_same_views(one_rank, photographs, world_size, workers):
    """Every random operation belongs to a position of the plan."""
    found = micro_batches(tiny_recipe(*VIEWS, f"data.workers={workers}"), photographs, world_size)
    assert len(found) == len(one_rank) == 12
    for ours, theirs in zip(one_rank, found, strict=True):
        for name in ("query", "key", "ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.fixture(scope="module")
def one_rank_on_device(photographs):
    return micro_batches(tiny_recipe(*VIEWS, ON_DEVICE), photographs)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 0), (6, 0), (1, 2)])
def test_ranks_and_workers_render_the_same_views_on_a_device(one_rank_on_device, photographs, world_size, workers):
    """Bit for bit on the CPU, so what ranks exchange for keys is the same too."""
    recipe = tiny_recipe(*VIEWS, ON_DEVICE, f"data.workers={workers}")
    found = micro_batches(recipe, photographs, world_size)
    assert len(found) == len(one_rank_on_device) == 12
    for ours, theirs in zip(one_rank_on_device, found, strict=True):
        for name in ("query", "key", "ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_stream_that_starts_later_renders_what_the_first_would_have(one_rank_on_device, photographs):
    """As a resumed run does."""
    recipe = tiny_recipe(*VIEWS, ON_DEVICE)
    resumed = list(build_stream(recipe, photographs, MicroBatchLayout(2, 6, 0, 1), start=1))
    assert len(resumed) == 1
    for ours, theirs in zip(one_rank_on_device[6:], resumed[0], strict=True):
        assert same_views(ours, theirs)


def test_views_of_a_device_have_the_draws_of_the_cpu(one_rank, one_rank_on_device):
    """The same images and labels; over all, mean and deviation of a channel within 2 / 255."""
    for name in ("query", "key"):
        ours, theirs = (torch.cat([getattr(b, name) for b in of]).double() for of in (one_rank_on_device, one_rank))
        assert (ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3))).abs().max() < 2
        assert (ours.std((0, 2, 3)) - theirs.std((0, 2, 3))).abs().max() < 2
        assert (ours - theirs).abs().mean() < 2
    for ours, theirs in zip(one_rank_on_device, one_rank, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.labels, theirs.labels)


def test_evaluation_stays_on_the_cpu(photographs):
    """Its views, and so every accuracy, do not depend on what makes training views."""
    images = [
        next(
            iter(evaluation_stream(recipe.data, recipe.views.evaluation, photographs, "train", 4, leave_out_bad=True))
        ).query
        for recipe in (tiny_recipe(*VIEWS, more) for more in ("views.device=cpu", ON_DEVICE))
    ]
    assert torch.equal(*images)


def test_what_makes_views_is_part_of_what_a_run_resumes():
    """Pixels differ by rounding: another device would train another model."""
    assert tiny_recipe().resume_identity()["views.device"] == "cpu"
    assert tiny_recipe(ON_DEVICE).resume_identity()["views.device"] == "accelerator"
    assert tiny_recipe().default("views.device") == "cpu"


@pytest.mark.parametrize("of", ["one_rank", "one_rank_on_device"])
def test_batches_are_planes_of_bytes(of, request):
    """[m, 3, H, W] in one piece, as the model takes them."""
    for batch in request.getfixturevalue(of):
        for images in (batch.query, batch.key):
            assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.uint8)
            assert images.is_contiguous()


def test_an_image_that_cannot_be_decoded_is_replaced_and_named(photographs):
    """Its file is whole in the shard, so only decoding finds out. Over some epochs it is met."""
    recipe = tiny_recipe(*VIEWS, "schedule.epochs=3")
    replaced = {r for batch in micro_batches(recipe, photographs) for r in batch.replaced}
    assert {r.reason for r in replaced} == {"truncated"}
    assert len({r.key for r in replaced}) == 1


def test_an_image_above_the_pixel_limit_is_replaced_and_named(photographs):
    """The limit is the recipe's."""
    recipe = tiny_recipe(*VIEWS, "data.max_pixels=25000")
    replaced = {r.reason for batch in micro_batches(recipe, photographs) for r in batch.replaced}
    assert "too_many_pixels" in replaced
