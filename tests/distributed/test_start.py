"""What a started job does before its first step, and what it leaves behind."""

from pathlib import Path

import pytest

from paco_ds import train
from paco_ds.config.load import load_recipe
from paco_ds.errors import DataError
from tests.data.tiny import encoded


def loaded_operations(ranks) -> list[str]:
    """DeepSpeed's compiled operations of this process, and their shared memory."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "torch_extensions" in line or "deepspeed_allreduce_buffer" in line]


def test_a_start_builds_nothing_and_uses_no_shared_memory(pool):
    """No compiler, no writable HOME and no /dev/shm are needed, and nothing is left there."""
    assert pool(2).run("tests.distributed.test_start:loaded_operations") == [[], []]


def build_missing(ranks, card: str, shards: str) -> str:
    """What the build of missing shards ended with on this rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "card_with_images", lambda _: Path(card))
        try:
            train._build_missing_shards(shards, ranks)
        except DataError as error:
            return str(error)
    return "built" if Path(shards, "manifest.json").exists() else "missing"


@pytest.fixture
def card(tmp_path):
    """A card beside the images of its two classes."""
    for number, name in enumerate("ab"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.jpg").write_bytes(encoded(seed=number))
    card = tmp_path / "card.yaml"
    card.write_text("{name: n, license: n, source: folder, root: images, splits: {train: {folder: .}}}")
    return card


def test_missing_shards_are_built_before_any_rank_goes_on(pool, card, tmp_path):
    """By one rank; each finds them afterwards."""
    run = {"card": str(card), "shards": str(tmp_path / "shards")}
    assert pool(2).run("tests.distributed.test_start:build_missing", **run) == ["built", "built"]


def test_a_build_that_fails_ends_every_rank_with_the_builders_message(pool, card, tmp_path):
    """Nobody waits for the rank that built."""
    (card.parent / "images/a/0.jpg").unlink()
    run = {"card": str(card), "shards": str(tmp_path / "shards")}
    first, second = pool(2).run("tests.distributed.test_start:build_missing", **run)
    assert first == second
    assert f"{tmp_path / 'shards'} could not be built from {card}: " in first


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_the_demo_without_settings_runs_on_any_number_of_ranks(ranks, micro_batches, monkeypatch):
    """An override still decides."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))

    def demo(*overrides):
        return train._demo(overrides).step

    assert demo().micro_batches == micro_batches
    assert demo("step.micro_batches=16").micro_batches == 16
    assert demo().reference_micro_batches == load_recipe("demo").step.reference_micro_batches
