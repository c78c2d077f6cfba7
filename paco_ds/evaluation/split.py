"""A split to evaluate: its images, and the classes and shots that it is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paco_ds.config.recipe import DataSettings
from paco_ds.config.views import EvalView
from paco_ds.data.manifest import Manifest
from paco_ds.data.stream.batches import MicroBatch, evaluation_stream
from paco_ds.distributed.ranks import Ranks


@dataclass(frozen=True)
class EvaluationSplit:
    """A split of shards, and how it is read.

    Attributes:
        name: of the split.
        data: how shards are read, and the split whose counts make the shots.
        batch: images of a batch.
    """

    manifest: Manifest
    name: str
    data: DataSettings
    view: EvalView
    batch: int

    def batches(self, ranks: Ranks) -> Iterator[MicroBatch]:
        """This rank's batches: every image once over all ranks, equally many batches on each."""
        return evaluation_stream(
            self.data, self.view, self.manifest, self.name, self.batch, ranks.rank, ranks.world_size
        )

    @property
    def class_counts(self) -> Sequence[int]:
        """Training images of each class."""
        return self.manifest.split(self.data.train_split).class_counts

    @property
    def shots(self) -> Sequence[str]:
        """Shot of each class, by its training images."""
        return self.manifest.shots_of_classes(self.data.train_split)
