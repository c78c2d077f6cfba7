#!/usr/bin/env python3
"""Building shards of 20,000 photographs, beside `tar cf` and a plain loop over webdataset's ShardWriter; and the
memory of a builder that lists iNaturalist 2018's number of images, and 3 million rows of a CSV.

The photographs are scikit-learn's two sample photos, cropped and re-encoded to 30-130 KB: 500 different ones, the
same in every run, each in 40 files. All three read the files from a warm cache and write to the same place, memory
(tmpfs) where there is room, so that the disk is not what is measured. Ours does more in that time than they do:
SHA-256, a CRC-32 and an index row for every sample, fsync and rename of every shard.
The floor is reading all files and writing their bytes to one file, without headers. The printed line has a second one,
`hashed`: what ours cannot leave out, with nothing of Python between it - as many processes as workers look up, read,
digest and write their share of the files.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from isal.isal_zlib import crc32

# The checkout need not be installed. This folder stays on the path, for the modules that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import Bar, at_least, at_most, in_own_process, median_seconds, print_bars, status_bytes

from paco_ds.data.pack.build_plan import BuildOptions, plan_build
from paco_ds.data.pack.build_ranks import BuildRank
from paco_ds.data.pack.card import Card, folder_card, make_card
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.storage import Storage

_DIFFERENT = 500
_SMALLEST, _LARGEST = 30_000, 130_000  # bytes
_CLASSES = 100
_SHARD_BYTES = 90 * 2**20  # twelve shards, which two workers share evenly


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
    root = work / "images"
    size = make_images(root, count)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    (work / "files").write_text("\n".join(files))
    outputs = {name: work / name for name in ("ours", "tar", "writer", "copy", "hashed")}

    def ours() -> None:
        options = BuildOptions(shard_bytes=_SHARD_BYTES, workers=workers)
        build_shards(folder_card(root), root, outputs["ours"], options)

    def tar() -> None:
        command = ["tar", "cf", str(outputs["tar"] / "all.tar"), "-C", str(root), "-T", str(work / "files")]
        subprocess.run(command, check=True)

    import webdataset as wds  # here: the workers of ours, which import this file, have no use for it and its torch

    def writer() -> None:
        with wds.ShardWriter(str(outputs["writer"] / "train-%05d.tar"), maxsize=_SHARD_BYTES, verbose=0) as sink:
            for number, file in enumerate(files):
                about = {"label": int(file[5:8]), "class": file[:8], "source": file}
                sink.write({"__key__": f"train-{number:08d}", "jpg": (root / file).read_bytes(), "json": about})

    def copy() -> None:
        with open(outputs["copy"] / "all", "wb", buffering=0) as out:
            for file in files:
                out.write((root / file).read_bytes())

    def hashed() -> None:
        fork = multiprocessing.get_context("fork").Process
        shares = [(root, files[n::workers], outputs["hashed"] / str(n)) for n in range(workers)]
        processes = [fork(target=_read_digest_write, args=share) for share in shares]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a process of the floor ended with {process.exitcode}")

    def empty() -> None:
        """What was written before is gone: to remove it is nobody's work."""
        for folder in outputs.values():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    works = {"ours": ours, "tar": tar, "writer": writer, "copy": copy, "hashed": hashed}
    seconds = median_seconds(works, repeats, before=empty)
    rate = {name: size / 1e6 / s for name, s in seconds.items()}
    times = ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items())
    print(f"{count} photographs, {size / 1e9:.2f} GB, {workers} workers: {times}")
    return [
        at_least(
            f"build, MB/s, beside {what}",
            rate["ours"] / rate[rival],
            limit,
            ours=rate["ours"],
            rival=rate[rival],
            floor=rate["copy"],
        )
        for rival, what, limit in (("tar", "tar cf", 0.8), ("writer", "ShardWriter", 3.5))
    ]


def _read_digest_write(root: Path, files: list[str], output: Path) -> None:
    """The bytes of files behind each other, and what stands for their SHA-256 and CRC-32."""
    places = [f"{root}/{file}" for file in files]
    sizes = [os.stat(place).st_size for place in places]
    digest, buffer, filled = hashlib.sha256(), memoryview(bytearray(1 << 18)), 0
    with output.open("wb", buffering=0) as out:
        for place, size in zip(places, sizes, strict=True):
            if filled + size > len(buffer):
                digest.update(buffer[:filled])
                out.write(buffer[:filled])
                filled = 0
            descriptor = os.open(place, os.O_RDONLY)
            os.readv(descriptor, (buffer[filled : filled + size],))
            os.close(descriptor)
            crc32(buffer[filled : filled + size])
            filled += size
        digest.update(buffer[:filled])
        out.write(buffer[:filled])


def memory(work: Path) -> list[Bar]:
    """The two bars on memory: a whole build from JSON, and the planning of a CSV of 3 million rows."""
    folders = work / "many"
    _linked_images(folders, 3_000)
    _write_json(folders / "train.json", 437_513, 8_142)
    _write_csv(folders / "train.csv", 3_000_000, 20_000)
    bars = []
    for name, function, page in (
        ("437,513 images of 8,142 classes from JSON, built", _peak_of_build, "train.json"),
        ("3,000,000 rows of CSV, planned", _peak_of_plan, "train.csv"),
    ):
        peak = in_own_process(function, folders, page, work / "built") / 1e6
        bars.append(at_most(f"peak MB: {name}", peak, 1000, ours=peak))
    return bars


def _linked_images(folders: Path, links: int) -> None:
    """A folder of 1,000 images of 8 pixels, and links to it: a million names without a million files."""
    (folders / "real").mkdir(parents=True)
    data = bytes(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1])
    for number in range(1000):
        (folders / "real" / f"{number:03d}.jpg").write_bytes(data)
    for number in range(links):
        (folders / f"part-{number:05d}").symlink_to("real")


def _name(number: int) -> str:
    return f"part-{number // 1000:05d}/{number % 1000:03d}.jpg"


def _write_json(path: Path, images: int, classes: int) -> None:
    """A page as iNaturalist 2018's, field for field."""
    about = {"width": 800, "height": 600, "license": 3, "rights_holder": "somebody with a name of usual length"}
    with path.open("w") as file:
        file.write('{"info": {"year": 2018}, "images": [')
        file.writelines(
            (", " if n else "") + json.dumps({"id": n, "file_name": _name(n)} | about) for n in range(images)
        )
        file.write('], "annotations": [')
        file.writelines(
            (", " if n else "") + json.dumps({"id": n, "image_id": n, "category_id": n % classes})
            for n in range(images)
        )
        categories = [{"id": n, "name": f"Genus species{n}", "supercategory": "Plantae"} for n in range(classes)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def _write_csv(path: Path, rows: int, classes: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sku", "path", "label"))
        writer.writerows((n, _name(n), f"class {n % classes}") for n in range(rows))


def _card(root: Path, page: str) -> Card:
    source, key = ("inaturalist", "annotations") if page.endswith(".json") else ("csv", "file")
    about = {"source": source, "name": page, "license": "none", "splits": {"train": {key: page}}}
    return make_card(about, "bench")


def _peak_of_build(root: Path, page: str, output: Path) -> int:
    started = time.perf_counter()
    build_shards(_card(root, page), root, output, BuildOptions())
    shutil.rmtree(output)
    print(f"{page} built in {time.perf_counter() - started:.0f} s, one worker")
    return status_bytes("VmHWM")


def _peak_of_plan(root: Path, page: str, output: Path) -> int:
    started = time.perf_counter()
    plan = plan_build(_card(root, page), root, Storage(output), BuildOptions())
    next(plan.jobs(BuildRank()))
    print(f"{page} planned in {time.perf_counter() - started:.0f} s")
    return status_bytes("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the shard builder.")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("speed", "memory"), help="one half of the bench")
    parser.add_argument("--work", type=Path, help="folder for the files, 6 GB; /dev/shm where it has room")
    parser.add_argument("--json", action="store_true", help="also one JSON line for each bar")
    arguments = parser.parse_args()
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 8e9
    bars = []
    with tempfile.TemporaryDirectory(dir=arguments.work or (shared if roomy else None)) as folder:
        print(f"files in {folder}")
        if arguments.only != "memory":
            bars += speed(Path(folder), arguments.images, arguments.workers, arguments.repeats)
        if arguments.only != "speed":
            bars += memory(Path(folder))
    print_bars(bars, as_json=arguments.json)


if __name__ == "__main__":
    main()
