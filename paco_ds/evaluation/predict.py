"""Name what is on images, with a trained run: no shards are needed.

    paco-predict runs/demo photo.jpg
    paco-predict runs/demo photos/ --top 5 --output predictions.csv
    find photos -name "*.jpg" | paco-predict runs/demo - --output predictions.jsonl

A folder gives all images in it and below, in order of their names; `-` reads paths from standard input, one a line. An
image that cannot be read has an empty row, is named on standard error, and ends nothing.

example:
  paco-predict runs/demo photos/ --top 5 --output predictions.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import tee
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from paco_ds.command import one_line_on_interrupt, report_user_errors
from paco_ds.config.plugins import AllowCode
from paco_ds.data.names import is_hidden
from paco_ds.data.pack.source import ENDINGS, ending
from paco_ds.errors import UserError, printable
from paco_ds.files import whole_file

if TYPE_CHECKING:
    from paco_ds.evaluation.predictor import Predictor

SECONDS = 10  # between lines of progress
FORMATS = (".csv", ".jsonl")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if no image could be read."""
    arguments = _parser().parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        return _predict(arguments)


def _predict(arguments: argparse.Namespace) -> int:
    ending = arguments.output.suffix if arguments.output else ".csv"
    if ending not in FORMATS:
        raise UserError(f"--output {arguments.output} ends in neither .csv nor .jsonl, which say the format")
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top} names no class: give 1 or more")
    import torch

    from paco_ds.evaluation.predictor import load

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(arguments.run)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is none, or is not there
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    with _opened(arguments.output) as file:
        read, unreadable, seconds = _write(model, arguments, WRITERS[ending], file)
    if arguments.output:
        figures = f"{read} images ({read / seconds:.0f} a second), {unreadable} unreadable"
        print(printable(f"written: {arguments.output}: {figures}"), file=sys.stderr)
    return 0 if read else 1


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[str]]:
    """A file to write whole or not at all, or standard output; names that are not UTF-8 are written as they are."""
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
        return
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield text
        text.detach()  # flushes, and leaves the file open


def _write(model: Predictor, arguments: argparse.Namespace, writer: Any, file: IO[str]) -> tuple[int, int, float]:
    """Predict and write all images: (those read, those that cannot be read, seconds)."""
    top = min(arguments.top, len(model.class_names))
    names, pictures = tee(images_of(arguments.images))
    read, unreadable, began, said = 0, 0, time.monotonic(), time.monotonic()
    write = writer(file, top)
    for name, answer in zip(names, model.stream(pictures, top), strict=True):
        if isinstance(answer, tuple):
            read += 1
            write(name, [(each.name, each.probability) for each in answer])
        else:
            unreadable += 1
            print(printable(f"{name} cannot be read ({answer.reason})"), file=sys.stderr)
            write(name, [])
        if time.monotonic() - said > SECONDS:
            said = time.monotonic()
            print(f"{read + unreadable} images, {read / (said - began):.0f} a second", file=sys.stderr)
    if not read + unreadable:
        raise UserError(f"no image was given: {', '.join(arguments.images)} hold none")
    return read, unreadable, time.monotonic() - began


def images_of(places: Iterable[str]) -> Iterator[str]:
    """Paths of the images that files, folders and `-` name.

    Raises:
        UserError: there is no such file or folder.
    """
    for place in places:
        if place == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
        elif os.path.isdir(place):
            for folder, folders, files in os.walk(place):
                folders[:] = sorted(name for name in folders if not is_hidden(name))
                images = sorted(name for name in files if ending(name) in ENDINGS and not is_hidden(name))
                yield from (os.path.join(folder, name) for name in images)
        elif os.path.exists(place):
            yield place
        else:
            raise UserError(f"{place} is not there: give images, folders, or - for a list on standard input")


def _csv(file: IO[str], top: int) -> Any:
    table = csv.writer(file)
    table.writerow(["path", *(f"{what}_{n}" for n in range(1, top + 1) for what in ("class", "probability"))])

    def write(path: str, answer: list[tuple[str, float]]) -> None:
        table.writerow([path, *(cell for name, p in answer for cell in (name, f"{p:.6f}"))])

    return write


def _json_lines(file: IO[str], top: int) -> Any:
    def write(path: str, answer: list[tuple[str, float]]) -> None:
        classes = [{"class": name, "probability": round(p, 6)} for name, p in answer]
        file.write(json.dumps({"path": path, "predictions": classes or None}) + "\n")

    return write


WRITERS = {".csv": _csv, ".jsonl": _json_lines}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory of a training")
    parser.add_argument("images", nargs="+", help="images, folders, or - for a list of paths on standard input")
    parser.add_argument("--top", type=int, default=1, help="classes of each image, the most probable first")
    parser.add_argument("--output", type=Path, help="FILE.csv or FILE.jsonl; a table on standard output by default")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; a GPU by default if there is one")
    parser.add_argument("--allow-code", action=AllowCode)
    return parser


if __name__ == "__main__":
    sys.exit(main())
