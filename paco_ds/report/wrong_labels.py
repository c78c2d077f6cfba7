"""List images whose label may be wrong, tail first: those whose nearest neighbours are mostly of another class.

    paco-embed runs/demo data/mine --split train --output train.npz
    paco-wrong-labels train.npz --output candidates.html

The page shows the first 200 candidates, each beside its nearest neighbour of the class that is suggested; a CSV of the
same name beside it has all. Pictures are read from where paco-embed read them: run it in the same folder. Features of a
model that was trained on the same labels have partly learnt them: candidates are to be looked at, not to be deleted.

example:
  paco-wrong-labels train.npz --output candidates.html -k 10
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from paco_ds.command import one_line_on_interrupt, report_user_errors
from paco_ds.errors import UserError, printable
from paco_ds.files import replace_text

if TYPE_CHECKING:
    from paco_ds.evaluation.embeddings import Embeddings
    from paco_ds.evaluation.images import ListedImage
    from paco_ds.evaluation.label_noise import Candidate, Candidates

SHOWN = 200  # candidates of a page: at most 400 thumbnails, of some 5 KB each
_COLUMNS = ("path", "label", "suggested", "score", "class_size", "neighbour", "similarity", "predicted", "copies")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        from paco_ds.evaluation.embeddings import load_embeddings
        from paco_ds.evaluation.label_noise import wrong_labels
        from paco_ds.report.run_report import render

        page: Path = arguments.output
        if page.suffix != ".html":
            raise UserError(f"--output {page} does not end in .html: the page; its CSV is written beside it")
        if not page.parent.is_dir():
            raise UserError(f"--output {page}: {page.parent} is no folder: make it first")
        if arguments.k < 1:
            raise UserError(f"-k {arguments.k} asks for no neighbour: give 1 or more")
        table = load_embeddings(arguments.embeddings)
        if not any(label is not None for label in table.labels):
            raise UserError(
                f"{arguments.embeddings} has no labels: embed shards, or folders named as the run's classes"
            )
        candidates = wrong_labels(table, arguments.k)
        replace_text(page.with_suffix(".csv"), csv_text(table, candidates.found))
        replace_text(page, render("wrong_labels.html.j2", _context(table, candidates, arguments.k, page)))
        figures = f"{len(candidates.found)} candidates among {candidates.judged} images"
        print(printable(f"written: {page} and {page.with_suffix('.csv')}: {figures}"), file=sys.stderr)
    return 0


def csv_text(table: Embeddings, found: list[Candidate]) -> str:
    """Candidates as CSV; a cell that a spreadsheet would run begins with an apostrophe."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for each in found:
        numbers = {"score": f"{each.score:.4f}", "size": str(each.class_size), "similarity": f"{each.similarity:.6f}"}
        name, neighbour = _cell(table.names[each.image]), _cell(table.names[each.neighbour])
        labels = [_cell(each.label), _cell(each.suggested)]
        predicted, copies = _cell(table.predicted[each.image]), _cell("; ".join(each.copies))
        rows.writerow(
            [name, *labels, numbers["score"], numbers["size"], neighbour, numbers["similarity"], predicted, copies]
        )
    return text.getvalue()


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _context(table: Embeddings, candidates: Candidates, k: int, page: Path) -> dict[str, object]:
    shown = candidates.found[:SHOWN]
    wanted = {table.names[row] for each in shown for row in (each.image, each.neighbour)}
    thumbnails, reasons = _thumbnails(table, wanted)
    missing = len(wanted) - len(thumbnails)
    return {
        "title": "Candidates of wrong labels",
        "candidates": [
            {
                "each": each,
                "name": table.names[each.image],
                "neighbour": table.names[each.neighbour],
                "predicted": table.predicted[each.image],
                "image": thumbnails.get(table.names[each.image]),
                "neighbour_image": thumbnails.get(table.names[each.neighbour]),
                "copies": ", ".join(f"{name} ({n})" for name, n in sorted(Counter(each.copies).items())),
            }
            for each in shown
        ],
        "classes": list(dict.fromkeys(each.label for each in shown)),
        "found": len(candidates.found),
        "judged": candidates.judged,
        "alone": candidates.alone,
        "unlabelled": candidates.unlabelled,
        "k": k,
        "csv": page.with_suffix(".csv").name,
        "missing": missing,
        "wanted": len(wanted),
        "reasons": reasons,
        "weights": table.weights[:12],
    }


def _thumbnails(table: Embeddings, wanted: set[str]) -> tuple[dict[str, str], list[str]]:
    """(JPEG in base64 of each wanted image that can be read, why places cannot be listed)."""
    from paco_ds.evaluation.images import ListedImage, list_images
    from paco_ds.report.pictures import thumbnail

    found, reasons = dict[str, str](), list[str]()

    def take(image: ListedImage) -> None:
        if image.name in wanted and image.name not in found and (jpeg := thumbnail(image.read)):
            found[image.name] = jpeg

    for place in table.images:
        if place == "-":  # the list is gone; its paths are the names
            continue
        listed: Iterator[ListedImage] = iter(list_images([place], table.split))
        try:
            for image in listed:
                take(image)
        except (UserError, OSError) as error:
            reasons.append(str(error))
    for name in sorted(wanted - found.keys()):
        if os.path.isfile(name):
            take(ListedImage(name))
    return found, reasons


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path, help="file of paco-embed, of labelled images")
    parser.add_argument("--output", "-o", type=Path, required=True, help="FILE.html; FILE.csv is written beside it")
    parser.add_argument("-k", type=int, default=10, help="neighbours that judge; fewer in smaller classes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
