"""What the paper's closed forms mean for a data set, alpha and queue length (see docs/theory.md).

paco-theory --card fashion-mnist-lt --alpha .05 --queue 8192 --micro-batch 32
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paco_ds.command import Screen, at_least, report_user_errors
from paco_ds.config.shipped import find_card
from paco_ds.data.manifest import MANIFEST_FILE, load_manifest
from paco_ds.data.pack.card import load_card
from paco_ds.data.pack.read import class_counts
from paco_ds.errors import DataError, UserError

if TYPE_CHECKING:  # with matplotlib and torch, which --help need not wait for
    from paco_ds.paper.optima import LongTail


def read_long_tail(where: Path, split: str = "train", root: Path | None = None) -> LongTail:
    """Class counts of a split, from built shards or from a dataset card whose labels are at hand.

    Args:
        where: a directory of shards (or its manifest.json), or a card.
        root: folder of the card's files, if not the one it names.

    Raises:
        DataError: there is no such split, or nothing at hand tells how many images its classes have.
    """
    from paco_ds.paper.optima import LongTail

    if where.is_dir() or where.name == MANIFEST_FILE:
        manifest = load_manifest(where if where.is_dir() else where.parent)
        name, classes, shots = manifest.name, manifest.classes, manifest.shots
        counts = manifest.split(split).class_counts
    else:
        where = find_card(where)
        card = load_card(where)
        if split not in card.splits:
            raise DataError(f"card {where} has no split {split!r}; its splits are: {', '.join(card.splits)}")
        try:
            classes, counts = class_counts(card, root or where.parent / card.root, split)
        except DataError as error:
            raise DataError(
                f"the class counts of {where} are not at hand: {error}. Give --root FOLDER with the files the card "
                f"names for {split}, or give as --card the directory of its built shards, whose {MANIFEST_FILE} has "
                f"the counts (paco-build-shards build {where} --output DIRECTORY)"
            ) from error
        name, shots = card.name, card.shots
    order = [c for c in sorted(range(len(counts)), key=lambda c: -counts[c]) if counts[c]]
    return LongTail(
        name,
        split,
        tuple(classes[c] for c in order),
        tuple(shots.of(counts[c]) for c in order),
        np.array([counts[c] for c in order]),
        tuple(name for name, count in zip(classes, counts, strict=True) if not count),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, draw the pictures if there is an --output; returns the exit status."""
    arguments = _parser().parse_args(argv)
    from paco_ds.paper.optima import OptimaPage

    with report_user_errors():
        output: Path | None = arguments.output
        if output is not None and output.suffix not in ("", ".png"):
            raise UserError(f"--output {output} is neither a folder nor a .png: name it so")
        page = OptimaPage(
            read_long_tail(arguments.card, arguments.split, arguments.root),
            arguments.alpha,
            arguments.queue,
            arguments.micro_batch,
        )
        # A pipe or a log has no width of its own, and 80 columns would cut figures off.
        page.show(Screen() if sys.stdout.isatty() else Screen(width=120))
        if output is not None:
            print("drawn:", *page.draw(output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Head to tail, the optimum of SupCon and of PaCo, and which alpha gives which p_c.",
        epilog="example:\n  paco-theory --card fashion-mnist-lt --alpha .05 --queue 256 --output runs/theory",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--card", required=True, type=Path, help="dataset card (path or name), or directory of shards")
    parser.add_argument("--split", default="train", help="whose class counts (default %(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the card's files, if not the one it names")
    parser.add_argument("--alpha", type=_positive, default=0.05, help="weight of a positive (default %(default)s)")
    parser.add_argument("--queue", type=at_least(0), default=8192, help="queue.length (default %(default)s)")
    parser.add_argument("--micro-batch", type=at_least(1), default=32, help="step.micro_batch (default %(default)s)")
    parser.add_argument("--output", type=Path, help="a .png for one picture, a folder for one picture each")
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
