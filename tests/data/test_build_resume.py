"""A build that is killed, shared by ranks, or short of room: it goes on, and ends with the same bytes."""

import errno
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset as wds

from paco_ds.data.manifest import Manifest, load_manifest
from paco_ds.data.pack import shards as build_module
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.build_ranks import BuildRank, rank_of_environment
from paco_ds.data.pack.card import Card, card_of_options, folder_card, load_card
from paco_ds.data.pack.command import main
from paco_ds.data.pack.shards import build_shards, build_share
from paco_ds.data.pack.write import Written, write_shard
from paco_ds.errors import DataError, StorageError
from tests.data.tiny import encoded, flip_byte, write_idx

ROOT = Path(__file__).parents[2]
SMALL = BuildOptions(shard_bytes=20_000)


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory; it must have no folder."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def images_of(card: Path) -> Path:
    """Where the tiny set's images are."""
    return card.parent / "images"


class Stop(Exception):  # noqa: N818
    """Ends a build where a kill would."""


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Let a build end, as if killed, when it begins the next shard."""
    begun = iter(range(shards))

    def write(*arguments: object) -> Written:
        if next(begun, None) is None:
            raise Stop
        return write_shard(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "write_shard", write)


def test_stopped_build_writes_only_what_is_missing(
    tiny_card: Path, tiny_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are not written again; the end is the same, and the state is cleared."""
    card, out = load_card(tiny_card), tmp_path / "out"
    stop_after(monkeypatch, 2)
    with pytest.raises(Stop):
        build_shards(card, images_of(tiny_card), out, SMALL)
    first = (out / "train-00000.tar").stat()
    monkeypatch.undo()
    build_shards(card, images_of(tiny_card), out, SMALL)
    assert (out / "train-00000.tar").stat().st_ino == first.st_ino
    assert contents(out) == contents(tiny_shards.directory)


@pytest.mark.parametrize("file", ["train-00000.tar", "train-00000.index.npy"])
def test_finished_shards_are_not_trusted_blindly(
    tiny_card: Path, tiny_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A byte that the disk lost, or a record without its file, makes the shard be written again."""
    card, out = load_card(tiny_card), tmp_path / "out"
    stop_after(monkeypatch, 2)
    with pytest.raises(Stop):
        build_shards(card, images_of(tiny_card), out, SMALL)
    monkeypatch.undo()
    flip_byte(out / file, 200)
    (out / "train-00001.tar.idx").unlink()
    build_shards(card, images_of(tiny_card), out, SMALL)
    assert contents(out) == contents(tiny_shards.directory)


def test_records_of_another_plan_are_not_used(
    tiny_card: Path, tiny_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a build with another seed left is overwritten."""
    card, out = load_card(tiny_card), tmp_path / "out"
    stop_after(monkeypatch, 2)
    with pytest.raises(Stop):
        build_shards(card, images_of(tiny_card), out, BuildOptions(shard_bytes=20_000, seed=1))
    monkeypatch.undo()
    build_shards(card, images_of(tiny_card), out, SMALL)
    assert contents(out) == contents(tiny_shards.directory)


def source_of(kind: str, root: Path, seed: int) -> tuple[Card, str]:
    """A card of 24 images and its root; of another seed all images are others, with the same names and sizes."""
    root.mkdir(exist_ok=True)
    images = [encoded(".bmp", 8, 100 * seed + number) for number in range(24)]
    given: dict[str, Any] = {"root": str(root)}
    if kind == "idx":
        write_idx(root / "x", np.random.default_rng(seed).integers(0, 256, (24, 8, 8), dtype=np.uint8))
        write_idx(root / "y", np.zeros(24, np.uint8))
        (root / "classes.txt").write_text("a\n")
        given |= {"source": "idx", "train": "x,y", "classes": "classes.txt"}
    elif kind == "tar":
        with wds.TarWriter(str(root / "x.tar")) as tar:
            for number, image in enumerate(images):
                tar.write({"__key__": f"{number:02d}", "bmp": image, "cls": 0})
        given |= {"source": "webdataset", "train": "x.tar"}
    else:
        given = {"source": "folder", "root": f"memory://{root}"}
        for number, image in enumerate(images):
            fsspec.filesystem("memory").pipe(f"{root}/train/a/{number:02d}.bmp", image)
    return card_of_options(given), given["root"]


@pytest.mark.parametrize("kind", ["idx", "tar", "url"])
def test_images_that_changed_after_a_stop_are_all_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """None of the shards written before holds an old one."""
    options = BuildOptions(shard_bytes=6_000)
    stop_after(monkeypatch, 2)
    with pytest.raises(Stop):
        build_shards(*source_of(kind, tmp_path / "root", 0), tmp_path / "out", options)
    monkeypatch.undo()
    card, root = source_of(kind, tmp_path / "root", 1)
    build_shards(card, root, tmp_path / "out", options)
    build_shards(card, root, tmp_path / "fresh", options)
    assert len(list((tmp_path / "out").glob("*.tar"))) > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_build_that_ended_between_manifest_and_tidying_up_is_done(
    tiny_card: Path, tiny_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last moment to be killed."""
    card, out = load_card(tiny_card), tmp_path / "out"

    def end(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(build_module, "clear_state", end)
    with pytest.raises(Stop):
        build_shards(card, images_of(tiny_card), out, SMALL)
    monkeypatch.undo()
    build_shards(card, images_of(tiny_card), out, SMALL)
    assert contents(out) == contents(tiny_shards.directory)


def test_build_that_ended_before_its_empty_folder_was_removed_is_refused_and_tidied(
    tiny_card: Path, tiny_shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very last moment: nothing is left to do but to remove the folder of what the build knew."""
    card, out = load_card(tiny_card), tmp_path / "out"

    def end(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(build_module, "remove_state", end)
    with pytest.raises(Stop):
        build_shards(card, images_of(tiny_card), out, SMALL)
    monkeypatch.undo()
    with pytest.raises(DataError, match="already has shards"):
        build_shards(card, images_of(tiny_card), out, SMALL)
    assert contents(out) == contents(tiny_shards.directory)


def test_killed_command_goes_on(tmp_path: Path) -> None:
    """SIGKILL to all of its processes at some moment, three times over; then the same command to its end."""
    for number in range(60):
        folder = tmp_path / "images" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(".png", 40, number))
    card = folder_card(tmp_path / "images")
    options = BuildOptions(shard_bytes=30_000)
    build_shards(card, tmp_path / "images", tmp_path / "expected", options)
    command = [sys.executable, str(ROOT / "tools" / "build_shards.py"), "build", "--source", "folder"]
    command += ["--root", str(tmp_path / "images"), "--output", str(tmp_path / "out"), "--shard-bytes", "30000"]
    command += ["--workers", "2"]
    moments = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not list(tmp_path.glob("out/*.tar")):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for tar in tmp_path.glob("out/*.tar"):
            assert tar.read_bytes() == (tmp_path / "expected" / tar.name).read_bytes()
    done = subprocess.run(command, capture_output=True, text=True)
    # a kill may have come after the end
    assert done.returncode == 0 or "already has shards" in done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def _share(card: Path, out: Path, rank: int, world_size: int) -> None:
    build_share(load_card(card), images_of(card), out, SMALL, BuildRank(rank, world_size, patience=600))


@pytest.mark.parametrize("world_size", [2, 9])
def test_ranks_share_a_build(tiny_card: Path, tiny_shards: Manifest, tmp_path: Path, world_size: int) -> None:
    """Any number of ranks, also more than shards, leaves the bytes of one process and nothing else."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_share, args=(tiny_card, tmp_path / "out", rank, world_size))
        for rank in reversed(range(world_size))
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(600)
    assert [rank.exitcode for rank in ranks] == [0] * world_size
    assert contents(tmp_path / "out") == contents(tiny_shards.directory)


def test_silent_rank_is_named(tiny_card: Path, tmp_path: Path) -> None:
    """Rank 0 does not wait for ever; what it wrote is kept."""
    with pytest.raises(DataError, match=r"rank 1 was silent .* while rank 0 waited for its shards"):
        build_share(load_card(tiny_card), images_of(tiny_card), tmp_path / "out", SMALL, BuildRank(0, 2, patience=0.3))
    assert list(tmp_path.glob("out/*.tar"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_failed_rank_says_why_to_the_others(tiny_card: Path, damaged: Manifest, tmp_path: Path) -> None:
    """A build that rank 0 refuses ends on the other ranks too, with its reason."""
    out = tmp_path / "out"
    with pytest.raises(DataError, match="already has shards"):
        build_share(load_card(tiny_card), images_of(tiny_card), damaged.directory, SMALL, BuildRank(0, 2, patience=1))
    state = damaged.directory / ".build"
    (out / ".build").mkdir(parents=True)
    (out / ".build" / "rank-0.json").write_bytes((state / "rank-0.json").read_bytes())
    with pytest.raises(DataError, match=r"rank 0 failed: DataError: .*already has shards"):
        build_share(load_card(tiny_card), images_of(tiny_card), out, SMALL, BuildRank(1, 2, patience=1))


def test_rank_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE, alone without them; nonsense is refused."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank_of_environment() == BuildRank(0, 1)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(DataError, match="RANK=2 and WORLD_SIZE=1 are not valid"):
        rank_of_environment()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert rank_of_environment() == BuildRank(2, 3)


def test_argument_of_the_launcher_is_taken(tiny_card: Path, tiny_shards: Manifest, tmp_path: Path) -> None:
    """DeepSpeed puts --local_rank before all others."""
    command = ["build", str(tiny_card), "--output", str(tmp_path / "out"), "--shard-bytes", "20000", "--workers", "1"]
    assert main(["--local_rank=0", *command]) == 0
    assert contents(tmp_path / "out") == contents(tiny_shards.directory)


def test_full_disk_is_said_and_leaves_nothing_half_written(tiny_card: Path, tmp_path: Path) -> None:
    """The kernel's own limit on a file's size stands in for a full disk; a process of its own has it."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from paco_ds.data.pack.command import main\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    command = ["build", str(tiny_card), "--output", str(out), "--shard-bytes", "20000", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", script, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 74
    said = r"train-00000.tar cannot be written: File too large; .*ulimit.*give the same command again: finished shards"
    assert re.search(said, done.stderr)
    assert [path for path in out.rglob("*") if path.is_file() and path.parent.name != ".build"] == []


def test_no_room_is_said_before_anything_is_written(
    tiny_card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan knows how much is needed."""
    usage = build_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"the shards need 0.\d MB more, but .* has 0.0 MB free: free space"):
        build_shards(load_card(tiny_card), images_of(tiny_card), tmp_path / "out", SMALL)
    assert not list(tmp_path.glob("out/*.tar"))


def test_disk_that_fills_up_is_named(tiny_card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC from the write itself."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("paco_ds.data.pack.tar.os.write", full)
    with pytest.raises(StorageError, match=r"train-00000.tar cannot be written: No space left on device; make room"):
        build_shards(load_card(tiny_card), images_of(tiny_card), tmp_path / "out", SMALL)


def test_manifest_is_of_the_same_bytes_wherever_it_was_built(tiny_card: Path, tiny_shards: Manifest) -> None:
    """No path, time or host stands in it."""
    text = (tiny_shards.directory / "manifest.json").read_text()
    assert str(tiny_card.parent) not in text
    assert set(json.loads(text)) == set(Manifest.model_fields) - {"background"}  # the build had none
    assert load_manifest(tiny_shards.directory).revision == 1
