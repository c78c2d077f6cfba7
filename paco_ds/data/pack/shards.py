"""Build shards: write those that do not exist yet, by one process or several ranks, and the manifest last."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from paco_ds.command import Screen
from paco_ds.data.manifest import MANIFEST_FILE, Manifest, Sha256, Shard, Split, StrictModel, load_manifest
from paco_ds.data.pack.build_plan import BuildOptions, BuildPlan, plan_build
from paco_ds.data.pack.build_ranks import PLAN_FILE, BuildRank
from paco_ds.data.pack.card import Card
from paco_ds.data.pack.image_bytes import BadImage
from paco_ds.data.pack.progress_bar import ShardProgress
from paco_ds.data.pack.source import some
from paco_ds.data.pack.tar import BLOCK
from paco_ds.data.pack.workers import Report, Workers
from paco_ds.data.pack.write import ShardJob, WriteSettings, Written, write_shard
from paco_ds.data.shard import sha256_stored
from paco_ds.data.storage import MissingFile, Storage, as_storage
from paco_ds.errors import DataError
from paco_ds.files import PARTIAL

STATE_FOLDER = ".build"  # records of an unfinished build
BAD_IMAGES_FILE = "bad-images.txt"
_SHOWN_BAD = 20
_MOST_BAD = 1000  # a build stops looking for more after this many
_BESIDE = (".tar", ".index.npy", ".tar.idx")


def build_shards(
    card: Card,
    root: str | Path,
    output: str | Path | Storage,
    options: BuildOptions = BuildOptions(),  # noqa: B008 (frozen)
    console: Screen | None = None,
) -> Manifest:
    """Build shards, indexes and, last, the manifest of every split of a card.

    The same images, seed and shard size give the same bytes with any number of workers, also if a build was killed
    and resumed: its finished shards are recognised by plan and digest, and not written again.

    Raises:
        DataError: ``output`` has shards and ``overwrite`` is off, the source does not match the card, more than
            ``max_bad`` images are bad, or the shards would not fit on the disk.
        UserError: another build writes to ``output``.
        StorageError: ``output`` cannot be written.
    """
    manifest = build_share(card, root, output, options, BuildRank(), console)
    assert manifest is not None
    return manifest


def build_share(
    card: Card,
    root: str | Path,
    output: str | Path | Storage,
    options: BuildOptions,
    rank: BuildRank,
    console: Screen | None = None,
) -> Manifest | None:
    """One rank's share of `build_shards`. Returns the manifest on rank 0, and None on the others once it is written."""
    console = console or Screen(quiet=True)
    output = as_storage(output)
    state = output.inside(STATE_FOLDER)
    with rank.sole_builder(output), rank.alive(state), ExitStack() as stack:
        if rank.number == 0:
            _refuse_existing(output, state, options.overwrite)
        workers = stack.enter_context(Workers(options.workers, __name__))
        console.print(f"listing {card.name} under {root}", highlight=False)
        plan = plan_build(card, root, output, options, workers.map)
        say_ignored(plan, console)
        refuse_bad(output, plan.source.bad, options.max_bad, rank)
        if rank.number == 0:
            _refuse_existing(output, state, options.overwrite, plan.digest)
            if card.resize is None and not options.overwrite:
                _require_room(plan, output)
            if options.overwrite:
                output.remove(MANIFEST_FILE)

        def manifest_of(written: list[Written]) -> Manifest:
            described = describe(plan, written)
            _require_training_images(plan, described)
            return Manifest(
                name=card.name,
                license=card.license,
                source=card.homepage or card.source,
                seed=options.seed,
                classes=plan.source.classes,
                mean=card.mean,
                std=card.std,
                background=card.background_hex,
                shots=card.shots,
                listings=(plan.listing,),
                splits=described,
            )

        manifest = write_plan(plan, output, options, rank, workers, manifest_of, console)
        if manifest is not None:
            remove_stale(output, manifest)
        remove_state(state)
    return manifest


def write_plan(
    plan: BuildPlan,
    output: Storage,
    options: BuildOptions,
    rank: BuildRank,
    workers: Workers,
    manifest_of: Callable[[list[Written]], Manifest],
    console: Screen,
) -> Manifest | None:
    """Write a rank's shards of a plan; rank 0 then writes the manifest of all shards, in the order of the plan."""
    state = output.inside(STATE_FOLDER)
    rank.begin(state, plan.digest)
    own: dict[str, Written] = {}
    found = len(plan.source.bad)
    settings = _Once(plan.settings, state, plan.digest)
    images, size = plan.size(rank)
    with ShardProgress(console, "building", images, size) as progress:
        for written in workers.run(_write_once, settings, plan.jobs(rank), progress):
            own[written.name] = written
            found += len(written.bad)
            if found > max(options.max_bad, _MOST_BAD):
                break
    manifest: Manifest | None = None

    def conclude() -> None:
        nonlocal manifest
        names = [name for _, name, *_ in plan.shards]
        with ThreadPoolExecutor(16) as pool:
            written = list(pool.map(lambda name: own.get(name) or _recorded(state, name, plan.digest), names))
        missing = [name for name, done in zip(names, written, strict=True) if done is None]
        bad = [*plan.source.bad, *(BadImage(*b) for done in written if done for b in done.bad)]
        refuse_bad(output, bad, options.max_bad, rank)
        if missing:
            raise DataError(f"shard {some(missing)} of {output.url} was not built: give the same command again")
        made = manifest_of([done for done in written if done is not None])
        with output.write(MANIFEST_FILE) as file:
            file.write(made.model_dump_json(indent=1, exclude_none=True).encode() + b"\n")
        manifest = load_manifest(output)
        clear_state(state)
        if first := next((done.first_warning for done in written if done and done.first_warning), None):
            count = sum(done.warned for done in written if done)
            console.print(f"{count} images made Pillow warn, the first {first[0]}: {first[1]}", highlight=False)

    if found > max(options.max_bad, _MOST_BAD):
        bad = [*plan.source.bad, *(BadImage(*b) for w in own.values() for b in w.bad)]
        refuse_bad(output, bad, options.max_bad, rank, stopped=True)
    rank.finish(state, conclude)
    console.print(progress.memory(), highlight=False)
    return manifest


@dataclass(frozen=True)
class _Once:
    settings: WriteSettings
    state: Storage
    plan: str


class _Record(StrictModel):
    """Record of a finished shard, kept until the manifest is written."""

    plan: Sha256
    written: Written


def _write_once(once: _Once, job: ShardJob, report: Report) -> Written:
    """Write a shard and its record, unless both exist and the bytes match the record."""
    done = _recorded(once.state, job.name, once.plan)
    if done is not None and _is_intact(once.settings.output, done):
        report(len(job.samples), int(job.samples.sizes.sum()), len(done.bad))
        return done
    written = write_shard(once.settings, job, report)
    with once.state.write(f"{job.name}.json") as file:
        file.write(_Record(plan=once.plan, written=written).model_dump_json().encode())
    return written


def _recorded(state: Storage, name: str, plan: str) -> Written | None:
    """A shard's record, if it belongs to this plan."""
    try:
        record = _Record.model_validate_json(state.read(f"{name}.json"))
    except (MissingFile, ValidationError):
        return None
    return record.written if record.plan == plan else None


def _is_intact(output: Storage, written: Written) -> bool:
    """Whether the files have the bytes of the record; a crash of the host may have lost some."""
    shard = written.shard
    if shard is None:
        return True
    try:
        return (
            output.size(shard.file) == shard.bytes
            and output.size(shard.index_file) == shard.index_bytes
            and output.exists(shard.energon_file)
            and sha256_stored(output, shard.index_file, shard.index_bytes) == shard.index_sha256
            and sha256_stored(output, shard.file, shard.bytes) == shard.sha256
        )
    except MissingFile:
        return False


def describe(plan: BuildPlan, written: list[Written], before: Mapping[str, int] | None = None) -> dict[str, Split]:
    """The written splits, ids counted from `before`; DataError for a split without an image."""
    classes = len(plan.source.classes)
    splits = {}
    for name in plan.source.splits:
        done = [w for w, (split, *_) in zip(written, plan.shards, strict=True) if split == name]
        counts = np.zeros(classes, np.int64)
        shards: list[Shard] = []
        first_id = samples = (before or {}).get(name, 0)
        for shard_done in done:
            for label, images in shard_done.counts.items():
                counts[label] += images
            if shard_done.shard is not None:
                own = shard_done.shard.first_key == samples
                shards.append(shard_done.shard.model_copy(update={"first_key": None}) if own else shard_done.shard)
                samples += shard_done.shard.samples
        if not shards:
            raise DataError(f"split {name} has no image that can be used")
        splits[name] = Split(
            name=name,
            samples=samples - first_id,
            class_counts=tuple(counts.tolist()),
            bytes=sum(shard.bytes for shard in shards),
            shards=tuple(shards),
        )
    return splits


def _require_training_images(plan: BuildPlan, splits: Mapping[str, Split]) -> None:
    counts = splits["train"].class_counts if "train" in splits else ()
    empty = [plan.source.classes[label] for label, count in enumerate(counts) if not count]
    if empty:
        raise DataError(f"no training image of {some(empty)} can be used: repair some, or remove the class")


def say_ignored(plan: BuildPlan, console: Screen) -> None:
    """Print which files were left out, and what else is worth knowing of the source."""
    if plan.source.ignored:
        console.print(f"left out, not images by their ending: {plan.source.ignored_files()}")
    for note in plan.source.notes:
        console.print(note, highlight=False)


def refuse_bad(
    output: Storage, bad: Iterable[BadImage], max_bad: int, rank: BuildRank, *, stopped: bool = False
) -> None:
    """Write the list of bad images; DataError if there are more than `max_bad`.

    Args:
        stopped: the other images were not looked at, so that there may be more.
    """
    found = sorted(map(str, bad))
    if rank.number == 0:
        if found:
            with output.write(BAD_IMAGES_FILE) as file:
                file.write("".join(f"{line}\n" for line in found).encode())
        elif output.exists(BAD_IMAGES_FILE):
            output.remove(BAD_IMAGES_FILE)
    if len(found) <= max_bad:
        return
    reasons = Counter(image.reason for image in bad)
    listed = "those found until the build stopped" if stopped else "all"
    shown = "\n  ".join(found[:_SHOWN_BAD])
    more = f"\n  and {len(found) - _SHOWN_BAD} more" if len(found) > _SHOWN_BAD else ""
    raise DataError(
        f"{len(found)} bad images ({', '.join(f'{n} {reason}' for reason, n in sorted(reasons.items()))}), "
        f"at most {max_bad} may be left out:\n  {shown}{more}\n"
        f"{output.place(BAD_IMAGES_FILE)} lists {listed}. Repair or unlist them, or allow this many with --max-bad"
    )


def clear_state(state: Storage) -> None:
    """Remove the records of a build; the plan last, since other ranks wait for its removal."""
    names = state.sizes() or {}
    for name in sorted(names, key=lambda name: name == PLAN_FILE):
        state.remove(name)


def remove_state(state: Storage) -> None:
    """Remove the folder of the state if it is empty; another rank may still have a file there."""
    if state.is_local:
        with suppress(OSError):
            os.rmdir(state.local_directory)


def _refuse_existing(output: Storage, state: Storage, overwrite: bool, plan: str | None = None) -> None:
    """Raise DataError if `output` has a finished build; one of the same `plan` may be resumed."""
    if overwrite:
        return
    files = output.sizes() or {}
    if MANIFEST_FILE in files:
        if state.exists(PLAN_FILE) and (plan is None or BuildRank().plan(state) == plan):
            return  # killed after the manifest was written, before the state was cleared
        remove_state(state)  # killed when only the empty folder was left
        raise DataError(f"{output.url} already has shards; give another --output, or --overwrite to replace them")
    foreign = [tar for tar in files if tar.endswith(".tar") and f"{tar.removesuffix('.tar')}.index.npy" not in files]
    if foreign:
        raise DataError(f"{output.url} has {foreign[0]}, which paco_ds did not write; give another --output")


def _room(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _require_room(plan: BuildPlan, output: Storage) -> None:
    """Raise DataError if the disk cannot hold the shards still to be written."""
    if not output.is_local:
        return
    place = output.local_directory
    place.mkdir(parents=True, exist_ok=True)
    files = output.sizes() or {}
    images, size = plan.size(BuildRank())
    missing = size + 3 * BLOCK * images - sum(files.get(f"{name}.tar", 0) for _, name, *_ in plan.shards)
    free = shutil.disk_usage(place).free
    if missing > free:
        raise DataError(
            f"the shards need {_room(missing)} more, but {place} has {_room(free)} free: free space, or give another "
            "--output"
        )


def remove_stale(output: Storage, manifest: Manifest) -> None:
    """Remove leftovers of earlier or interrupted builds: shards with an index beside them, and partial files."""
    files = output.sizes() or {}
    names = {shard.name for split in manifest.splits.values() for shard in split.shards}
    for file in files:
        stem = file.removesuffix(".tar")
        if file.startswith(".") and file.endswith(PARTIAL):
            output.remove(file)
        elif file.endswith(".tar") and stem not in names and f"{stem}.index.npy" in files:
            for ending in _BESIDE:
                output.remove(f"{stem}{ending}")
