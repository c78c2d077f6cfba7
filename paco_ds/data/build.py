"""Owns the building of shards from a card's images, and the commands ``build`` and ``check``."""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from paco_ds.data.card import Card, folder_card, load_card
from paco_ds.data.manifest import MANIFEST_FILE, Manifest, Shard, Split, load_manifest
from paco_ds.data.shard import ShardReader, check_shard
from paco_ds.data.sources import Source, read_source
from paco_ds.data.storage import Storage
from paco_ds.data.write import ShardJob, plan_shards, write_shard
from paco_ds.errors import DataError
from paco_ds.files import PARTIAL, whole_file

SHARD_BYTES = 256 * 2**20
Job = TypeVar("Job")
Result = TypeVar("Result")


def build_shards(
    card: Card,
    root: Path,
    output: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Build shards, indexes and, last, the manifest of every split of a card.

    The same images, seed and shard size give the same bytes with any number of workers.

    Raises:
        DataError: ``output`` has shards and ``overwrite`` is off, or the source is not as the card says.
    """
    console = console or Console(quiet=True)
    _refuse_existing(output, overwrite)
    source = read_source(card, root)
    if source.ignored:
        counts = ", ".join(f"{n} {ending}" for ending, n in sorted(source.ignored.items()))
        console.print(f"left out, not images by their ending: {counts}", markup=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    jobs = []
    for split, samples in source.splits.items():
        first_id = 0
        for number, part in enumerate(plan_shards(samples, split, seed, shard_bytes)):
            name = f"{split}-{number:05d}"
            jobs.append(ShardJob(output, name, split, first_id, tuple(part), source.classes))
            first_id += len(part)
    shards = _run(write_shard, jobs, [len(job.samples) for job in jobs], workers, "building", console)
    manifest = Manifest(
        name=card.name,
        license=card.license,
        source=card.homepage or card.source,
        seed=seed,
        classes=source.classes,
        mean=card.mean,
        std=card.std,
        shots=card.shots,
        splits={split: _describe(split, source, jobs, shards) for split in source.splits},
    )
    with whole_file(output / MANIFEST_FILE) as file:
        file.write(manifest.model_dump_json(indent=1).encode() + b"\n")
    _remove_stale(output, {shard.name for shard in shards})
    return load_manifest(output)


def check_shards(manifest: Manifest, *, workers: int = 1, console: Console | None = None) -> list[str]:
    """All damage of the shards of a manifest, a line each; an empty list if there is none."""
    jobs = [
        (manifest.storage, split, number) for split in manifest.splits.values() for number in range(len(split.shards))
    ]
    weights = [split.shards[number].samples for _, split, number in jobs]
    found = _run(_check_job, jobs, weights, workers, "checking", console or Console(quiet=True))
    problems = [line for lines in found for line in lines]
    if not problems:
        for split in manifest.splits.values():
            counts = np.bincount(ShardReader(manifest.storage, split).labels(), minlength=len(manifest.classes))
            if tuple(counts) != split.class_counts:
                problems.append(f"split {split.name}: class_counts of the manifest are not those of the indexes")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """``build`` and ``check``; 0 all well, 1 damage found, 2 something given is wrong, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        return arguments.command(arguments, console)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; give the same command again", file=sys.stderr)
        return 130


def _build(arguments: argparse.Namespace, console: Console) -> int:
    if (arguments.card is None) == (arguments.source is None):
        raise DataError("give either a dataset CARD or --source folder with --root")
    if arguments.card is None:
        if arguments.root is None:
            raise DataError("--source folder needs --root, the folder that holds the images")
        card: Card = folder_card(arguments.root)
        root = arguments.root
    else:
        card = load_card(arguments.card)
        root = arguments.root or arguments.card.parent / card.root
    started = time.perf_counter()
    manifest = build_shards(
        card,
        root,
        arguments.output,
        seed=arguments.seed,
        shard_bytes=arguments.shard_bytes,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        console=console,
    )
    console.print(_summary(manifest, time.perf_counter() - started))
    return 0


def _check(arguments: argparse.Namespace, console: Console) -> int:
    manifest = load_manifest(arguments.directory)
    problems = check_shards(manifest, workers=arguments.workers, console=console)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{arguments.directory}: {len(problems)} problems; copy the named files again, or rebuild")
        return 1
    samples = sum(split.samples for split in manifest.splits.values())
    shards = sum(len(split.shards) for split in manifest.splits.values())
    print(f"{arguments.directory}: all well, {samples} samples in {shards} shards")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_shards", description="Make webdataset shards with an index and a manifest; check them."
    )
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="images to shards, as a dataset card says")
    build.add_argument("card", nargs="?", type=Path, help="YAML page in shards/; see shards/README.md")
    build.add_argument("--output", required=True, type=Path, help="directory of the shards")
    build.add_argument("--source", choices=["folder"], help="without a card: images in a folder per class")
    build.add_argument("--root", type=Path, help="where the images are, if not where the card says")
    build.add_argument("--seed", type=int, default=0, help="of the order inside the shards")
    build.add_argument("--shard-bytes", type=_at_least_1, default=SHARD_BYTES, help="largest shard, in bytes")
    build.add_argument("--overwrite", action="store_true", help="replace the shards in --output")
    build.set_defaults(command=_build)
    check = commands.add_parser("check", help="verify every byte of a directory of shards")
    check.add_argument("directory", type=Path)
    check.set_defaults(command=_check)
    for command in (build, check):
        command.add_argument("--workers", type=_at_least_1, default=len(os.sched_getaffinity(0)), help="processes")
    return parser


def _at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _summary(manifest: Manifest, seconds: float) -> Table:
    table = Table("split", "classes", "samples", "imbalance", "bytes", "shards", title=manifest.name)
    for split in manifest.splits.values():
        counts = split.class_counts
        imbalance = f"{max(counts) / min(counts):.1f}" if min(counts) else "a class is empty"
        numbers = (len(counts), split.samples, imbalance, f"{split.bytes:,}", len(split.shards))
        table.add_row(split.name, *map(str, numbers))
    table.caption = f"{seconds:.1f} s"
    if "train" in manifest.splits:
        shots = Counter(manifest.shots_of_classes())
        table.caption = ", ".join(f"{shots[s]} {s}" for s in ("many", "medium", "few")) + f"; {table.caption}"
    return table


def _describe(split: str, source: Source, jobs: Sequence[ShardJob], shards: Sequence[Shard]) -> Split:
    own = tuple(shard for job, shard in zip(jobs, shards, strict=True) if job.split == split)
    counts = np.bincount([sample.label for sample in source.splits[split]], minlength=len(source.classes))
    return Split(
        name=split,
        samples=int(counts.sum()),
        class_counts=tuple(counts.tolist()),
        bytes=sum(shard.bytes for shard in own),
        shards=own,
    )


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if overwrite or not output.exists():
        return
    if (output / MANIFEST_FILE).exists():
        raise DataError(f"{output} holds shards already; give another --output, or --overwrite to replace them")
    foreign = [tar.name for tar in output.glob("*.tar") if not _index_of(tar).exists()]
    if foreign:
        raise DataError(f"{output} holds {foreign[0]}, which is not ours; give another --output")


def _remove_stale(output: Path, names: set[str]) -> None:
    """What earlier or interrupted builds left: tars that have an index beside them, and partial files."""
    for tar in output.glob("*-*.tar"):
        if tar.stem not in names and _index_of(tar).exists():
            tar.unlink()
            _index_of(tar).unlink()
    for partial in output.glob(f".*{PARTIAL}"):
        partial.unlink()


def _index_of(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}.index.npy")


def _check_job(job: tuple[Storage, Split, int]) -> list[str]:
    return check_shard(*job)


def _run(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    weights: Sequence[int],
    workers: int,
    title: str,
    console: Console,
) -> list[Result]:
    """Results in the order of the jobs, from this process or a pool; the bar counts samples."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
    )
    results: dict[int, Result] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=sum(weights))
        for number, result in _results(function, jobs, min(workers, len(jobs))):
            results[number] = result
            progress.advance(task, weights[number])
    return [results[number] for number in range(len(jobs))]


def _results(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Result]]:
    if workers == 1:
        yield from ((number, function(job)) for number, job in enumerate(jobs))
        return
    context = multiprocessing.get_context("forkserver")
    # An interrupt is this process's to answer: the others finish the shard they have.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, context, signal.signal, ignore) as pool:
        numbers = {pool.submit(function, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
