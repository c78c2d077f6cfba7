"""What paco-predict and paco-embed share: their arguments, the model, the images of each rank, lines of progress."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from paco_ds.command import one_line_on_interrupt, report_user_errors
from paco_ds.config.plugins import AllowCode
from paco_ds.data.pack.source import by_ending
from paco_ds.errors import UserError, printable
from paco_ds.evaluation.images import WHAT

if TYPE_CHECKING:
    from paco_ds.distributed.ranks import Ranks
    from paco_ds.evaluation.images import ListedImage
    from paco_ds.evaluation.predictor import Predictor

SECONDS = 10  # between lines of progress
A = TypeVar("A")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the images, and where the model runs."""
    parser.add_argument("run", help="run directory of a training")
    parser.add_argument("images", nargs="+", help=WHAT)
    parser.add_argument("--split", help="split of shards; all by default")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; a GPU by default if there is one")
    parser.add_argument("--weights", choices=("query", "key", "ema"), help="the run's evaluation.weights by default")
    parser.add_argument("--allow-code", action=AllowCode)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[tuple[Predictor, Ranks, Iterable[ListedImage], Counter[str]]]:
    """(model, ranks, all images, files of folders that are no images by ending) of a command, of one rank or of those
    of a launcher; errors are lines. The files are counted while images are listed, on the first rank.

    Raises:
        UserError: the device cannot be used, or a place is not there.
    """
    with one_line_on_interrupt(), report_user_errors():
        import torch

        from paco_ds.checkpoint import same_on_all_ranks
        from paco_ds.distributed.launch import environment_ranks, join_job, leave_job
        from paco_ds.distributed.ranks import Ranks
        from paco_ds.distributed.watchdog import RankWatchdog
        from paco_ds.evaluation.images import list_images
        from paco_ds.evaluation.predictor import load

        model = load(arguments.run, weights=arguments.weights)
        left_out = Counter[str]()
        images: Iterable[ListedImage] = list_images(arguments.images, arguments.split, left_out)
        if environment_ranks()[1] == 1:
            device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
            _move(model, device)
            yield model, Ranks(0, 1, 0, model.device), images, left_out
            return
        with RankWatchdog():
            ranks = join_job(None)
            same_on_all_ranks(model.checkpoint, Path(arguments.run), ranks)
            _move(model, arguments.device or str(ranks.device))
            # one rank reads the list: standard input has one reader, and a folder may change
            images = ranks.gather_objects(list(images) if ranks.first else None)[0]
            yield model, ranks, images, left_out
            leave_job()


def _move(model: Predictor, device: str) -> None:
    if device == "meta":
        raise UserError("--device meta cannot be used: it holds no values")
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is none, or is not there
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def in_order(
    images: Iterable[ListedImage],
    batch: int,
    answer: Callable[[Iterable[ListedImage]], Iterator[A]],
    ranks: Ranks,
) -> Iterator[tuple[ListedImage, A]]:
    """(image, answer) of all images in their order, on every rank. Rank j mod W answers batch j, so that a batch, and
    with it each answer, is the same on any number of ranks. A collective."""
    if ranks.world_size == 1:
        named, pictures = tee(images)
        yield from zip(named, answer(pictures), strict=True)
        return
    assert isinstance(images, Sequence)
    starts = range(ranks.rank * batch, len(images), ranks.world_size * batch)
    mine = answer(image for start in starts for image in images[start : start + batch])
    every = iter(images)
    for _ in range(math.ceil(len(images) / (batch * ranks.world_size))):
        for of_rank in ranks.gather_objects(list(islice(mine, batch))):
            # answers first: zip also takes from its first iterator where the second has ended, and loses what it took
            yield from ((image, each) for each, image in zip(of_rank, every, strict=False))


class Progress:
    """Counts images, names those that cannot be read, and says on standard error how far it is.

    Args:
        images: all of them; their number is said if it is known.
        left_out: number of files that are no images, by ending.
    """

    def __init__(self, images: Iterable[ListedImage], ranks: Ranks, left_out: Mapping[str, int]) -> None:
        self._left_out = left_out
        self._of = f" of {len(images):,}" if isinstance(images, Sequence) else ""
        self.read, self.unreadable, self._first = 0, 0, ranks.first
        self._began = self._said = time.monotonic()

    def add(self, name: str, unreadable: str | None = None) -> None:
        """Count an image, or one that cannot be read for this reason."""
        self.read += unreadable is None
        self.unreadable += unreadable is not None
        if unreadable is not None:
            self.say(f"{name} cannot be read ({unreadable})")
        if time.monotonic() - self._said > SECONDS:
            self._said = time.monotonic()
            self.say(f"{self.read + self.unreadable:,}{self._of} images, {self._rate:.0f} a second")

    def finish(self, output: Path | None) -> int:
        """Say what was written; returns the exit status, 1 if no image could be read."""
        if output:
            figures = f"{self.read} images ({self._rate:.0f} a second), {self.unreadable} unreadable"
            self.say(f"written: {output}: {figures}")
        if self._left_out:
            self.say(f"left out, not images by their ending: {by_ending(self._left_out)}")
        return 0 if self.read else 1

    def require_images(self, places: Sequence[str]) -> None:
        """Raise UserError if there were none."""
        if not self.read + self.unreadable:
            where = ["standard input" if place == "-" else place for place in places]
            others = f" (not images by their ending: {by_ending(self._left_out)})" if self._left_out else ""
            raise UserError(f"no image was given: there is none in {', '.join(where)}{others}")

    def say(self, text: str) -> None:
        """A line on standard error, of the first rank."""
        if self._first:
            print(printable(text), file=sys.stderr, flush=True)

    @property
    def _rate(self) -> float:
        return self.read / max(time.monotonic() - self._began, 1e-9)


def pyarrow(part: str = "") -> Any:
    """The library of Parquet, or its `part`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(f"pyarrow{part}")
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install 'paco_ds[parquet]', or choose another ending") from None
