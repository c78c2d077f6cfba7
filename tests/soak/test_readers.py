"""Shards read by a reader that is not ours and not in the environment: wids, random access by sample number.

It left webdataset after 0.2, so that release is installed beside the tests, which takes the network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import folder_card
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.shard import ShardReader
from tests.data.tiny import encoded

pytestmark = pytest.mark.soak
WIDS = "webdataset==0.2.86"
READ_ALL = """
import json, sys, wids
shards = wids.ShardListDataset(json.loads(sys.argv[1]))
read = [shards[n] for n in range(len(shards))]
print(json.dumps([[s["__key__"], s[".json"]["label"], list(s[".png"].size)] for s in read]))
"""


def test_wids_reads_every_sample(tmp_path: Path, record: Callable[[str, str, bool], None]) -> None:
    """In the order of the shards, with the labels of the index, each image decoded."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "wids"), WIDS]
    subprocess.run(pip, check=True)
    for number in range(300):
        folder = tmp_path / "images" / f"class{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(".png", 24, number))
    images = tmp_path / "images"
    manifest = build_shards(folder_card(images), images, tmp_path / "shards", BuildOptions(shard_bytes=100_000))
    split = manifest.split("train")
    urls = [{"url": str(manifest.directory / shard.file), "nsamples": shard.samples} for shard in split.shards]
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, json.dumps(urls)],
        env={"PYTHONPATH": str(tmp_path / "wids"), "WIDS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    reader = ShardReader(manifest.storage, split)
    holds = [label for _, label, _ in found] == reader.labels().tolist() and len({key for key, *_ in found}) == len(
        found
    )
    record(f"wids reads the shards: {len(found)} samples, labels and images", "all" if holds else "differ", holds)
    assert holds
