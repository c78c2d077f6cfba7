"""List the nearest neighbours of an image among embedded images, by cosine similarity.

    paco-embed runs/demo photos/ --output photos.npz
    paco-neighbours photos.npz --query photos/a.jpg
    paco-neighbours photos.npz --query new.jpg --run runs/demo -k 20

An image that was embedded is looked up by its name and is not its own neighbour. Another one needs the --run whose
weights made the file. Copies of the query, byte by byte, are marked.

example:
  paco-neighbours photos.npz --query new.jpg --run runs/demo -k 10
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paco_ds.command import one_line_on_interrupt, report_user_errors
from paco_ds.config.plugins import AllowCode
from paco_ds.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from paco_ds.evaluation.embeddings import Embeddings, Floats


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        from paco_ds.evaluation.embeddings import load_embeddings, nearest

        if arguments.k < 1:
            raise UserError(f"-k {arguments.k} asks for no neighbour: give 1 or more")
        table = load_embeddings(arguments.embeddings)
        own = table.names.index(arguments.query) if arguments.query in table.names else None
        feature, sha256 = _query(table, arguments) if own is None else (table.features[own], table.sha256[own])
        ((found, similarities),) = nearest(feature[None], table.features, arguments.k + 1)
        rows = csv.writer(sys.stdout)
        others = [(row, value) for row, value in zip(found, similarities, strict=True) if row != own][: arguments.k]
        rows.writerow(["path", "similarity", "label", "predicted", "copy"])
        for row, value in others:
            copy = "copy" if table.sha256[row] == sha256 else ""
            rows.writerow([table.names[row], f"{value:.6f}", table.labels[row] or "", table.predicted[row], copy])
    return 0


def _query(table: Embeddings, arguments: argparse.Namespace) -> tuple[Floats, str]:
    """(features, SHA-256) of an image that was not embedded."""
    if arguments.run is None:
        raise UserError(
            f"{arguments.query} is not one of the images of {arguments.embeddings}: give one of them by its name, "
            f"or --run RUN, with which a new image is embedded"
        )
    from paco_ds.evaluation.predictor import Unreadable, load

    model = load(arguments.run)
    if model.digest != table.weights:
        raise CheckpointError(
            f"{arguments.embeddings} was made with other weights ({table.weights[:12]}) than those of {arguments.run} "
            f"({model.digest[:12]}): give that run, or embed the images again"
        )
    (answer,) = model.embed_stream([arguments.query])
    if isinstance(answer, Unreadable):
        raise UserError(f"--query {answer.name} cannot be read ({answer.reason}): give an image")
    return answer.feature, answer.sha256


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path, help="file of paco-embed")
    parser.add_argument("--query", required=True, help="an image: a name in that file, or a path with --run")
    parser.add_argument("--run", help="run directory whose weights made the file")
    parser.add_argument("-k", type=int, default=10, help="neighbours; fewer where the file has fewer")
    parser.add_argument("--allow-code", action=AllowCode)
    return parser


if __name__ == "__main__":
    sys.exit(main())
