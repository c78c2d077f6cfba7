"""Sources and shards on a real S3-compatible server that refuses and cuts connections."""

import multiprocessing
from pathlib import Path

import pytest

from paco_ds.config.data import StorageSettings
from paco_ds.data.manifest import Manifest, load_manifest
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.build_ranks import BuildRank
from paco_ds.data.pack.card import card_of_options, load_card
from paco_ds.data.pack.check import check_shards
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.shards import build_shards, build_share
from paco_ds.data.storage import Storage
from paco_ds.errors import DataError
from tests.data.s3 import BUCKET, Proxy
from tests.data.test_sources_more import card, cifar100
from tests.data.tiny import encoded


def test_shards_on_s3_are_those_on_disk(tiny_card: Path, tiny_shards: Manifest, s3: Proxy) -> None:
    """Though connections are cut meanwhile; nothing else is left there."""
    place = f"s3://{BUCKET}/shards"
    s3.make("cut", 3, cut_after=100)
    built = build_shards(load_card(tiny_card), tiny_card.parent / "images", place, BuildOptions(shard_bytes=20_000))
    assert built.sha256 == tiny_shards.sha256
    files = {name: size for name, (size, _) in Storage(place).find("").items()}
    assert files == {path.name: path.stat().st_size for path in tiny_shards.directory.iterdir()}
    assert check_shards(load_manifest(place)) == []


def test_build_on_s3_goes_on_where_it_was_stopped(
    tiny_card: Path, tiny_shards: Manifest, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records of finished shards lie there too."""
    from tests.data.test_build_resume import Stop, stop_after

    place = f"s3://{BUCKET}/stopped"
    stop_after(monkeypatch, 2)
    with pytest.raises(Stop):
        build_shards(load_card(tiny_card), tiny_card.parent / "images", place, BuildOptions(shard_bytes=20_000))
    monkeypatch.undo()
    stop_after(monkeypatch, len(tiny_shards.split("train").shards) + len(tiny_shards.split("test").shards) - 2)
    again = build_shards(load_card(tiny_card), tiny_card.parent / "images", place, BuildOptions(shard_bytes=20_000))
    assert again.sha256 == tiny_shards.sha256


def test_images_on_s3_are_listed_once_and_read(s3: Proxy, tmp_path: Path) -> None:
    """A list file and its images behind one URL; a missing one is named by the listing."""
    source = Storage(f"s3://{BUCKET}/source")
    for number in range(3):
        with source.write(f"images/{number}.jpg") as file:
            file.write(encoded(seed=number))
    with source.write("train.txt") as file:
        file.write(b"".join(b"images/%d.jpg 0\n" % number for number in range(4)))
    listed = card("list", {"train": {"list": "train.txt"}})
    found = read_source(listed, source.url)
    assert [str(bad) for bad in found.bad] == ["images/3.jpg: missing"]
    manifest = build_shards(listed, source.url, tmp_path / "out", BuildOptions(max_bad=1))
    assert manifest.split("train").samples == 3


def _share(card: Path, place: str, rank: int) -> None:
    options = BuildOptions(shard_bytes=20_000)
    build_share(load_card(card), card.parent / "images", place, options, BuildRank(rank, 2, patience=60))


def test_ranks_share_a_build_on_s3(tiny_card: Path, tiny_shards: Manifest, s3: Proxy) -> None:
    """Two ranks that know each other by the files there alone leave the bytes of one, and nothing else."""
    place = f"s3://{BUCKET}/shared"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_share, args=(tiny_card, place, rank)) for rank in (1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    storage = Storage(place)
    there = {path.name: path.read_bytes() for path in tiny_shards.directory.iterdir()}
    assert {name: storage.read(name) for name in storage.find("")} == there


def test_idx_files_on_s3_are_read(tiny_card: Path, tiny_shards: Manifest, s3: Proxy, tmp_path: Path) -> None:
    """The same bytes as from a local folder."""
    source = upload(tiny_card.parent / "images", "idx")
    built = build_shards(load_card(tiny_card), source, tmp_path / "out", BuildOptions(shard_bytes=20_000))
    assert built.sha256 == tiny_shards.sha256


def test_cifar_pickles_on_s3_are_found_and_read(s3: Proxy, tmp_path: Path) -> None:
    """With the card that they stand for by themselves; a missing file is named by its URL."""
    folder = tmp_path / "images"
    folder.mkdir()
    cifar100(folder)
    made = card_of_options({"source": "cifar", "root": str(folder)})
    here = build_shards(made, folder, tmp_path / "here")
    source = upload(folder, "cifar")
    found = card_of_options({"source": "cifar", "root": source, "name": made.name})
    assert build_shards(found, source, tmp_path / "there").sha256 == here.sha256
    Storage(source).remove("train")
    with pytest.raises(DataError, match=f"CIFAR file {source}/train is missing"):
        read_source(found, source)


def upload(folder: Path, name: str) -> str:
    """Copy a folder's files to the server; their URL there."""
    place = Storage(f"s3://{BUCKET}/{name}")
    for path in folder.iterdir():
        with place.write(path.name) as file:
            file.write(path.read_bytes())
    return place.url


def test_s3_that_stays_away_ends_the_build_with_its_url(tiny_card: Path, s3: Proxy) -> None:
    """After the tries that storage allows."""
    s3.make("refuse", 1000)
    away = Storage(f"s3://{BUCKET}/away", StorageSettings(tries=2, timeout=1))
    try:
        with pytest.raises(DataError, match=f"s3://{BUCKET}/away.*2 tries"):
            build_shards(load_card(tiny_card), tiny_card.parent / "images", away)
    finally:
        s3.make("", 0)


def test_shards_on_s3_are_packed_again(tiny_card: Path, tiny_shards: Manifest, s3: Proxy, tmp_path: Path) -> None:
    """As they are from a disk, though a connection is cut; a cut tar and one that is not there are named."""
    place = f"s3://{BUCKET}/again"
    build_shards(load_card(tiny_card), tiny_card.parent / "images", place, BuildOptions(shard_bytes=20_000))
    splits = {name: {"tars": f"{name}-*.tar"} for name in ("train", "test")}
    expected = build_shards(card("webdataset", splits), tiny_shards.directory, tmp_path / "disk", BuildOptions(seed=7))
    s3.make("cut", 1, cut_after=100)
    built = build_shards(card("webdataset", splits), place, tmp_path / "s3", BuildOptions(seed=7))
    assert built.sha256 == expected.sha256
    whole = Storage(place).read("train-00000.tar")
    with Storage(place).write("cut-0.tar") as file:
        file.write(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"again/cut-0\.tar is damaged"):
        read_source(card("webdataset", {"train": {"tars": "cut-*.tar"}}), place)
    with pytest.raises(DataError, match=r"again/none-1\.tar is missing"):
        read_source(card("webdataset", {"train": {"tars": "none-1.tar"}}), place)
