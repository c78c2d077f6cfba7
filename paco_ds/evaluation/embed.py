"""Write the features of images before the classifier, with a trained run, on one rank or, by the launcher, on many.

    paco-embed runs/demo photos/ --output photos.npz
    paco-embed runs/demo data/mine --split train --output train.parquet

Each row has name, features, predicted class and probability, SHA-256 of the file, and the label where it is known: that
of shards, or a folder that is named as a class of the run. Features are not normalised.

example:
  paco-embed runs/demo data/mine --split train --output train.npz
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from paco_ds.command import one_line_on_interrupt, report_user_errors
from paco_ds.data.names import same_name
from paco_ds.errors import UserError
from paco_ds.evaluation.image_job import Progress, add_arguments, in_order, joined, pyarrow

if TYPE_CHECKING:
    from paco_ds.evaluation.images import ListedImage
    from paco_ds.evaluation.predictor import Prediction


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if no image could be read."""
    arguments = _parser().parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        from paco_ds.evaluation.embeddings import FORMATS, Embeddings

        if arguments.output.suffix not in FORMATS:
            raise UserError(f"--output {arguments.output} ends in neither .npz nor .parquet, the formats")
        if arguments.output.suffix == ".parquet":
            pyarrow()
        if not arguments.output.parent.is_dir():
            raise UserError(f"--output {arguments.output}: {arguments.output.parent} is no folder: make it first")
    with joined(arguments) as (model, ranks, images, left_out):
        import numpy as np

        from paco_ds.evaluation.predictor import Unreadable

        classes = {same_name(name): name for name in model.class_names}
        progress, rows = Progress(images, ranks, left_out), list[tuple["ListedImage", "Prediction", str]]()
        features = bytearray()  # grows in place: a stack of the rows would hold them twice
        for image, answer in in_order(images, model.batch, model.embed_stream, ranks):
            if isinstance(answer, Unreadable):
                progress.add(image.name, answer.reason)
                continue
            progress.add(image.name)
            if ranks.first:
                rows.append((image, answer.predicted, answer.sha256))
                features += answer.feature.tobytes()
        progress.require_images(arguments.images)
        if not progress.read:
            return 1
        if ranks.first:
            Embeddings(
                names=[image.name for image, *_ in rows],
                labels=[_label(image, classes) for image, *_ in rows],
                predicted=[predicted.name for _, predicted, _ in rows],
                probabilities=[predicted.probability for _, predicted, _ in rows],
                sha256=[sha256 for *_, sha256 in rows],
                features=np.frombuffer(features, np.float32).reshape(len(rows), -1),
                weights=model.digest,
                images=arguments.images,
                split=arguments.split,
            ).save(arguments.output)
        return progress.finish(arguments.output)


def _label(image: ListedImage, classes: Mapping[str, str]) -> str | None:
    """The class of the run that shards or the image's folder name; a class of shards that the run lacks as it is."""
    named = image.label or os.path.basename(os.path.dirname(image.name))
    return classes.get(same_name(named), image.label)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", "-o", type=Path, required=True, help="FILE.npz or FILE.parquet")
    return parser


if __name__ == "__main__":
    sys.exit(main())
