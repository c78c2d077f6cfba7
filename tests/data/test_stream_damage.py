"""Damaged shards on their way into training: seen, counted, or the end of the run; never a crash or a shorter epoch."""

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from paco_ds.config.data import StorageSettings
from paco_ds.data.manifest import Manifest, load_manifest, open_data
from paco_ds.data.shard import BadSample, RawSample, ShardReader, load_index
from paco_ds.data.storage import Storage
from paco_ds.data.stream.load import Load
from paco_ds.data.stream.partition import Planned
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.errors import DataError, RecipeError
from paco_ds.training.build import build_stream
from tests.data.mutations import fuzz
from tests.data.tiny import flip_byte, same_views
from tests.recipes import tiny_recipe


def rewrite_index(manifest: Manifest, number: int, raw: bytes) -> Manifest:
    """Replace an index and make the manifest say so, as somebody with a text editor might."""
    shard = manifest.split("train").shards[number]
    path = manifest.directory / "manifest.json"
    tree = json.loads(path.read_text())
    entry = tree["splits"]["train"]["shards"][number]
    entry["index_bytes"], entry["index_sha256"] = len(raw), hashlib.sha256(raw).hexdigest()
    path.write_text(json.dumps(tree))
    (manifest.directory / shard.index_file).write_bytes(raw)
    return load_manifest(manifest.directory)


def as_file(array: np.ndarray, **kwargs: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def read_first(manifest: Manifest) -> object:
    return ShardReader(manifest.directory, manifest.split("train")).read(0)


def test_mutated_shards_never_crash_hang_or_pass_uncounted(damaged: Manifest) -> None:
    """A thousand mutations of tars, indexes and manifest; the soak has ten times as many."""
    outcomes = fuzz(damaged.directory, 1000, seed=1)
    assert outcomes["samples are bad"] > 100
    assert outcomes["the run ends"] > 100


@pytest.mark.parametrize(
    ("reason", "remedy"), [("truncated", "build with --verify"), ("too_many_pixels", "Raise data.max_pixels")]
)
@pytest.mark.parametrize("training", [True, False])
def test_images_that_were_packed_damaged_are_laid_to_the_build(
    tiny_shards: Manifest, reason: str, remedy: str, training: bool
) -> None:
    """And not to the shards, which `check` would find whole."""
    reader = ShardReader(tiny_shards.directory, tiny_shards.split("train"))

    class Undecodable:
        views = ()

        def __call__(self, sample: RawSample) -> None:
            raise BadSample(reason, sample.key, sample.shard)

    load: Any = Load(reader, Undecodable(), seed=0, substitute=training)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=remedy) as caught:
        load((Planned(0, 0, 0), next(reader.read_window([0]))))
    assert "check" not in str(caught.value)


class Exploit:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_an_index_is_refused(damaged: Manifest, tmp_path: Path) -> None:
    """Even with a manifest that vouches for it, nothing is unpickled."""
    array = np.empty(1, dtype=object)
    array[0] = Exploit(tmp_path / "ran")
    for raw in (as_file(array, allow_pickle=True), pickle.dumps(Exploit(tmp_path / "ran"))):
        with pytest.raises(DataError, match=r"index.npy is not an index .*rebuild"):
            read_first(rewrite_index(damaged, 0, raw))
    assert not (tmp_path / "ran").exists()


def test_an_index_of_another_build_is_refused(damaged: Manifest) -> None:
    """It is stale, by its digest."""
    shards = damaged.split("train").shards
    shutil.copy(damaged.directory / shards[1].index_file, damaged.directory / shards[0].index_file)
    with pytest.raises(DataError, match=r"train-00000.index.npy (is damaged|has \d+ bytes)"):
        read_first(damaged)


@pytest.mark.parametrize("what", ["duplicate", "beyond the tar", "image beyond its sample", "label"])
def test_an_index_that_cannot_be_of_its_shard_is_refused(damaged: Manifest, what: str) -> None:
    """Two rows of the same bytes, bytes that are not there, a label that no class has."""
    index = load_index(damaged.directory, damaged.split("train").shards[0])
    if what == "duplicate":
        index[1] = index[0]
    elif what == "beyond the tar":
        index[-1]["offset"] += 10**9
    elif what == "label":
        index[2]["label"] = 3
    else:
        index[2]["image_size"] = 10**6
    message = "has label 3, but the manifest has only 3 classes" if what == "label" else "has ranges outside "
    with pytest.raises(DataError, match=rf"train-00000.index.npy {message}.*ebuild"):
        read_first(rewrite_index(damaged, 0, as_file(index)))


def test_a_sector_that_cannot_be_read_costs_its_samples_only(
    tiny_shards: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk error in a window is narrowed down sample by sample."""
    split = tiny_shards.split("train")
    index = load_index(tiny_shards.directory, split.shards[0])
    spot, pread = int(index[3]["offset"]) + 100, os.pread

    def failing(fileno: int, size: int, start: int) -> bytes:
        if start <= spot < start + size:
            raise OSError(5, "Input/output error")
        return pread(fileno, size, start)

    monkeypatch.setattr(os, "pread", failing)
    stored = list(ShardReader(tiny_shards.directory, split).read_window(range(8)))
    bad = []
    for each in stored:
        try:
            each.sample()
        except BadSample as error:
            bad.append((each.sample_id, error.reason))
    assert len(stored) == 8
    assert bad == [(3, "read_error")]


def test_a_window_is_one_range_unless_a_shard_ends_in_it(
    tiny_shards: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with small holes, which are read over; far ids are ranges of their own."""
    split = tiny_shards.split("train")
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *a: reads.append(a) or pread(*a))
    reader = ShardReader(tiny_shards.directory, split)
    first = split.shards[0].samples
    for ids, gap, ranges in (
        (range(first), 0, 1),
        (range(first - 2, first + 2), 0, 2),
        ([0, 1, 4, 5], 0, 2),
        ([0, 1, 4, 5], 10**6, 1),
        ([], 0, 0),
    ):
        reads.clear()
        assert [s.sample_id for s in reader.read_window(ids, gap)] == list(ids)
        assert len(reads) == ranges, (ids, gap)


def test_the_stream_counts_each_place_whose_sample_is_bad(damaged: Manifest) -> None:
    """As often as it is planned; all else is what an undamaged stream gives."""
    recipe = tiny_recipe("step.micro_batch=2", "step.micro_batches=4", "schedule.epochs=2", "data.window=8")
    layout = MicroBatchLayout(2, 4, 0, 1)
    whole = [batch for step in build_stream(recipe, damaged, layout) for batch in step]
    index = load_index(damaged.directory, damaged.split("train").shards[1])
    victims = {damaged.split("train").shards[0].samples + row for row in (0, 3, 4)}
    for row in (0, 3, 4):
        flip_byte(damaged.directory / "train-00001.tar", int(index[row]["offset"]) + 700)
    found = [batch for step in build_stream(recipe, damaged, layout) for batch in step]
    planned = sum(int(i) in victims for batch in whole for i in batch.ids)
    assert planned >= 5
    assert sum(len(batch.replaced) for batch in found) >= planned  # a substitute may be one of the bad itself
    for one, other in zip(whole, found, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        same = [(a == b).all().item() for a, b in zip(one.query, other.query, strict=True)]
        assert all(s or int(i) in victims for s, i in zip(same, one.ids, strict=True))


@pytest.fixture
def remote(tiny_shards: Manifest, tmp_path: Path) -> Storage:
    storage = Storage(f"memory://{tmp_path}", StorageSettings(tries=2, timeout=60))
    for path in tiny_shards.directory.iterdir():
        with storage.write(path.name) as file:
            file.write(path.read_bytes())
    return storage


def test_a_remote_stream_gives_the_batches_of_a_local_one(
    remote: Storage, tiny_shards: Manifest, tmp_path: Path
) -> None:
    """By ranges, and through a cache of whole shards."""
    layout = MicroBatchLayout(2, 4, 0, 1)
    common = ("step.micro_batch=2", "step.micro_batches=4", "schedule.epochs=2", "data.window=8")
    cache = f"data.cache={{directory: {tmp_path / 'cache'}, bytes: 1000000}}"
    local = [b for step in build_stream(tiny_recipe(*common), tiny_shards, layout) for b in step]
    for more in ((), (cache,)):
        recipe = tiny_recipe(*common, f"data.shards={remote.url}", *more)
        manifest = open_data(recipe.data, ["train"])
        found = [b for step in build_stream(recipe, manifest, layout) for b in step]
        assert all(same_views(a, b) for a, b in zip(local, found, strict=True))
    assert list((tmp_path / "cache").glob("*.copy"))


def test_a_cache_that_does_not_hold_what_a_host_reads_is_refused_with_the_figure(remote: Storage) -> None:
    """It would fetch shards again and again."""
    recipe = tiny_recipe(
        "step.micro_batch=2",
        "step.micro_batches=4",
        f"data.shards={remote.url}",
        "data.cache={directory: /tmp/never, bytes: 30000}",
    )
    manifest = load_manifest(remote)
    needed = sum(shard.bytes for shard in manifest.split("train").shards)
    with pytest.raises(RecipeError, match=rf"data.cache.bytes 30000 cannot hold .* 1 ranks .* raise it to {needed}"):
        build_stream(recipe, manifest, MicroBatchLayout(2, 4, 0, 1))


def test_a_pipe_command_without_a_cache_is_refused_before_training(tiny_shards: Manifest) -> None:
    """It cannot give windows."""
    url = f"pipe:cat {tiny_shards.directory}/{{name}}"
    recipe = tiny_recipe(f"data.shards='{url}'", "data.allow_pipe_urls=true")
    with pytest.raises(RecipeError, match=r"whole shards, not ranges.*data.cache.directory"):
        build_stream(recipe, open_data(recipe.data, ["train"]), MicroBatchLayout(8, 4, 0, 1))


def test_storage_that_goes_away_ends_the_stream_with_its_name(remote: Storage) -> None:
    """Not with a shorter epoch, and not with thousands of replaced samples."""
    recipe = tiny_recipe("step.micro_batch=2", "step.micro_batches=4", "data.window=4")
    stream = build_stream(recipe, load_manifest(remote), MicroBatchLayout(2, 4, 0, 1))
    next(stream)
    for path in list(fsspec.filesystem("memory").store):
        if path.startswith(remote.url.removeprefix("memory://")) and path.endswith(".tar"):
            fsspec.filesystem("memory").rm_file(path)
    with pytest.raises(DataError, match=r"memory://.*train-0000\d.tar.* is missing"):
        list(stream)
