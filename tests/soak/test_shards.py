"""The builder at length: killed at many moments, shared by ranks of a real launcher, many additions."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from paco_ds.data.manifest import load_manifest
from paco_ds.data.pack.add import add_images
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import folder_card
from paco_ds.data.pack.check import check_shards
from paco_ds.data.pack.shards import build_shards
from tests.data.tiny import encoded

pytestmark = pytest.mark.soak
Record = Callable[[str, str, bool], None]
ROOT = Path(__file__).parents[2]
KILLS, MOST_SECONDS = 60, 900


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """2,000 images of 10 classes, 25 MB."""
    for number in range(2000):
        folder = tmp_path / "images" / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(".png", 64, number))
    return tmp_path / "images"


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory, which must have no folder."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def command(images: Path, output: Path, *options: str) -> list[str]:
    """The build as a user gives it."""
    script = str(ROOT / "tools" / "build_shards.py")
    given = ["build", "--source", "folder", "--root", str(images), "--output", str(output), "--shard-bytes", "500000"]
    return [script, *given, "--workers", "2", *options]


def test_build_killed_at_many_moments(images: Path, tmp_path: Path, record: Record) -> None:
    """SIGKILL to every process of it, from its first moment to its last; what stands is always whole."""
    build_shards(folder_card(images), images, tmp_path / "expected", BuildOptions(shard_bytes=500_000))
    expected = contents(tmp_path / "expected")
    began = time.monotonic()
    subprocess.run([sys.executable, *command(images, tmp_path / "timed")], check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - began
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    kills = finished = 0
    while kills < KILLS and time.monotonic() - began < MOST_SECONDS:
        output = tmp_path / f"out{finished}"
        process = subprocess.Popen(
            [sys.executable, *command(images, output)],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(moments.uniform(0, 1.3 * whole))
            finished += 1
            assert process.returncode == 0
            assert contents(output) == expected
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            there = {path.name for path in output.glob("*") if path.is_file() and not path.name.startswith(".")}
            wrong = [name for name in there if (output / name).read_bytes() != expected[name]]
            assert wrong == [], f"seed {seed}"
            if "manifest.json" in there:
                finished += 1
    record(f"builds killed {kills} times at random moments, {finished} finished, each with the same bytes", "-", True)


def test_ranks_of_the_launcher_share_a_build(images: Path, tmp_path: Path, record: Record) -> None:
    """`deepspeed --num_gpus 4 tools/build_shards.py build ...`."""
    build_shards(folder_card(images), images, tmp_path / "expected", BuildOptions(shard_bytes=500_000))
    deepspeed = Path(sys.executable).with_name("deepspeed")
    began = time.monotonic()
    done = subprocess.run(
        [str(deepspeed), "--num_gpus", "4", *command(images, tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    same = contents(tmp_path / "out") == contents(tmp_path / "expected")
    record("4 ranks of the DeepSpeed launcher build the bytes of one", f"{time.monotonic() - began:.0f} s", same)
    assert same


def test_twenty_additions(tmp_path: Path, record: Record) -> None:
    """Each a revision, all bytes proven at the end, every class with the images that it was given."""
    rng = np.random.default_rng(0)
    given = {f"c{number}": 0 for number in range(30)}
    for revision in range(21):
        root = tmp_path / f"images{revision}"
        for name in rng.permutation(sorted(given))[:8]:
            (root / "train" / name).mkdir(parents=True)
            for number in range(int(rng.integers(1, 9))):
                data = encoded(".png", 16, int(rng.integers(2**31)))
                (root / "train" / name / f"{revision}-{number}.png").write_bytes(data)
                given[name] += 1
        options = BuildOptions(shard_bytes=10_000)
        if revision:
            add_images(tmp_path / "shards", folder_card(root), root, options)
        else:
            build_shards(folder_card(root), root, tmp_path / "shards", options)
    manifest = load_manifest(tmp_path / "shards")
    counts = dict(zip(manifest.classes, manifest.split("train").class_counts, strict=True))
    assert counts == {name: count for name, count in given.items() if count}
    assert check_shards(manifest) == []
    for revision in range(1, 21):
        assert check_shards(load_manifest(tmp_path / "shards" / f"manifest-{revision}.json")) == []
    record(f"20 additions: {manifest.split('train').samples} images, {len(counts)} classes, all bytes", "-", True)
