"""A split to evaluate: its images, and the classes and shots that it is judged by."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paco_ds.config.data import DataSettings
from paco_ds.config.recipe import EvaluationSettings
from paco_ds.config.views import EvalView, TrainView
from paco_ds.data.manifest import Manifest
from paco_ds.data.names import most_alike, same_name
from paco_ds.data.pack.source import some
from paco_ds.data.shard import remedy_of
from paco_ds.data.stream.batches import MicroBatch, TrainingStream, evaluation_stream
from paco_ds.data.stream.load import Replaced
from paco_ds.distributed.ranks import MicroBatchLayout, Ranks
from paco_ds.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSplit:
    """A split of shards, and how it is read.

    Attributes:
        name: of the split.
        data: how shards are read, and the split whose counts make the shots.
        settings: images of a batch, and the share of the split's that may be unreadable and are left out by name.
        images: shards of the images where they are not those of training; of the same classes, or of some of them.
    """

    manifest: Manifest
    name: str
    data: DataSettings
    view: EvalView
    settings: EvaluationSettings
    images: Manifest | None = None

    def batches(self, ranks: Ranks) -> Iterator[MicroBatch]:
        """This rank's batches: every image once over all ranks, equally many batches on each; labels are of the classes
        of training."""
        batches = evaluation_stream(
            self.data,
            self.view,
            self.images or self.manifest,
            self.name,
            self.settings.batch,
            ranks.rank,
            ranks.world_size,
            leave_out_bad=self.settings.max_bad_share > 0,
        )
        if self.images is None:
            return batches
        index = class_index(self.images, self.manifest)
        return (replace(batch, labels=index[batch.labels]) for batch in batches)

    def random_views(
        self, views: Sequence[TrainView], layout: MicroBatchLayout, *, seed: int, epochs: int
    ) -> tuple[Iterator[MicroBatch], int]:
        """(this rank's micro-batches, with one random view of each kind; steps of an epoch): the split in the order of
        a training, for what is learned on it."""
        data, images = self.data.model_copy(update={"train_split": self.name}), self.images or self.manifest
        stream = TrainingStream(data, views, images, layout, seed=seed, epochs=epochs)
        index = None if self.images is None else class_index(self.images, self.manifest)

        def batches() -> Iterator[MicroBatch]:
            try:
                for micro_batches in stream:
                    for batch in micro_batches:
                        yield batch if index is None else replace(batch, labels=index[batch.labels])
            finally:
                stream.close()

        return batches(), stream.plan.steps_per_epoch

    @property
    def images_of_classes(self) -> Sequence[int]:
        """Images of the split in each class of training."""
        if self.images is None:
            return self.manifest.split(self.name).class_counts
        counts = self.images.split(self.name).class_counts
        of_each = [0] * len(self.manifest.classes)
        for number, images in zip(class_index(self.images, self.manifest), counts, strict=True):
            of_each[number] += images
        return of_each

    def left_out(self, mine: Sequence[Replaced], ranks: Ranks) -> tuple[str, ...]:
        """Names of the images of all ranks that could not be read, given those of this rank. A collective.

        Raises:
            DataError: on every rank, if there are more than `evaluation.max_bad_share` of the split.
        """
        share = self.settings.max_bad_share
        if not share:
            return ()
        for bad in mine:
            logger.warning("image %s was left out of the evaluation of %s", bad, self.name)
        found = [bad for of_rank in ranks.gather_objects([*mine]) for bad in of_rank]
        images = self.images or self.manifest
        samples = images.split(self.name).samples
        if len(found) > share * samples:
            raise DataError(
                f"{len(found)} of {samples} images of {self.name} cannot be read, more than evaluation.max_bad_share = "
                f"{share:g} allows, the first {found[0]}. "
                f"{remedy_of([bad.reason for bad in found], images.storage.url)}"
            )
        return tuple(map(str, found))

    @property
    def class_counts(self) -> Sequence[int]:
        """Training images of each class."""
        return self.manifest.split(self.data.train_split).class_counts

    @property
    def shots(self) -> Sequence[str]:
        """Shot of each class, by its training images."""
        return self.manifest.shots_of_classes(self.data.train_split)


def class_index(images: Manifest, trained: Manifest) -> Tensor:
    """Class of training, by name, of each class of other shards: int64 [C of the other shards].

    Raises:
        DataError: a class that was not trained.
    """
    number = {same_name(name): index for index, name in enumerate(trained.classes)}
    unknown = [name for name in images.classes if same_name(name) not in number]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        alike = most_alike(unknown[0], trained.classes)
        instead = f"{alike!r}, which the run has" if alike else f"one of the run's ({some(trained.classes)})"
        raise DataError(
            f"{images.storage.url} has the class {unknown[0]!r}{more}, which the run was not trained on; classes are "
            f"compared by name: in their source, rename it to {instead}, or leave its images out, then build these "
            f"shards again"
        )
    return torch.tensor([number[same_name(name)] for name in images.classes])
