"""Reading samples by id, and seeing every kind of damage."""

import json
import os
import pickle
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset as wds

from paco_ds.data import shard as shard_module
from paco_ds.data.manifest import Manifest
from paco_ds.data.pack.sources.idx import read_idx
from paco_ds.data.shard import BadSample, ShardReader, check_shard, index_shard, load_index, remedy_of
from paco_ds.errors import DataError
from tests.data.tiny import flip_byte


def rows_of(manifest: Manifest, number: int) -> np.ndarray:
    """The index of one training shard."""
    return load_index(manifest.directory, manifest.split("train").shards[number])


def test_ids_run_through_the_shards_in_order(tiny_shards: Manifest) -> None:
    """Keys, labels and shards of all ids are those of the tars, in their order."""
    split = tiny_shards.split("train")
    reader = ShardReader(tiny_shards.directory, split)
    expected = []
    for shard in split.shards:
        with tarfile.open(tiny_shards.directory / shard.file) as tar:
            for member in tar.getmembers()[::2]:
                content = tar.extractfile(member)
                assert content
                label = json.load(content)["label"]
                expected.append((member.name.split(".")[0], label, shard.file))
    samples = [reader.read(i) for i in range(split.samples)]
    assert [reader.key_of(i) for i in range(split.samples)] == [sample.key for sample in samples]
    assert [(s.key, s.label, s.shard) for s in samples] == expected
    assert expected[0][0] == "train-00000000"
    assert reader.counts == tuple(s.samples for s in split.shards)
    assert reader.labels().tolist() == [s.label for s in samples]
    assert [len(reader.ids_of_class(c)) for c in range(3)] == [30, 12, 5]


def test_images_are_the_sources_pixels(tiny_shards: Manifest, tiny_card: Path) -> None:
    """What was put in comes out, each image with its own label."""
    images = read_idx(tiny_card.parent / "images" / "train-images")
    labels = read_idx(tiny_card.parent / "images" / "train-labels")
    source = {pixels.tobytes(): int(label) for pixels, label in zip(images, labels, strict=True)}
    reader = ShardReader(tiny_shards.directory, tiny_shards.split("train"))
    stored = {}
    for sample in map(reader.read, range(47)):
        pixels = cv2.imdecode(np.frombuffer(sample.image, np.uint8), cv2.IMREAD_GRAYSCALE)
        stored[pixels.tobytes()] = sample.label
    assert stored == source


def test_webdataset_reads_the_same_samples(tiny_shards: Manifest) -> None:
    """Any webdataset reader sees the ids in their order, with image bytes and JSON."""
    split = tiny_shards.split("train")
    reader = ShardReader(tiny_shards.directory, split)
    urls = [str(tiny_shards.directory / shard.file) for shard in split.shards]
    found = list(wds.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in found] == [f"train-{i:08d}" for i in range(47)]
    assert [s["png"] for s in found] == [reader.read(i).image for i in range(47)]
    about = json.loads(found[0]["json"])
    assert about["class"] == tiny_shards.classes[about["label"]]
    assert about["source"].startswith("train-images#")


def test_index_covers_the_tar_without_gaps(tiny_shards: Manifest) -> None:
    """Stretches touch, so a window of samples is one range of bytes."""
    index = rows_of(tiny_shards, 0)
    assert index["offset"][0] == 0
    assert (index["offset"][1:] == index["offset"][:-1] + index["size"][:-1]).all()


def test_reader_survives_pickling(tiny_shards: Manifest) -> None:
    """A reader that is in use can be sent to a worker."""
    reader = ShardReader(tiny_shards.directory, tiny_shards.split("train"))
    assert pickle.loads(pickle.dumps(reader)).read(3) == reader.read(3)


def test_only_so_many_files_stay_open(tiny_shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading back and forth over more shards than may be open still reads."""
    monkeypatch.setattr(shard_module, "MAX_OPEN_SHARDS", 1)
    with ShardReader(tiny_shards.directory, tiny_shards.split("train")) as reader:
        assert [reader.read(i).key[-2:] for i in (46, 0, 46)] == ["46", "00", "46"]
        assert len(reader._files) == 1


@pytest.mark.parametrize("sample_id", [-1, 47])
def test_unknown_id_names_the_range(tiny_shards: Manifest, sample_id: int) -> None:
    """Negative ids do not wrap around."""
    with pytest.raises(IndexError, match=rf"has ids 0 to 46, not {sample_id}"):
        ShardReader(tiny_shards.directory, tiny_shards.split("train")).read(sample_id)


@pytest.mark.parametrize("where", ["header", "image", "label"])
def test_flipped_byte_is_one_bad_sample(damaged: Manifest, where: str) -> None:
    """A byte flipped in header, image or JSON spoils that sample alone, and the check names it."""
    row = rows_of(damaged, 1)[2]
    start = int(row["offset"])
    spot = {"header": start + 5, "image": start + int(row["image_offset"]) + 20, "label": start + 512 + 3}
    flip_byte(damaged.directory / "train-00001.tar", spot[where])
    split = damaged.split("train")
    reader = ShardReader(damaged.directory, split)
    bad_id = split.shards[0].samples + 2
    with pytest.raises(BadSample, match=rf"sample train-{bad_id:08d} of shard train-00001.tar: crc_mismatch"):
        reader.read(bad_id)
    assert reader.read(bad_id + 1).key == f"train-{bad_id + 1:08d}"
    problems = check_shard(damaged.directory, split, 1)
    assert problems == [
        "shard train-00001.tar: SHA-256 differs from the manifest's",
        f"sample train-{bad_id:08d} of shard train-00001.tar: crc_mismatch",
    ]
    assert check_shard(damaged.directory, split, 0) == []


def test_bad_sample_crosses_processes() -> None:
    """The stream sends it from a worker to the rank."""
    bad = pickle.loads(pickle.dumps(BadSample("crc_mismatch", "train-00000001", "train-00000.tar")))
    assert (bad.reason, bad.key, bad.shard) == ("crc_mismatch", "train-00000001", "train-00000.tar")


def test_cut_shard_is_refused_at_open(damaged: Manifest) -> None:
    """A cut shard ends the run with its name, not with a shorter epoch."""
    path = damaged.directory / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"train-00000.tar has 5000 bytes, manifest.json says"):
        ShardReader(damaged.directory, damaged.split("train")).read(0)


def test_shard_cut_while_open_is_a_short_read(damaged: Manifest) -> None:
    """A file that shrinks under an open reader gives bad samples with a reason of their own."""
    reader = ShardReader(damaged.directory, damaged.split("train"))
    reader.read(0)
    path = damaged.directory / "train-00000.tar"
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(BadSample, match="short_read"):
        reader.read(1)


def test_a_read_that_returns_less_goes_on(tiny_shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does above 2 GiB, and some file systems do anyway."""
    pread = os.pread
    expected = [ShardReader(tiny_shards.directory, tiny_shards.split("train")).read(number) for number in range(9)]
    monkeypatch.setattr(shard_module.os, "pread", lambda file, size, at: pread(file, min(size, 700), at))
    reader = ShardReader(tiny_shards.directory, tiny_shards.split("train"))
    assert [stored.sample() for stored in reader.read_window(range(9))] == expected


def test_the_remedy_is_that_of_the_reason() -> None:
    """`check` finds what damages shards, `--verify` what was damaged before; large images are a setting's matter."""
    assert remedy_of(["short_read", "crc_mismatch"], "/d") == (
        "Copy or build the shards again: paco-build-shards check /d names all damage."
    )
    assert remedy_of(["too_many_pixels"], "/d") == "Raise data.max_pixels, or build with --resize-short."
    for reason in ("truncated", "undecodable", "unknown_format", "empty", "too_many_scans"):
        assert re.search("build with --verify.*--max-bad", remedy_of([reason], "/d"))
        assert "check" not in remedy_of([reason], "/d")
    assert remedy_of({"truncated", "read_error", "too_many_pixels"}, "/d").count("build") == 4


def test_missing_shard_is_refused_at_open(damaged: Manifest) -> None:
    """So is one that is not there."""
    (damaged.directory / "train-00000.tar").unlink()
    with pytest.raises(DataError, match=r"train-00000.tar is missing"):
        ShardReader(damaged.directory, damaged.split("train")).read(0)


def test_damaged_index_is_refused(damaged: Manifest) -> None:
    """An index is believed only with the manifest's digest."""
    flip_byte(damaged.directory / "train-00000.index.npy", 140)
    with pytest.raises(DataError, match=r"train-00000.index.npy is damaged, its SHA-256"):
        ShardReader(damaged.directory, damaged.split("train")).labels()


def test_tar_of_unpaired_members_has_no_index(tmp_path: Path) -> None:
    """A tar that is not made of image and JSON pairs is refused with the members' names."""
    path = tmp_path / "odd.tar"
    with wds.TarWriter(str(path), encoder=False) as tar:
        tar.write({"__key__": "a", "png": b"1"})
        tar.write({"__key__": "b", "json": b"{}"})
    with pytest.raises(DataError, match=r"a.png, b.json are not one sample's image and JSON"):
        index_shard(path)


def test_threads_may_read_indexes_at_a_time(tiny_shards: Manifest) -> None:
    """Python 3.11 refuses to read an array's header in several threads at a time, once in a few thousand."""
    shard = tiny_shards.split("train").shards[0]
    expected = load_index(tiny_shards.storage, shard)
    with ThreadPoolExecutor(8) as pool:
        for index in pool.map(lambda _: load_index(tiny_shards.storage, shard), range(2000)):
            assert np.array_equal(index, expected)
