"""The stream beside a GPU. Not run where there is none."""

import pytest
import torch

from paco_ds.data.manifest import load_manifest
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.build import build_stream
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("workers", [0, 3])
def test_images_are_page_locked_and_arrive_as_they_are(striped_shards, workers):
    """Both views, joined of the parts of all loader processes, go to the GPU while that computes."""
    recipe = tiny_recipe(f"data.workers={workers}", "schedule.epochs=1")
    stream = build_stream(recipe, load_manifest(striped_shards), MicroBatchLayout(8, 4, 0, 1))
    for batch in next(stream):
        for images in (batch.query, batch.key):
            assert images is not None
            assert images.is_pinned()
            assert torch.equal(images.to("cuda", non_blocking=True).cpu(), images)
    stream.close()
