"""The command `paco-build-shards`: options, output, exit codes."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from paco_ds.command import (
    Screen,
    at_least,
    exit_status,
    report_error,
    report_interrupt,
    require_utf8_names,
    say,
    standard_output,
)
from paco_ds.config.plugins import allow_code, is_plugin
from paco_ds.config.shipped import find_card
from paco_ds.data.manifest import SHOTS, Manifest, load_manifest
from paco_ds.data.pack.add import add_images
from paco_ds.data.pack.build_plan import SHARD_BYTES, BuildOptions
from paco_ds.data.pack.build_ranks import rank_of_environment
from paco_ds.data.pack.card import SPLIT_NAMES, Card, card_of_options, card_type, card_types, changed, load_card
from paco_ds.data.pack.check import check_shards
from paco_ds.data.pack.duplicates import describe, find_duplicates
from paco_ds.data.pack.shards import BAD_IMAGES_FILE, build_share
from paco_ds.data.pack.suggest import command_of, histogram, suggest, write_files
from paco_ds.errors import DataError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 success, 1 damage or duplicates found, 130 interrupted, or that of the error."""
    try:
        require_utf8_names()
        with standard_output():
            arguments = _parser(_known_sources(argv)).parse_args(argv)
            code: int = arguments.command(arguments, Screen())
            return code
    except (UserError, OSError) as error:
        report_error(error)
        return exit_status(error) or UserError.status
    except KeyboardInterrupt:
        return report_interrupt()


def _build(arguments: argparse.Namespace, console: Screen) -> int:
    """`build` into --output, or `add` to a directory of shards."""
    card, root = card_and_root(arguments)
    options, rank = _options(arguments), rank_of_environment()
    if rank.number:
        console = Screen(quiet=True)
    started = time.perf_counter()
    if arguments.directory is None:
        manifest = build_share(card, root, arguments.output, options, rank, console)
    else:
        manifest = add_images(arguments.directory, card, root, options, rank, console)
    if manifest is not None:
        console.print(_summary(manifest, time.perf_counter() - started))
        _say_bad(manifest, console)
        if arguments.directory is not None:
            console.print(f"revision {manifest.revision}; the previous manifest is kept beside it", highlight=False)
    return 0


def _check(arguments: argparse.Namespace, console: Screen) -> int:
    manifest = load_manifest(arguments.directory)
    problems = check_shards(manifest, workers=arguments.workers, console=console)
    for problem in problems:
        say(problem)
    if problems:
        say(f"{arguments.directory}: {len(problems)} problems; copy the named files again, or rebuild")
        return 1
    samples = sum(split.samples for split in manifest.splits.values())
    shards = sum(len(split.shards) for split in manifest.splits.values())
    say(f"{arguments.directory}: no damage, {samples} samples in {shards} shards")
    return _say_duplicates(manifest, arguments.workers, console) if arguments.duplicates else 0


def _say_duplicates(manifest: Manifest, workers: int, console: Screen) -> int:
    """Print pictures that are in the shards more than once; status 1 if there are any."""
    found = [
        line
        for pairs in find_duplicates(manifest, workers=workers, console=console)
        for line in describe(manifest, pairs)
    ]
    for line in found:
        say(line)
    if not found:
        say(f"{manifest.storage.url}: no picture twice")
    return 1 if found else 0


def _suggest(arguments: argparse.Namespace, console: Screen) -> int:
    manifest = load_manifest(arguments.directory)
    counts = manifest.split("train").class_counts
    table = Table("images of a class", "classes", "images", title=f"{manifest.name}: train", title_justify="left")
    rows = histogram(counts)
    most = max(classes for _, classes, _ in rows)
    table.add_column("")
    for bounds, classes, images in rows:
        table.add_row(bounds, f"{classes:,}", f"{images:,}", "█" * math.ceil(30 * classes / most))
    console.print(table)
    shots = Counter(manifest.shots_of_classes())
    say(f"shots: {', '.join(f'{shots[s]:,} {s}' for s in SHOTS)} of {len(counts):,} classes")
    say(f"imbalance factor: {max(counts) / max(min(counts), 1):.1f} ({max(counts):,} / {min(counts):,})")
    suggestion = suggest(manifest)
    for line in suggestion.reasons:
        say(f"- {line}")
    card, recipe = write_files(manifest, suggestion, arguments.output, arguments.overwrite)
    say(f"written: {card}, {recipe}")
    missing = [split for split in ("val", "test") if split not in manifest.splits]
    if missing:
        shares = " and ".join({"val": "--validation-share", "test": "--test-share"}[split] for split in missing)
        say(
            f"there is no split {' and no '.join(missing)}: settings are chosen on val and results reported on "
            f"test; build with {shares} to take some of train"
        )
    if missing == ["val", "test"]:
        say("the recipe needs one of them: build again before you train")
    else:
        say(f"train: {command_of(recipe, suggestion)}")
    return 0


def card_and_root(arguments: argparse.Namespace) -> tuple[Card, str]:
    """The card, read or made from options and changed by them, and the root of its images."""
    if (arguments.card is None) == (arguments.source is None):
        raise DataError("give either a dataset CARD or --source with --root")
    if arguments.card is not None:
        given = [f"--{name.replace('_', '-')}" for name in arguments.card_keys if getattr(arguments, name) is not None]
        if given:
            raise DataError(f"{', '.join(given)} are keys of a card: leave them out, or the card {arguments.card}")
        path = find_card(arguments.card)
        card = load_card(path)
        root = arguments.root or _beside(path, card.root)
    else:
        if arguments.root is None:
            raise DataError(f"--source {arguments.source} needs --root, the folder that holds the images")
        card = card_of_options({name: getattr(arguments, name) for name in ("source", "root", *arguments.card_keys)})
        root = arguments.root
    changes: dict[str, Any] = {}
    if arguments.imbalance_factor is not None:
        of_card = card.imbalance.model_dump() if card.imbalance else {}
        of_profile = {"profile": arguments.imbalance_profile} if arguments.imbalance_profile else {}
        changes["imbalance"] = of_card | {"factor": arguments.imbalance_factor} | of_profile
    elif arguments.imbalance_profile is not None:
        raise DataError("--imbalance-profile needs --imbalance-factor")
    for key in ("validation_share", "test_share", "background"):
        if getattr(arguments, key) is not None:
            changes[key] = getattr(arguments, key)
    if arguments.resize_short is not None:
        changes["resize"] = {"short": arguments.resize_short} | (
            {"quality": arguments.quality} if arguments.quality is not None else {}
        )
    elif arguments.quality is not None:
        raise DataError("--quality needs --resize-short: images that are not resized keep their bytes")
    return (changed(card, **changes) if changes else card), root


def _beside(card: Path, root: str) -> str:
    return root if "://" in root else str(card.parent / root)


def _options(arguments: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        seed=arguments.seed,
        shard_bytes=arguments.shard_bytes,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        verify=arguments.verify,
        max_bad=arguments.max_bad,
    )


def _known_sources(argv: Sequence[str] | None) -> dict[str, type[Card]]:
    """The sources whose options are offered: all of the package, and the `module:Class` that --source names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--source", default="")
    first.add_argument("--allow-code", action="store_true")
    given, _ = first.parse_known_args(argv)
    if given.allow_code:
        allow_code()
    return card_types() | ({given.source: card_type(given.source, "--source")} if is_plugin(given.source) else {})


_EXAMPLES = """examples:
  paco-build-shards build fashion-mnist-lt --output data/fashion-mnist-lt
  paco-build-shards build --source folder --root images --output data/mine    images/train/CLASS/*.jpg, val/, test/
  paco-build-shards check data/mine
  paco-build-shards suggest data/mine"""


def _parser(sources: Mapping[str, type[Card]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make webdataset shards with an index and a manifest; check them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the launcher; RANK is used instead
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser(
        "build",
        help="build shards from the images of a dataset card or --source",
        description="If interrupted, give the same command again: it resumes, and ends with the same bytes. Started by "
        "`deepspeed --hostfile hosts --module paco_ds.data.pack.command build ...` on a shared file system, ranks "
        "share the work.",
    )
    _add_source_options(build, sources)
    build.add_argument("--output", required=True, help="directory of the shards: a path or any fsspec URL")
    build.add_argument("--overwrite", action="store_true", help="replace the shards in --output")
    build.set_defaults(command=_build, directory=None)
    add = commands.add_parser("add", help="add images and classes, matched by name, to finished shards")
    add.add_argument("directory", help="path or URL of the shards")
    _add_source_options(add, sources)
    add.set_defaults(command=_build, overwrite=False)
    check = commands.add_parser("check", help="verify every byte of a directory of shards")
    check.add_argument("directory", help="path or URL of the shards")
    check.add_argument(
        "--duplicates",
        action="store_true",
        help="name pictures that are in a split twice or in two, also nearly the same",
    )
    check.set_defaults(command=_check)
    ask = commands.add_parser(
        "suggest", help="show class counts and shots; suggest settings; write a card and a recipe"
    )
    ask.add_argument("directory", help="path or URL of the shards")
    ask.add_argument("--output", type=Path, default=Path("suggested"), help="folder of the two files (suggested)")
    ask.add_argument("--overwrite", action="store_true", help="replace the files in --output")
    ask.set_defaults(command=_suggest)
    for command in (build, add, check):
        command.add_argument("--workers", type=at_least(1), default=len(os.sched_getaffinity(0)), help="processes")
    return parser


def _add_source_options(command: argparse.ArgumentParser, sources: Mapping[str, type[Card]]) -> None:
    """Options that choose the images and how they are stored; those of a single source are declared by its card."""
    command.add_argument("card", nargs="?", type=Path, help="dataset card, YAML: a path, or the name of one in shards/")
    command.add_argument("--root", help="where the images are, if not where the card says: a path or URL")
    command.add_argument("--allow-code", action="store_true", help="permit a source module:Class from outside paco_ds")
    without = command.add_argument_group("without a card")
    without.add_argument("--source", metavar="SOURCE", help=f"one of {', '.join(sources)}; or module:Class")
    pages = "; ".join(f"{name}: {kind.page}" for name, kind in sources.items())
    for split in SPLIT_NAMES:
        text = f"images of {split}, relative to --root. " + (pages if split == "train" else "As --train")
        without.add_argument(f"--{split}", metavar="WHERE", help=text.replace("%", "%%"))
    without.add_argument("--name", help="of the data set; the root's name unless given")
    without.add_argument("--license", help="of the data set")
    options = {key: option for kind in sources.values() for key, option in kind.options.items()}
    for key, (metavar, text) in options.items():
        takers = ", ".join(name for name, kind in sources.items() if key in kind.options)
        without.add_argument(f"--{key.replace('_', '-')}", metavar=metavar, help=f"{takers}: {text}".replace("%", "%%"))
    command.set_defaults(card_keys=(*SPLIT_NAMES, "name", "license", *options))
    select = command.add_argument_group("selection (also keys of a card)")
    select.add_argument(
        "--imbalance-factor", type=float, metavar="F", help="long-tailed train: largest class / smallest"
    )
    select.add_argument("--imbalance-profile", choices=("exp", "pareto"), help="shape of the tail (exp)")
    select.add_argument("--validation-share", type=float, metavar="SHARE", help="of each class of train, moved to val")
    select.add_argument(
        "--test-share", type=float, metavar="SHARE", help="of each class of train, moved to test before that of val"
    )
    stored = command.add_argument_group("images (the first three are also keys of a card)")
    stored.add_argument(
        "--resize-short",
        type=at_least(1),
        metavar="N",
        help="shorter side at most N pixels, as JPEG",
    )
    stored.add_argument("--quality", type=int, metavar="Q", help="of the JPEG, with --resize-short (90)")
    stored.add_argument(
        "--background", metavar="COLOR", help="white, black, mean or #rrggbb under transparent parts, stored as PNG"
    )
    stored.add_argument("--verify", action="store_true", help="decode every image")
    stored.add_argument("--max-bad", type=at_least(0), default=0, metavar="N", help="images that may be left out (0)")
    command.add_argument("--seed", type=at_least(0), default=0, help="of the order in the shards and of the selection")
    command.add_argument("--shard-bytes", type=at_least(1), default=SHARD_BYTES, help="largest shard, in bytes")


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


def _say_bad(manifest: Manifest, console: Screen) -> None:
    if manifest.storage.exists(BAD_IMAGES_FILE):
        lines = manifest.storage.read(BAD_IMAGES_FILE).decode().splitlines()
        console.print(f"{len(lines)} images left out, named in {manifest.storage.place(BAD_IMAGES_FILE)}")


if __name__ == "__main__":
    sys.exit(main())
