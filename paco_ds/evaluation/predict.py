"""Name what is on images, with a trained run, on one rank or, by the launcher, on many.

    paco-predict runs/demo photo.jpg
    paco-predict runs/demo photos/ --top 5 --output predictions.parquet
    find photos -name "*.jpg" | paco-predict runs/demo - --output predictions.jsonl
    deepspeed --module paco_ds.evaluation.predict runs/demo photos/ --output predictions.csv

A folder gives all images in it and below, in order of their names; shards (a folder with manifest.json), tars of
webdataset and patterns (quoted: "photos/**/*.jpg") are read too; `-` reads paths from standard input, one a line. The
output has the order of the input on any number of ranks. An image that cannot be read has an empty row, is named on
standard error, and ends nothing.

example:
  paco-predict runs/demo photos/ --top 5 --output predictions.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from paco_ds.command import one_line_on_interrupt, report_user_errors, standard_output
from paco_ds.errors import UserError
from paco_ds.evaluation.image_job import Progress, add_arguments, in_order, joined, pyarrow
from paco_ds.files import whole_file

if TYPE_CHECKING:
    from paco_ds.evaluation.predictor import Predictor

FORMATS = (".csv", ".jsonl", ".parquet")
_ROWS = 10_000  # of a row group of Parquet
Answer = list[tuple[str, float]]
Write = Callable[[str, Answer], None]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if no image could be read."""
    arguments = _parser().parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        _check(arguments)
    with joined(arguments) as (model, ranks, images, left_out):
        _set_temperature(model, arguments)
        top, progress = min(arguments.top, len(model.class_names)), Progress(images, ranks, left_out)
        with _writer(arguments.output, top) if ranks.first else nullcontext(lambda name, answer: None) as write:
            for image, answer in in_order(images, model.batch, lambda mine: model.stream(mine, top), ranks):
                if isinstance(answer, tuple):
                    progress.add(image.name)
                    write(image.name, [(each.name, each.probability) for each in answer])
                else:
                    progress.add(image.name, answer.reason)
                    write(image.name, [])
            progress.require_images(arguments.images)
        return progress.finish(arguments.output)


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for what can be told before the model is loaded."""
    if arguments.output and arguments.output.suffix not in FORMATS:
        raise UserError(f"--output {arguments.output} ends in neither .csv nor .jsonl nor .parquet, the formats")
    if arguments.output and arguments.output.suffix == ".parquet":
        pyarrow()
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top} names no class: give 1 or more")


def _set_temperature(model: Predictor, arguments: argparse.Namespace) -> None:
    if arguments.temperature == "auto":
        from paco_ds.evaluation.temperature import load_temperature

        model.temperature = load_temperature(Path(arguments.run), model.digest).temperature
    elif arguments.temperature is not None:
        model.temperature = float(arguments.temperature)


@contextmanager
def _writer(path: Path | None, top: int) -> Iterator[Write]:
    """Writes rows to a file that is there whole or not at all, or to standard output; names that are not UTF-8 are
    written as they are (in Parquet, whose texts are UTF-8, escaped)."""
    if path is None:
        if sys.stdout is None:
            raise UserError("standard output is closed: give --output FILE.csv, .jsonl or .parquet")
        with standard_output():
            yield _csv(sys.stdout, top)
        return
    with whole_file(path) as file:
        if path.suffix == ".parquet":
            with _parquet(file, top) as write:
                yield write
            return
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield (_csv if path.suffix == ".csv" else _json_lines)(text, top)
        text.detach()  # flushes, and leaves the file open


def _columns(top: int) -> list[str]:
    return ["path", *(f"{what}_{n}" for n in range(1, top + 1) for what in ("class", "probability"))]


@contextmanager
def _parquet(file: IO[bytes], top: int) -> Iterator[Write]:
    arrow, parquet = pyarrow(), pyarrow(".parquet")
    columns = _columns(top)
    kinds = [arrow.float32() if name.startswith("probability") else arrow.string() for name in columns]
    schema = arrow.schema(list(zip(columns, kinds, strict=True)))
    rows: list[dict[str, Any]] = []
    with parquet.ParquetWriter(file, schema) as table:

        def flush() -> None:
            table.write_table(arrow.Table.from_pylist(rows, schema))
            rows.clear()

        def write(path: str, answer: Answer) -> None:
            cells = [path.encode("utf-8", "backslashreplace").decode(), *(cell for pair in answer for cell in pair)]
            rows.append(dict(zip(columns, cells, strict=False)))  # without an answer the rest is null
            if len(rows) == _ROWS:
                flush()

        yield write
        flush()


def _csv(file: IO[str], top: int) -> Write:
    table = csv.writer(file)
    header = iter([_columns(top)])  # with the first row: a mistake leaves standard output empty

    def write(path: str, answer: Answer) -> None:
        table.writerows(header)
        table.writerow([path, *(cell for name, p in answer for cell in (name, f"{p:.6f}"))])

    return write


def _json_lines(file: IO[str], top: int) -> Write:
    def write(path: str, answer: Answer) -> None:
        classes = [{"class": name, "probability": round(p, 6)} for name, p in answer]
        file.write(json.dumps({"path": path, "predictions": classes or None}) + "\n")

    return write


def _temperature(text: str) -> str:
    if text != "auto" and not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is neither a positive number nor auto")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--top", type=int, default=1, help="classes of each image, the most probable first")
    parser.add_argument("--output", type=Path, help="FILE.csv, .jsonl or .parquet; a table on standard output if none")
    parser.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="divide logits by T, or by that of paco-evaluate --fit-temperature: auto",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
