"""A source is added by one file: a module in pack/sources, or a module outside of the package."""

import sys
from pathlib import Path

import pytest

from paco_ds.config import plugins
from paco_ds.data.manifest import load_manifest
from paco_ds.data.pack import card, sources
from paco_ds.data.pack.command import main
from paco_ds.data.shard import ShardReader
from tests.data.tiny import encoded

# The whole source: images whose class is the first letter of their name.
MODULE = """
from typing import Any, ClassVar, Literal
from paco_ds.data.pack.card import Card, Option
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.samples import SamplesBuilder
from paco_ds.data.pack.source import Files, Source

class LettersCard(Card):
    page: ClassVar[str] = "a folder of images"
    options: ClassVar[dict[str, Option]] = {"letters": Option("LETTERS", "letters that are classes")}
    source: SOURCE
    letters: str = "ab"
    splits: dict[str, str]

    @classmethod
    def split_of(cls, page: str) -> str:
        return page

    def list_images(self, root: Root) -> Source:
        splits = {}
        for name, folder in self.splits.items():
            rows = SamplesBuilder()
            for file in sorted(root.files(folder)):
                rows.add(file, self.letters.index(file.rpartition("/")[2][0]))
            splits[name] = rows.build()
        return Source(tuple(self.letters), splits, Files(root))
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images; the working directory is a folder beside them, in which only this test's module is."""
    (tmp_path / "images" / "all").mkdir(parents=True)
    for number, letter in enumerate("abbab"):
        (tmp_path / "images" / "all" / f"{letter}{number}.png").write_bytes(encoded(".png", seed=number))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_allowed", False)
    return tmp_path / "images"


def built(output: Path) -> tuple[list[int], tuple[str, ...]]:
    """Sorted labels and class names of shards."""
    manifest = load_manifest(output)
    return sorted(ShardReader(output, manifest.split("train")).labels().tolist()), manifest.classes


def test_a_source_in_the_package_is_one_module(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name and options are known to the command line without another edit."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "letters.py").write_text(MODULE.replace("SOURCE", 'Literal["letters"]'))
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(folder)])
    card.card_types.cache_clear()
    try:
        with pytest.raises(SystemExit):
            main(["build", "--help"])
        assert "letters: letters that are classes" in " ".join(capsys.readouterr().out.split())
        words = ["build", "--source", "letters", "--root", str(root), "--train", "all", "--letters", "ba"]
        assert main([*words, "--output", str(tmp_path / "shards")]) == 0
    finally:
        card.card_types.cache_clear()
        sys.modules.pop("paco_ds.data.pack.sources.letters", None)
    assert built(tmp_path / "shards") == ([0, 0, 0, 1, 1], ("b", "a"))


def test_a_source_outside_the_package_needs_permission(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A card or --source names `module:Class`; it is imported with --allow-code alone."""
    Path("letters_outside.py").write_text(MODULE.replace("SOURCE", "str"))
    page = "source: letters_outside:LettersCard\nname: letters\nlicense: mine\nletters: ba\nsplits: {train: all}\n"
    Path("letters.yaml").write_text(page)
    by_card = ["build", "letters.yaml", "--root", str(root), "--workers", "2", "--output", str(tmp_path / "by_card")]
    by_option = ["build", "--source", "letters_outside:LettersCard", "--root", str(root), "--train", "all"]
    by_option += ["--letters", "ba", "--name", "letters", "--license", "mine", "--output", str(tmp_path / "by_option")]
    try:
        for words in (by_card, by_option):
            assert main(words) == 2
            assert "source letters_outside:LettersCard is code from outside paco_ds" in capsys.readouterr().err
        for words in (by_card, by_option):
            assert main([*words, "--allow-code"]) == 0
    finally:
        sys.modules.pop("letters_outside", None)
    assert built(tmp_path / "by_card") == ([0, 0, 0, 1, 1], ("b", "a"))
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("by_card", "by_option")]
    assert manifests[0] == manifests[1]


def test_a_class_that_is_no_card_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the base class."""
    words = ["build", "--source", "collections:Counter", "--root", str(root), "--train", "all", "--output", "shards"]
    assert main(words) == 2
    assert "source collections:Counter is not a subclass of paco_ds.data.pack.card.Card" in capsys.readouterr().err
