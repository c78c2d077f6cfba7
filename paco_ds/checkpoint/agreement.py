"""Whether all ranks found the same checkpoint."""

from __future__ import annotations

from pathlib import Path

from paco_ds.checkpoint.read import MODEL, Checkpoint
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import RecipeError


def same_on_all_ranks(checkpoint: Checkpoint | None, run: Path, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint that this rank found in a run directory, if every rank found the same step with the same weights;
    a collective.

    Raises:
        RecipeError: they did not: the run directory is not shared, a file cannot be read by all, or a training writes
            there meanwhile.
    """
    mine = f"step {checkpoint.step} ({checkpoint.state['sha256'][MODEL][:8]})" if checkpoint else "none"
    found = ranks.gather_objects(mine)
    if len(set(found)) > 1:
        of_ranks = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(found))
        raise RecipeError(
            f"ranks found different checkpoints in {run} ({of_ranks}): put the run directory (--output of a training) "
            f"on storage that all hosts share, and wait until no training writes there"
        )
    return checkpoint
