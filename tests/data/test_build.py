"""Images to shards: the same bytes each time, nothing half-written, damage found."""

from pathlib import Path

import fsspec
import numpy as np
import pytest

from paco_ds.data.manifest import Manifest, load_manifest, sample_key
from paco_ds.data.pack import write as write_module
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import load_card
from paco_ds.data.pack.check import check_shards
from paco_ds.data.pack.command import main
from paco_ds.data.pack.samples import SamplesBuilder
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.pack.write import plan_shards
from paco_ds.errors import DataError
from tests.data.tiny import encoded, flip_byte


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def visible(directory: Path) -> list[str]:
    """Names of the files that a reader of the directory sees."""
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def build(card: Path, output: Path, *options: str) -> int:
    """The command on the tiny card, with several small shards."""
    return main(["build", str(card), "--output", str(output), "--shard-bytes", "20000", "--workers", "1", *options])


def test_same_seed_same_bytes_for_any_number_of_workers(tiny_card: Path, tiny_shards: Manifest, tmp_path: Path) -> None:
    """Manifest, tars and indexes of a pool of two equal those of one process."""
    assert build(tiny_card, tmp_path / "again", "--workers", "2") == 0
    assert contents(tmp_path / "again") == contents(tiny_shards.directory)


def test_another_seed_is_another_order(tiny_card: Path, tiny_shards: Manifest, tmp_path: Path) -> None:
    """The seed decides the order inside the shards."""
    assert build(tiny_card, tmp_path / "other", "--seed", "1") == 0
    tar = "train-00000.tar"
    assert (tmp_path / "other" / tar).read_bytes() != (tiny_shards.directory / tar).read_bytes()


def test_plan_holds_every_sample_once_below_the_limit() -> None:
    """About equal shards of at most the asked size, up to one sample."""
    rows = SamplesBuilder()
    for number in range(200):
        rows.add(str(number), 0, size=1000 + 37 * number)
    samples = rows.build()
    shards = plan_shards(samples, "train", seed=0, shard_bytes=60_000)
    order = np.concatenate(shards).tolist()
    assert sorted(order) == list(range(200))
    assert order != list(range(200))
    sizes = [int(samples.sizes[rows].sum()) for rows in shards]
    assert max(sizes) <= 60_000
    assert min(sizes) > 30_000


def test_build_prints_what_the_set_is(tiny_card: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes, samples, imbalance factor and shots."""
    assert build(tiny_card, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "47" in printed
    assert "6.0" in printed
    assert "1 many, 1 medium, 1 few" in printed


def test_existing_shards_are_refused(tiny_card: Path, damaged: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is replaced unless asked to; the message is one line and says how."""
    before = contents(damaged.directory)
    assert build(tiny_card, damaged.directory) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "already has shards; give another --output, or --overwrite" in message
    assert contents(damaged.directory) == before


def test_tars_of_others_are_refused(tiny_card: Path, tmp_path: Path) -> None:
    """A folder of foreign shards is not built into."""
    (tmp_path / "train-00000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"has train-00000.tar, which paco_ds did not write"):
        build_shards(load_card(tiny_card), tiny_card.parent / "images", tmp_path)


def test_overwrite_leaves_no_file_of_the_older_build(tiny_card: Path, damaged: Manifest) -> None:
    """Fewer shards than before: the others are removed, and so are partial files."""
    (damaged.directory / ".train-00009.tar.partial").write_bytes(b"half")
    root = tiny_card.parent / "images"
    build_shards(load_card(tiny_card), root, damaged.directory, BuildOptions(overwrite=True))
    assert sorted(contents(damaged.directory)) == [
        "manifest.json",
        "test-00000.index.npy",
        "test-00000.tar",
        "test-00000.tar.idx",
        "train-00000.index.npy",
        "train-00000.tar",
        "train-00000.tar.idx",
    ]


@pytest.mark.parametrize("by_link", [False, True])
def test_tars_are_not_repacked_where_they_lie(
    damaged: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], by_link: bool
) -> None:
    """--overwrite would replace them while it reads them; a link to them leads to the same place."""
    before = contents(damaged.directory)
    root = damaged.directory
    if by_link:
        (root := tmp_path / "in").mkdir()
        (root / "train-1.tar").symlink_to(damaged.directory / "train-00001.tar")
    words = ["--source", "webdataset", "--root", str(root), "--train", "train-*.tar"]
    assert main(["build", *words, "--output", str(damaged.directory), "--overwrite"]) == 2
    assert main(["add", str(damaged.directory), *words]) == 2
    assert capsys.readouterr().err.count("is a tar of the source in the folder that shards are written to: give") == 2
    assert contents(damaged.directory) == before


def test_interrupted_build_leaves_no_half_written_shard(
    tiny_card: Path,
    tiny_shards: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped inside the second shard: the first is whole, the second has no name, there is no manifest."""
    last = tiny_shards.split("train").shards[0].samples + 1

    def interrupt(split: str, sample_id: int) -> str:
        if sample_id == last:
            raise KeyboardInterrupt
        return sample_key(split, sample_id)

    monkeypatch.setattr(write_module, "sample_key", interrupt)
    assert build(tiny_card, tmp_path / "out") == 130
    assert "give the same command again" in capsys.readouterr().err
    assert visible(tmp_path / "out") == ["train-00000.index.npy", "train-00000.tar", "train-00000.tar.idx"]
    monkeypatch.undo()
    assert build(tiny_card, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tiny_shards.directory)


def test_failed_source_does_not_touch_existing_shards(
    tiny_card: Path, damaged: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--overwrite with a wrong root loses nothing."""
    before = contents(damaged.directory)
    assert build(tiny_card, damaged.directory, "--overwrite", "--root", str(tmp_path / "gone")) == 2
    assert "give it as --root" in capsys.readouterr().err
    assert contents(damaged.directory) == before


def test_folders_need_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--source folder; what is no image is reported."""
    for file in ("a/1.jpg", "a/2.png", "b/3.jpeg", "b/notes.txt"):
        (tmp_path / "mine" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / file).write_bytes(encoded())
    output = str(tmp_path / "out")
    assert main(["build", "--source", "folder", "--root", str(tmp_path / "mine"), "--output", output]) == 0
    assert "left out, not images by their ending: 1 .txt" in capsys.readouterr().out
    assert main(["check", output]) == 0


@pytest.mark.parametrize("root", ["{folder}/mine", "memory://mine"])
def test_shards_in_the_folder_of_the_images_are_no_class(tmp_path: Path, root: str) -> None:
    """Nor the second time, nor when images are added."""
    memory = fsspec.filesystem("memory")
    try:
        root = root.format(folder=tmp_path)
        for name in ("cat/1.png", "dog/2.png"):
            with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
                file.write(encoded(".png", seed=ord(name[0])))
        words = ["build", "--source", "folder", "--root", root, "--output", f"{root}/shards", "--workers", "1"]
        assert [main(words), main([*words, "--overwrite"])] == [0, 0]
        with fsspec.open(f"{root}/cat/3.png", "wb") as file:
            file.write(encoded(".png", seed=3))
        assert main(["add", f"{root}/shards", "--source", "folder", "--root", root, "--workers", "1"]) == 0
        assert load_manifest(f"{root}/shards").classes == ("cat", "dog")
    finally:
        memory.store.clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a dataset CARD or --source with --root"),
        (["--source", "folder"], "--source folder needs --root"),
        (["none.yaml"], "no dataset card none.yaml"),
    ],
)
def test_incomplete_commands_say_what_is_missing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither card nor folder, folder without root, card that is not there."""
    assert main(["build", *arguments, "--output", "out"]) == 2
    assert message in capsys.readouterr().err


def test_check_of_whole_shards_is_one_line(tiny_shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0."""
    assert main(["check", str(tiny_shards.directory), "--workers", "1"]) == 0
    assert "no damage, 59 samples in" in capsys.readouterr().out


def test_check_lists_all_damage(damaged: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 with each shard and sample: flipped byte, cut shard, missing index."""
    flip_byte(damaged.directory / "train-00000.tar", 5)
    cut = damaged.directory / "train-00001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    (damaged.directory / "test-00000.index.npy").unlink()
    assert main(["check", str(damaged.directory), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    for expected in (
        "shard train-00000.tar: SHA-256 differs",
        "sample train-00000000 of shard train-00000.tar: crc_mismatch",
        "train-00001.tar has 3000 bytes",
        "test-00000.index.npy is missing",
        "4 problems",
    ):
        assert expected in printed


def test_a_size_with_a_unit_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """`--shard-bytes` is a number of bytes."""
    with pytest.raises(SystemExit):
        main(["build", "card.yaml", "--output", "out", "--shard-bytes", "256MB"])
    assert "--shard-bytes: '256MB' is no whole number of 1 or more, without a unit" in capsys.readouterr().err


def test_check_of_no_shards_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2: there is nothing to check."""
    assert main(["check", str(tmp_path / "none")]) == 2
    assert "there is no shard directory" in capsys.readouterr().err


def test_check_compares_class_counts(tiny_shards: Manifest) -> None:
    """A manifest whose counts add up but differ from those of the indexes."""
    train = tiny_shards.split("train").model_copy(update={"class_counts": (29, 13, 5)})
    edited = tiny_shards.model_copy(update={"splits": {"train": train}})
    assert check_shards(edited) == ["split train: class_counts of the manifest differ from those of the indexes"]


def test_check_compares_names_with_those_in_the_tars(tiny_shards: Manifest) -> None:
    """Two classes swapped and one renamed; the shards of train and test exchanged."""
    renamed = tiny_shards.model_copy(update={"classes": ("dog", "cat", "newt")})
    lines = [f"class {label} is {name!r}, by the manifest " for label, name in enumerate(("cat", "dog", "eel"))]
    problems = check_shards(renamed)
    assert all(any(line in problem for problem in problems) for line in lines)
    train, test = (tiny_shards.split(name) for name in ("train", "test"))
    splits = {"train": test.model_copy(update={"name": "train"}), "test": train.model_copy(update={"name": "test"})}
    problems = check_shards(tiny_shards.model_copy(update={"splits": splits}))
    assert "shard test-00000.tar begins with test-00000000, by the manifest with train-00000000" in problems
    assert len(problems) == len(train.shards) + len(test.shards)
