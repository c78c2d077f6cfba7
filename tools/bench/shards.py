#!/usr/bin/env python3
"""Building shards of 20,000 photographs, beside `tar cf` and a plain loop over webdataset's ShardWriter; and the
memory of a builder that lists iNaturalist 2018's number of images, and 3 million rows of a CSV.

The photographs are scikit-learn's two sample photos, cropped and re-encoded to 30-130 KB: 500 different ones, the
same in every run, each in 40 files. All three read the files from a warm cache and write to the same disk. Ours does
more in that time than they do: SHA-256, a CRC-32 and an index row for every sample, fsync and rename of every shard.
The floor is reading all files and writing their bytes to one file, without headers.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

# The checkout need not be installed. This folder stays on the path, for the modules that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import Bar, at_least, median_seconds, print_bars

_DIFFERENT = 500
_SMALLEST, _LARGEST = 30_000, 130_000  # bytes
_CLASSES = 100
_SHARD_BYTES = 100 * 2**20  # ten shards or so, which two workers share evenly


def photographs(count: int) -> Iterator[bytes]:
    """JPEG files of 30-130 KB, evenly spread, the same each time."""
    from sklearn.datasets import load_sample_images

    photos = [cv2.cvtColor(image, cv2.COLOR_RGB2BGR) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    while count:
        photo = photos[int(rng.integers(len(photos)))]
        height, width = (int(side * rng.uniform(0.7, 1)) for side in photo.shape[:2])
        top, left = (
            int(rng.integers(0, whole - part + 1)) for whole, part in zip(photo.shape[:2], (height, width), strict=True)
        )
        crop = photo[top : top + height, left : left + width]
        encoded = bytes(cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))])[1])
        if _SMALLEST <= len(encoded) <= _LARGEST:
            count -= 1
            yield encoded


def make_images(root: Path, count: int) -> int:
    """Photographs in a folder per class; returns their bytes in all."""
    different = list(photographs(_DIFFERENT))
    total = 0
    for number in range(count):
        folder = root / f"class{number % _CLASSES:03d}"
        folder.mkdir(exist_ok=True, parents=True)
        data = different[number % _DIFFERENT]
        (folder / f"{number:06d}.jpg").write_bytes(data)
        total += len(data)
    return total


def speed(work: Path, count: int, workers: int, repeats: int) -> list[Bar]:
    """The two bars on speed."""
    import webdataset as wds

    from paco_ds.data.build import build_shards
    from paco_ds.data.build_plan import BuildOptions
    from paco_ds.data.card import folder_card

    root = work / "images"
    size = make_images(root, count)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    (work / "files").write_text("\n".join(files))
    outputs = {name: work / name for name in ("ours", "tar", "writer", "copy")}

    def ours() -> None:
        options = BuildOptions(shard_bytes=_SHARD_BYTES, workers=workers)
        build_shards(folder_card(root), root, outputs["ours"], options)

    def tar() -> None:
        command = ["tar", "cf", str(outputs["tar"] / "all.tar"), "-C", str(root), "-T", str(work / "files")]
        subprocess.run(command, check=True)

    def writer() -> None:
        with wds.ShardWriter(str(outputs["writer"] / "train-%05d.tar"), maxsize=_SHARD_BYTES, verbose=0) as sink:
            for number, file in enumerate(files):
                about = {"label": int(file[5:8]), "class": file[:8], "source": file}
                sink.write({"__key__": f"train-{number:08d}", "jpg": (root / file).read_bytes(), "json": about})

    def copy() -> None:
        with open(outputs["copy"] / "all", "wb", buffering=0) as out:
            for file in files:
                out.write((root / file).read_bytes())

    works = {
        name: _alone(outputs[name], function)
        for name, function in {"ours": ours, "tar": tar, "writer": writer, "copy": copy}.items()
    }
    seconds = median_seconds(works, repeats)
    rate = {name: size / 1e6 / s for name, s in seconds.items()}
    print(
        f"{count} photographs, {size / 1e9:.2f} GB, {workers} workers: "
        + ", ".join(f"{n} {s:.2f} s" for n, s in seconds.items())
    )
    return [
        at_least(
            "build, MB/s, tar cf",
            rate["ours"] / rate["tar"],
            0.8,
            ours=rate["ours"],
            rival=rate["tar"],
            floor=rate["copy"],
        ),
        at_least(
            "build, MB/s, ShardWriter loop",
            rate["ours"] / rate["writer"],
            3.5,
            ours=rate["ours"],
            rival=rate["writer"],
            floor=rate["copy"],
        ),
    ]


def _alone(output: Path, function: Callable[[], None]) -> Callable[[], None]:
    """The work into an empty folder."""

    def run() -> None:
        output.mkdir()
        function()
        spare = output.with_name(f"{output.name}-done")
        shutil.rmtree(spare, ignore_errors=True)
        output.rename(spare)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the shard builder.")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the files, 8 GB; a temporary one unless given")
    parser.add_argument("--json", action="store_true", help="also one JSON line for each bar")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        bars = speed(Path(work), arguments.images, arguments.workers, arguments.repeats)
    print_bars(bars, as_json=arguments.json)


if __name__ == "__main__":
    main()
