#!/usr/bin/env python3
"""List the pictures of Tux Paint's stamps as a small long-tailed set of real images, with a card.

They are photographs and drawings of animals, plants, food, letters, ... with transparent backgrounds, 158 to 6 of a
class. Debian has them as a package, which is unpacked, not installed (161 MB):

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    python shards/make_stamps.py stamps/usr/share/tuxpaint/stamps data/stamps-lists
    python tools/build_shards.py build data/stamps-lists/stamps.yaml --output data/stamps

A class is a folder of the first two levels, as animals/birds. Of each class three pictures, drawn by --seed, are test
images; the rest trains. No picture is copied: the lists have its path.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import yaml

_LEVELS = 2  # of folders that make a class
_OF_TEST = 3  # pictures of each class
_LEAST = 6  # pictures of a class that is taken


def pictures_of(stamps: Path) -> dict[str, list[Path]]:
    """Pictures below `stamps` by class, those classes that have enough; paths are relative to it."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(stamps.rglob("*.png")):
        picture = path.relative_to(stamps)
        found["/".join(picture.parts[:-1][:_LEVELS])].append(picture)
    return {name: pictures for name, pictures in found.items() if name and len(pictures) >= _LEAST}


def write_list(path: Path, rows: Sequence[tuple[Path, str]]) -> None:
    """A CSV file of pictures and classes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Lists and a card of Tux Paint's stamps, a class for each folder.")
    parser.add_argument("stamps", type=Path, help="the folder of the stamps: animals, clothes, food, ...")
    parser.add_argument("output", type=Path, help="folder of the lists and the card; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the test pictures")
    arguments = parser.parse_args()
    if arguments.output.exists():
        raise SystemExit(f"{arguments.output} exists; give another folder, or remove it")
    classes = pictures_of(arguments.stamps)
    if not classes:
        raise SystemExit(f"there is no folder with {_LEAST} PNG files below {arguments.stamps}")
    draw = random.Random(arguments.seed)
    lists: dict[str, list[tuple[Path, str]]] = {"train": [], "test": []}
    for name, pictures in classes.items():
        tested = set(draw.sample(pictures, _OF_TEST))
        for picture in pictures:
            lists["test" if picture in tested else "train"].append((picture, name))
    arguments.output.mkdir(parents=True)
    for split, rows in lists.items():
        write_list(arguments.output / f"{split}.csv", rows)
        print(f"{split}: {len(rows)} pictures of {len(classes)} classes")
    card = {
        "name": "Tux Paint stamps",
        "license": "GPL-2, as the package says",
        "homepage": "https://tuxpaint.org/stamps/",
        "source": "csv",
        "root": str(arguments.stamps.resolve()),
        "mean": [0.5] * 3,  # those that EfficientNet-Lite was trained with
        "std": [0.5] * 3,
        "background": "white",
        "resize": {"short": 144, "quality": 95},
        "shots": {"many": 20, "few": 6},
        "classes": sorted(classes),
        "splits": {split: {"file": str((arguments.output / f"{split}.csv").resolve())} for split in lists},
    }
    (arguments.output / "stamps.yaml").write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
