"""Add images and classes to finished shards: new shards beside the old ones, and a new manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from paco_ds.command import Screen
from paco_ds.data.manifest import MANIFEST_FILE, Manifest, Split, load_manifest
from paco_ds.data.names import notes_on, same_name
from paco_ds.data.pack.build_plan import BuildOptions, BuildPlan, plan_of, select
from paco_ds.data.pack.build_ranks import BuildRank
from paco_ds.data.pack.card import Card
from paco_ds.data.pack.overlap import overlaps_with_shards
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.shards import (
    STATE_FOLDER,
    clear_state,
    describe,
    refuse_bad,
    remove_stale,
    remove_state,
    say_ignored,
    write_plan,
)
from paco_ds.data.pack.source import some
from paco_ds.data.pack.workers import Workers
from paco_ds.data.pack.write import Written
from paco_ds.data.storage import Storage, as_storage
from paco_ds.errors import DataError


def add_images(
    directory: str | Path | Storage,
    card: Card,
    root: str | Path,
    options: BuildOptions,
    rank: BuildRank = BuildRank(),  # noqa: B008 (frozen)
    console: Screen | None = None,
) -> Manifest | None:
    """Add a card's images to a directory of shards. Returns the new manifest on rank 0, None on the others.

    Classes are matched by name; new classes get the next labels, in the order of the card. The old shards are not
    changed, and the previous manifest is kept as `manifest-REVISION.json`: a run trained on it can resume with that
    file.

    Raises:
        DataError: as `build_shards`; these images were added before; a new class has no training image, or is a number
            where the old ones are names.
    """
    console = console or Screen(quiet=True)
    output = as_storage(directory)
    if output.url.endswith(".json"):
        raise DataError(
            f"{output.url} is a manifest, and images are added to the newest: give {output.parent()[0].url}"
        )
    state = output.inside(STATE_FOLDER)
    with (
        rank.sole_builder(output),
        rank.alive(state),
        Workers(options.workers, "paco_ds.data.pack.shards") as workers,
    ):
        before = load_manifest(output)  # of a folder that nobody else adds to
        plan = _plan(before, card, root, output, options, workers)
        if plan.listing in before.listings:
            if rank.number == 0 and rank.plan(state) is not None:
                clear_state(state)  # interrupted after the manifest was written, before the state was cleared
                remove_state(state)
                return before
            raise DataError(
                f"these images of {card.name} are in {output.url} already, as its manifest says by names, labels and "
                f"sizes; for other images rename the files"
            )
        if rank.number == 0:
            plan.source.notes.extend(overlaps_with_shards(plan.source, before))
        say_ignored(plan, console)
        refuse_bad(output, plan.source.bad, options.max_bad, rank)

        def manifest_of(written: list[Written]) -> Manifest:
            with output.write(f"{MANIFEST_FILE.removesuffix('.json')}-{before.revision}.json") as file:
                file.write(output.read(MANIFEST_FILE))
            return _merged(before, plan, written)

        manifest = write_plan(plan, output, options, rank, workers, manifest_of, console)
        if manifest is not None:
            remove_stale(output, manifest)
    remove_state(state)
    return manifest


def _plan(
    before: Manifest, card: Card, root: str | Path, output: Storage, options: BuildOptions, workers: Workers
) -> BuildPlan:
    if card.imbalance is not None:
        raise DataError("imbalance selects from a whole train split, not from added images: leave it out")
    _refuse_another_background(before, card)
    source = select(card, read_source(card, Root(root, without=output), workers.map), options.seed)
    known = {same_name(name) for name in before.classes}
    new = [name for name in source.classes if name not in known]
    if new and all(map(str.isdecimal, new)) and not any(map(str.isdecimal, before.classes)):
        raise DataError(
            f"the classes {some(new)} are numbers, and those of {output.url} are names: name them, as by --classes"
        )
    classes = (*before.classes, *new)
    said = {*source.notes, *notes_on(before.classes)}
    notes = [*source.notes, *(note for note in notes_on(classes) if note not in said)]
    if new:
        notes.append(f"new classes, which the shards have not yet: {some(new)}")
    label_of = {same_name(name): label for label, name in enumerate(classes)}
    relabel = np.array([label_of[name] for name in source.classes], np.int32)
    splits = {name: replace(samples, labels=relabel[samples.labels]) for name, samples in source.splits.items()}
    first_shards, first_keys = {}, {}
    for name, split in before.splits.items():
        first_shards[name] = 1 + max(int(shard.name.rpartition("-")[2]) for shard in split.shards)
        first_keys[name] = max(
            (start if shard.first_key is None else shard.first_key) + shard.samples
            for start, shard in zip(split.starts(), split.shards, strict=True)
        )
    source = replace(source, classes=classes, splits=splits, notes=notes)
    return plan_of(card, source, output, options, first_shards, first_keys)


def _refuse_another_background(before: Manifest, card: Card) -> None:
    """Raise DataError if the card fills transparent parts otherwise than the shards do."""
    if card.background_hex == before.background:
        return
    said = f"has background {before.background} in its manifest" if before.background else "has none in its manifest"
    give = f"give --background '{before.background}'" if before.background else "leave it out"
    raise DataError(
        f"background {card.background_hex} of {card.name}: {before.storage.url} {said}, and a set has one: {give}, or "
        f"build all images again"
    )


def _merged(before: Manifest, plan: BuildPlan, written: list[Written]) -> Manifest:
    """The manifest of the old splits with the new shards appended, and all classes."""
    added = describe(plan, written, {name: split.samples for name, split in before.splits.items()})
    more = (0,) * (len(plan.source.classes) - len(before.classes))
    splits = {
        name: split.model_copy(update={"class_counts": (*split.class_counts, *more)})
        for name, split in before.splits.items()
    }
    for name, new in added.items():
        old = splits.get(name)
        splits[name] = new if old is None else _joined(old, new)
    if "train" in splits:
        empty = [plan.source.classes[i] for i, count in enumerate(splits["train"].class_counts) if not count]
        if empty:
            raise DataError(f"no training image of the new class {empty[0]} ({len(empty)} such): add some to train")
    return Manifest.model_validate(
        before.model_dump(exclude_none=True)
        | {
            "revision": before.revision + 1,
            "classes": plan.source.classes,
            "listings": (*before.listings, plan.listing),
            "splits": {name: split.model_dump(exclude_none=True) for name, split in splits.items()},
        }
    )


def _joined(old: Split, new: Split) -> Split:
    return Split(
        name=old.name,
        samples=old.samples + new.samples,
        class_counts=tuple(a + b for a, b in zip(old.class_counts, new.class_counts, strict=True)),
        bytes=old.bytes + new.bytes,
        shards=(*old.shards, *new.shards),
    )
