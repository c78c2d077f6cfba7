"""Shards are the bytes that tarfile and webdataset write, and other readers find their way in them."""

import io
import itertools
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from paco_ds.data.manifest import Manifest
from paco_ds.data.pack.check import check_shards
from paco_ds.data.pack.tar import OWNER, SampleTar, header
from paco_ds.data.shard import ShardReader, index_shard
from tests.data.tiny import encoded


@pytest.mark.parametrize("size", [0, 1, 512, 123_456, 8**11 - 1])
def test_header_is_tarfiles(size: int) -> None:
    """Byte for byte, for any size that a ustar header holds."""
    info = tarfile.TarInfo("train-00000007.jpg")
    info.size, info.mode, info.uname, info.gname = size, 0o444, OWNER, OWNER
    assert header(b"train-00000007.jpg", size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_tar_is_webdatasets(tmp_path: Path, ending: str) -> None:
    """The bytes of TarWriter for the same samples, and the index that reading them back gives."""
    images = [encoded(f".{ending}", side, side) for side in (1, 8, 30, 21)] + [bytes(512), bytes(10240)]
    with open(tmp_path / "ours.tar", "wb") as file:
        tar = SampleTar(file)
        for number, image in enumerate(images):
            tar.add(f"k-{number}", ending, image, b'{"label": %d}' % number, number)
        tar.close()
    theirs = io.BytesIO()
    with TarWriter(theirs, encoder=False, mtime=0, user=OWNER, group=OWNER) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"k-{number}", ending: image, "json": b'{"label": %d}' % number})
    assert (tmp_path / "ours.tar").read_bytes() == theirs.getvalue()
    assert (tar.index() == index_shard(tmp_path / "ours.tar")).all()


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_images_read_to_their_place_are_the_same(tmp_path: Path, ending: str) -> None:
    """Beside small and long JSON, beyond the buffer, up to its end and over it."""
    rng = np.random.default_rng(0)
    sizes = [1, 511, 512, 700_000, *rng.integers(1, 130_000, 40).tolist(), 253_000, 262_144, 3]
    abouts = [(b'{"label": %d}' % n).ljust(1 if n % 3 else 20_000) for n in range(len(sizes))]
    with open(tmp_path / "copied.tar", "wb") as copied, open(tmp_path / "placed.tar", "wb") as placed:
        one, other = SampleTar(copied), SampleTar(placed)
        for number, (size, about) in enumerate(zip(sizes, abouts, strict=True)):
            image = rng.bytes(size)
            one.add(f"k-{number}", ending, image, about, number)
            room = other.room(size + 1)
            room[:size] = image
            other.add(f"k-{number}", ending, room[:size], about, number)
        one.close()
        other.close()
    assert (tmp_path / "placed.tar").read_bytes() == (tmp_path / "copied.tar").read_bytes()
    assert (other.sha256, other.index().tolist()) == (one.sha256, one.index().tolist())
    assert (other.index() == index_shard(tmp_path / "placed.tar")).all()


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take a part of what it is given."""
    import os

    whole = os.write
    monkeypatch.setattr("paco_ds.data.pack.tar.os.write", lambda fd, piece: whole(fd, piece[:1000]))
    with open(tmp_path / "short.tar", "wb") as file:
        tar = SampleTar(file)
        tar.add("k-0", "jpg", encoded(side=40), b"{}", 0)
        tar.close()
    assert (tmp_path / "short.tar").stat().st_size == tar.bytes
    with tarfile.open(tmp_path / "short.tar") as archive:
        assert archive.getnames() == ["k-0.jpg", "k-0.json"]


def energon_offsets(tar: Path) -> list[int]:
    """What Megatron-Energon's `prepare` writes as `SHARD.tar.idx`: where samples start, and where the last one ends."""
    offsets, last = [], None
    with tarfile.open(tar, "r:*") as archive:
        for member in archive:
            base = member.name.split(".")[0]
            if base != last:
                offsets.append(member.offset)
                last = base
        offsets.append(archive.offset)
    return offsets


def test_energon_finds_its_offsets_beside_each_shard(tiny_shards: Manifest) -> None:
    """The same numbers as its own indexing gives, and the reads that its reader makes by them."""
    reader = ShardReader(tiny_shards.storage, tiny_shards.split("train"))
    sample_id = 0
    for shard in tiny_shards.split("train").shards:
        raw = (tiny_shards.directory / shard.energon_file).read_bytes()
        offsets = [struct.unpack("Q", raw[8 * i : 8 * i + 8])[0] for i in range(len(raw) // 8)]
        assert offsets == energon_offsets(tiny_shards.directory / shard.file)
        data = (tiny_shards.directory / shard.file).read_bytes()
        for start, end in itertools.pairwise(offsets):
            with tarfile.open(fileobj=io.BytesIO(data[start:end]), mode="r:") as part:
                image, about = (part.extractfile(name).read() for name in sorted(part.getnames(), reverse=True))
            assert image == reader.read(sample_id).image
            assert b'"label": %d' % reader.read(sample_id).label in about
            sample_id += 1
    assert sample_id == 47


def test_stale_offsets_are_found_by_the_check(damaged: Manifest) -> None:
    """Other readers would read nonsense by them; without them ours reads on."""
    path = damaged.directory / "train-00000.tar.idx"
    path.write_bytes(np.zeros(len(path.read_bytes()) // 8, "<u8").tobytes())
    assert check_shards(damaged) == [
        "train-00000.tar.idx does not fit train-00000.tar: remove it, only other readers use it"
    ]
    path.unlink()
    assert check_shards(damaged) == []
