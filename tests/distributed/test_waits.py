"""The host reads nothing from the device in a step: it runs ahead, and a GPU always has work."""

from typing import Any

import pytest
import torch

from paco_ds.distributed.ranks import to_device
from tests.distributed.waiting import WAITS

METHODS = {
    "paco": (),
    "paco, global batch": ("loss.contrast_scope=global_batch",),
    "gpaco": ("key_encoder=none",),
    "bcl": ("loss.method=bcl", "key_encoder=none", "queue.length=0"),
    "proco": ("loss.method=proco", "key_encoder=none", "loss.temperature=0.1"),
    "experts": ("model.experts=2",),
    "cross_entropy": ("loss.method=cross_entropy",),
    "clipped": ("optimizer.clip_norm=1", "engine.max_grad_norm_ratio=100"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_is_read_in_a_step(pool, world_size, method):
    """Without ZeRO, with a full queue; the figures are copied behind the step."""
    reads = pool(world_size).run("tests.distributed.waiting:host_reads", stage=0, overrides=METHODS[method])
    assert reads == [{}] * world_size


@pytest.mark.parametrize("stage", [1, 2])
def test_of_zero_only_deepspeeds_own_are_left(pool, stage):
    """It asks whether a gradient overflowed."""
    for reads in pool(2).run("tests.distributed.waiting:host_reads", stage=stage):
        assert reads
        assert all(" in deepspeed/" in place for place in reads)


@pytest.mark.parametrize("wait", WAITS)
def test_a_read_that_is_put_into_the_step_is_found(pool, wait):
    """With the line that asks: the tests above can fail."""
    (reads,) = pool(1).run("tests.distributed.waiting:host_reads", stage=0, wait=wait)
    assert len(reads) == 1, reads


def test_the_host_does_not_wait_for_what_it_sends():
    """A tensor that lies where it may be paged out is copied from page-locked memory, by a copy nobody waits for."""
    copies = []

    class OnHost:
        device = torch.device("cpu")

        def __init__(self, pinned):
            self.is_pinned = lambda: pinned
            self.pin_memory = lambda: OnHost(True)
            self.to = lambda device, non_blocking: copies.append((device.type, pinned, non_blocking))

    for pinned in (False, True):
        tensor: Any = OnHost(pinned)
        to_device(tensor, torch.device("cuda"))
    assert copies == [("cuda", True, True)] * 2


def test_until_the_queue_is_full_its_length_is_read(pool):
    """Of the first steps of a run the host must know whether they were applied."""
    (reads,) = pool(1).run("tests.distributed.waiting:host_reads", stage=0, filled=0)
    assert set(reads) == {next(place for place in reads if "contrast/key_queue.py" in place)}
