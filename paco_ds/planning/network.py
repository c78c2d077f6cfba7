"""What a job asks of network and hosts, on paper: time on the link, connections, open files, steps of an epoch."""

from __future__ import annotations

from collections.abc import Sequence

from paco_ds.contrast.key_exchange import exchange_peers
from paco_ds.data.shard import MAX_OPEN_SHARDS
from paco_ds.data.stream.partition import shards_at_once
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.planning.planned_rank import PlannedRank
from paco_ds.planning.traffic import Traffic

LINKS = (10, 25, 100, 200, 400)  # Gbit/s of a rank's share of the network
FEWEST_STEPS = 50  # of an epoch
AHEAD = "key images"  # the row of traffic that is sent while the step before is computed


def link_seconds(traffic: Sequence[Traffic]) -> dict[int, dict[str, float]]:
    """Seconds that a step's bytes take on a link, by Gbit/s: `ahead`, of what is sent a step ahead, and `exposed`, the
    most that the rest adds to a step if nothing of it overlaps with computing. Latency is not counted."""
    ahead = sum(row.bytes for row in traffic if row.what == AHEAD)
    rest = sum(row.bytes for row in traffic) - ahead
    return {speed: {"ahead": 8e-9 * ahead / speed, "exposed": 8e-9 * rest / speed} for speed in LINKS}


def connections(rank: PlannedRank, device: str) -> dict[str, int]:
    """Connections of a rank to others, by purpose; those of rank 0 where it has more.

    NCCL's exchange of key images connects a rank with all it may send to, its rings and trees with a few. gloo connects
    every rank with every other at the start.
    """
    layout, recipe = rank.layout, rank.recipe
    others = layout.world_size - 1
    if not others:
        return {}
    found = {"watchdog and store, rank 0": 2 * others, "watchdog and store, other ranks": 2}
    if device == "cpu":
        return {"gloo": others, **found}
    if rank.exchanges_images:
        assert recipe.key_encoder is not None
        found = {"key images": len(exchange_peers(layout, recipe.key_encoder.shuffle_block)), **found}
    return {"rings of reductions and gatherings": min(2, others), **found}


def open_files(shards: Sequence[int], layout: MicroBatchLayout, window: int, workers: int) -> int:
    """Estimate of the shards that a rank's loader processes hold open at the same time, none over its limit."""
    read = shards_at_once(shards, layout, window)
    return min(read, len(shards), MAX_OPEN_SHARDS) * max(workers, 1)


def few_steps_hint(steps_per_epoch: int, layout: MicroBatchLayout) -> str | None:
    """A hint in words if the set is too small for so many ranks, else None."""
    if steps_per_epoch >= FEWEST_STEPS:
        return None
    said = f"{steps_per_epoch} steps an epoch, under {FEWEST_STEPS}: the set is small for "
    if fitting := layout.micro_batches * steps_per_epoch // FEWEST_STEPS:
        return (
            f"{said}so many ranks; with step.micro_batches={fitting} or fewer, and as many ranks at most, it has "
            f"{FEWEST_STEPS}"
        )
    return f"{said}step.micro_batch={layout.micro_batch}: lower it, or train for more epochs"
