#!/usr/bin/env python3
"""Render typefaces to a data set of many classes, laid out as iNaturalist's: JSON files and a tree of images.

It has the numbers of classes and images of iNaturalist, for machines without downloads: a class is a character, an
image is that character in one typeface. It is not shipped; make it where it is needed. Debian's
texlive-fonts-extra has about 1,450 usable typefaces in 130 families; unpack it without installing it:

    apt-get download texlive-fonts-extra && dpkg -x texlive-fonts-extra_*.deb fonts
    python shards/make_glyphs.py fonts data/glyphs-images --classes 676
    python tools/build_shards.py build data/glyphs-images/glyphs.yaml --output data/glyphs

Families, not typefaces, are split, so that no typeface of val or test is a sibling of one that was trained on. Of
characters that look alike (Latin A, Greek Alpha, Cyrillic A) the first is taken. More classes than there are
characters are characters turned by thirteenths of a circle: enough to load a builder as iNaturalist 2018 does
(`--classes 8142 --images 437513 --factor 500`), but rotated round letters look much alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import multiprocessing.pool
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

SIDE, POINTS, BASELINE = 32, 22, 24  # pixels
_FAINT = 60  # of 255: a character whose brightest pixel is below it is blank
_TURNS = 13  # classes per character, by rotation
_ALIKE = 0.3  # two characters are alike if this share of the typefaces with both draws the same pixels
_COMPARED = 60  # number of typefaces in which characters are compared
_HELD_OUT = {"val": 0.15, "test": 0.15}  # of the families
_HELD_OUT_IMAGES = 20  # of a class, at most
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Typeface:
    """A font file, its family, and the code points it has."""

    path: Path
    family: str
    characters: frozenset[int]


def read_typefaces(fonts: Path) -> list[Typeface]:
    """The usable font files below a folder: those that have Latin letters."""
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)
    found = []
    for path in sorted(path for path in fonts.rglob("*") if path.suffix.lower() in (".otf", ".ttf")):
        try:
            with TTFont(path, lazy=True, fontNumber=0) as font:
                characters = frozenset(font.getBestCmap() or ())
        except (TTLibError, OSError, KeyError, AssertionError, ValueError):
            continue
        if {ord("a"), ord("A")} <= characters:
            found.append(Typeface(path, path.parent.name, characters))
    return found


def drawn(font: ImageFont.FreeTypeFont, character: int, turn: int = 0) -> Pixels | None:
    """The character, white on black, uint8 [32, 32]; None if it is blank."""
    image = Image.new("L", (SIDE, SIDE))
    try:
        ImageDraw.Draw(image).text((SIDE // 2, BASELINE), chr(character), font=font, fill=255, anchor="ms")
    except (OSError, ValueError):
        return None
    if turn:
        image = image.rotate(-360 * turn / _TURNS, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels if pixels.max() >= _FAINT else None


def looks(job: tuple[Typeface, Sequence[int]]) -> list[int]:
    """Per character a hash of its pixels; 0 if the typeface draws nothing."""
    typeface, characters = job
    try:
        font = ImageFont.truetype(str(typeface.path), POINTS)
    except OSError:
        return [0] * len(characters)
    found = []
    for character in characters:
        pixels = drawn(font, character) if character in typeface.characters else None
        found.append(0 if pixels is None else hash(pixels.tobytes()) or 1)
    return found


def distinct(characters: Sequence[int], seen: npt.NDArray[np.int64]) -> list[int]:
    """Columns of `seen` [typefaces, characters] without those that look like an earlier one."""
    compared = seen[np.linspace(0, len(seen) - 1, min(_COMPARED, len(seen))).astype(int)]
    kept: list[int] = []
    for column in range(len(characters)):
        both = (compared[:, kept] != 0) & (compared[:, [column]] != 0)
        same = both & (compared[:, kept] == compared[:, [column]])
        if not (same.sum(0) > _ALIKE * np.maximum(both.sum(0), 1)).any():
            kept.append(column)
    return kept


def profile(available: npt.NDArray[np.int64], factor: float, images: int | None) -> npt.NDArray[np.int64]:
    """Images of each class, falling by `factor` from the first to the last (Cui et al. 2019), `images` in total if
    given.

    Raises:
        SystemExit: a class has fewer typefaces than that.
    """
    share = factor ** -(np.arange(len(available)) / max(len(available) - 1, 1))
    largest = float((available / share).min()) if images is None else images / share.sum()
    counts = np.maximum(np.floor(largest * share).astype(np.int64), 1)
    if images is not None:
        more = images - int(counts.sum())  # correct the sum for rounding and for classes raised to 1
        counts[: abs(more)] += np.sign(more)
    short = np.flatnonzero(counts > available)
    if len(short):
        raise SystemExit(
            f"class {short[0]} would need {counts[short[0]]} typefaces and has {available[short[0]]}: "
            "give fewer --images, another --factor, or more fonts"
        )
    return counts


@dataclass(frozen=True)
class DrawJob:
    """The images of one typeface: (file, character, turn)."""

    typeface: Typeface
    images: list[tuple[Path, int, int]]


def draw(job: DrawJob) -> list[str]:
    """Write a typeface's images; returns the files of those that were blank after rotation."""
    font = ImageFont.truetype(str(job.typeface.path), POINTS)
    blank = []
    for file, character, turn in job.images:
        pixels = drawn(font, character, turn)
        if pixels is None:
            blank.append(str(file))
        else:
            Image.fromarray(pixels).save(file)
    return blank


def main() -> None:
    parser = argparse.ArgumentParser(description="Render typefaces to an iNaturalist-like set of glyph images.")
    parser.add_argument("fonts", type=Path, help="folder of .otf and .ttf files, a folder for each family")
    parser.add_argument("output", type=Path, help="folder of the images, JSON files and card; must not exist")
    parser.add_argument("--classes", type=int, default=676, help="200 and 676 are the usual ones")
    parser.add_argument("--factor", type=float, default=100, help="imbalance of train: largest class / smallest")
    parser.add_argument("--images", type=int, help="of train in all; as many as the largest class allows unless given")
    parser.add_argument("--suffix", choices=("png", "jpg"), default="png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()
    if arguments.output.exists():
        raise SystemExit(f"{arguments.output} exists; give another folder, or remove it")
    typefaces = read_typefaces(arguments.fonts)
    if not typefaces:
        raise SystemExit(f"there is no font file with Latin letters below {arguments.fonts}")
    with multiprocessing.get_context("fork").Pool(arguments.workers) as pool:
        make(arguments, typefaces, pool)


def make(arguments: argparse.Namespace, typefaces: list[Typeface], pool: multiprocessing.pool.Pool) -> None:
    """Choose characters, split families, draw, and write JSON and card."""
    rng = np.random.default_rng(arguments.seed)
    cover = Counter(c for typeface in typefaces for c in typeface.characters)
    characters = sorted(c for c, count in cover.items() if 3 * count >= len(typefaces) and _is_letter_or_sign(c))
    seen = np.array(pool.map(looks, [(typeface, characters) for typeface in typefaces], 8), np.int64)
    kept = distinct(characters, seen)
    most = sorted(kept, key=lambda column: -int((seen[:, column] != 0).sum()))
    needed = min(len(most), arguments.classes) if arguments.classes <= len(most) else -(-arguments.classes // _TURNS)
    if needed > len(most):
        raise SystemExit(f"these fonts have {len(most)} distinct characters: at most {len(most) * _TURNS} classes")
    # random, so that the head classes are of several scripts
    columns = rng.permutation(sorted(most[:needed])).tolist()
    turns = 1 if arguments.classes <= len(most) else _TURNS
    classes = [(column, turn) for turn in range(turns) for column in columns][: arguments.classes]
    split_of = _split_families(typefaces, rng)
    able = {
        name: [np.flatnonzero((seen[:, column] != 0) & (split_of == name)) for column, _ in classes]
        for name in ("train", *_HELD_OUT)
    }
    wanted = {name: np.array([min(len(faces), _HELD_OUT_IMAGES) for faces in able[name]]) for name in _HELD_OUT}
    wanted["train"] = profile(np.array([len(faces) for faces in able["train"]]), arguments.factor, arguments.images)
    categories = [
        {"id": label, "name": _class_name(characters[column], turn)} for label, (column, turn) in enumerate(classes)
    ]
    for name in ("train", *_HELD_OUT):
        drawings: dict[int, list[tuple[Path, int, int]]] = {}
        page: list[tuple[str, int]] = []
        for label, (column, turn) in enumerate(classes):
            folder = Path(name, f"{label:04d}")
            (arguments.output / folder).mkdir(parents=True)
            for face in np.sort(rng.permutation(able[name][label])[: wanted[name][label]]).tolist():
                file = folder / f"{face:04d}.{arguments.suffix}"
                drawings.setdefault(face, []).append((arguments.output / file, characters[column], turn))
                page.append((str(file), label))
        jobs = [DrawJob(typefaces[face], images) for face, images in sorted(drawings.items())]
        blank = {file for files in pool.imap_unordered(draw, jobs) for file in files}
        page = [(file, label) for file, label in page if str(arguments.output / file) not in blank]
        _write_page(arguments.output / f"{name}.json", page, categories)
        print(f"{name}: {len(page):,} images of {len(classes):,} classes, {len(jobs):,} typefaces, {len(blank)} blank")
    _write_card(arguments, rng)


def _is_letter_or_sign(code: int) -> bool:
    character = chr(code)
    return character.isprintable() and not character.isspace() and (character.isalnum() or 0x20 < code < 0x2000)


def _class_name(code: int, turn: int) -> str:
    return f"U+{code:04X} {chr(code)}" + (f" turned {turn}/{_TURNS}" if turn else "")


def _split_families(typefaces: list[Typeface], rng: np.random.Generator) -> npt.NDArray[np.str_]:
    """train, val or test for each typeface, the same within a family."""
    families = sorted({typeface.family for typeface in typefaces})
    drawn_families = rng.permutation(families).tolist()
    split: dict[str, str] = {}
    for name, share in _HELD_OUT.items():
        for _ in range(max(1, round(share * len(families)))):
            split[drawn_families.pop()] = name
    if not drawn_families:
        raise SystemExit(f"{len(families)} families are too few to hold some out; give at least 3")
    return np.array([split.get(typeface.family, "train") for typeface in typefaces])


def _write_page(path: Path, page: list[tuple[str, int]], categories: list[dict[str, object]]) -> None:
    images = [{"id": n, "file_name": file, "width": SIDE, "height": SIDE} for n, (file, _) in enumerate(page)]
    annotations = [{"id": n, "image_id": n, "category_id": label} for n, (_, label) in enumerate(page)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _write_card(arguments: argparse.Namespace, rng: np.random.Generator) -> None:
    files = sorted((arguments.output / "train").rglob(f"*.{arguments.suffix}"))
    looked = [np.asarray(Image.open(files[i])) / 255 for i in rng.integers(0, len(files), 2000)]
    mean, std = (round(float(figure), 4) for figure in (np.mean(looked), np.std(looked)))
    card = {
        "name": "glyphs",
        "license": "each typeface under its own; see the fonts' documentation",
        "source": "inaturalist",
        "root": ".",
        "mean": [mean] * 3,
        "std": [std] * 3,
        "splits": {name: {"annotations": f"{name}.json"} for name in ("train", *_HELD_OUT)},
    }
    (arguments.output / "glyphs.yaml").write_text(yaml.safe_dump(card, sort_keys=False))


if __name__ == "__main__":
    sys.exit(main())
