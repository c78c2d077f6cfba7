"""Checkpoints on disk: whole or not at all, verified, pruned, and free of anything executable."""

import json

import pytest
import torch

from paco_ds.checkpoint import Checkpoints, newest_checkpoint, read_checkpoint
from paco_ds.errors import CheckpointError
from tests.recipes import tiny_recipe

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}


def save(run, step, recipe=None, manifest="abc"):
    checkpoints = Checkpoints(run, recipe or tiny_recipe(), manifest)
    checkpoints.save(step, TENSORS.items(), [("weight", torch.ones(2, 3))], {"keys": torch.zeros(2)}, about={"note": 1})
    return checkpoints


def test_what_is_saved_is_read(tmp_path):
    """Tensors by name, the step, and what else was told."""
    checkpoint = save(tmp_path, 7).latest()
    assert checkpoint.step == 7
    assert checkpoint.state["note"] == 1
    assert torch.equal(checkpoint.model()["weight"], TENSORS["weight"])
    assert torch.equal(checkpoint.momentum()["weight"], torch.ones(2, 3))
    assert torch.equal(checkpoint.queue()["keys"], torch.zeros(2))


def test_only_json_and_safetensors_are_written(tmp_path):
    """Nothing that could be executed when it is read."""
    save(tmp_path, 1)
    files = {p.suffix for p in (tmp_path / "checkpoints" / "step-00000001").iterdir()}
    assert files == {".safetensors", ".json"}


def test_the_newest_are_kept_by_number(tmp_path):
    """checkpoint.keep of them."""
    for step in (1, 2, 10, 11):
        save(tmp_path, step, tiny_recipe("checkpoint.keep=2"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000010", "step-00000011"]


def test_a_damaged_later_one_does_not_push_out_the_one_just_written(tmp_path):
    """A run that went back to an older checkpoint has passed the damaged one over."""
    save(tmp_path, 5, tiny_recipe("checkpoint.keep=1"))
    (tmp_path / "checkpoints" / "step-00000005" / "state.json").unlink()
    assert save(tmp_path, 3, tiny_recipe("checkpoint.keep=1")).latest().step == 3
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_half_written_one_is_never_seen(tmp_path):
    """What a crash leaves under a temporary name is passed over, and replaced by the next try."""
    part = tmp_path / "checkpoints" / ".step-00000002.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    assert Checkpoints(tmp_path, tiny_recipe(), "abc").latest() is None
    assert save(tmp_path, 2).latest().step == 2
    assert not part.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "momentum.safetensors").unlink(), r"half-written or damaged: momentum.safetensors is missing"),
        (lambda p: (p / "state.json").write_text('{"step": '), r"half-written or damaged: state.json"),
        (lambda p: (p / "state.json").unlink(), r"half-written or damaged: state.json"),
        (lambda p: (p / "queue.safetensors").write_bytes(b"x"), r"damaged: SHA-256 of queue.safetensors differs"),
        (lambda p: _other_version(p / "state.json"), r"state.json is not a 'paco_ds checkpoint' of version 1"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, message):
    """Alone, it ends the run with what to do; an older whole one is used instead."""
    checkpoints = save(tmp_path, 2)
    damage(tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(
        CheckpointError, match=r"all checkpoints of this run are damaged[\s\S]*move .* away to start again"
    ):
        checkpoints.latest()
    older = tmp_path / "checkpoints" / "step-00000001"
    save(tmp_path / "other", 1)
    (tmp_path / "other" / "checkpoints" / "step-00000001").rename(older)
    assert checkpoints.latest().step == 1
    assert newest_checkpoint(tmp_path).step == 1


def _other_version(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def test_another_recipe_or_other_shards_are_refused(tmp_path):
    """The setting is named with both values; running settings are free."""
    save(tmp_path, 1)
    free = tiny_recipe("data.workers=3", "engine.threads=2", "metrics.port=1234", "name=other")
    assert Checkpoints(tmp_path, free, "abc").latest().step == 1
    with pytest.raises(CheckpointError, match=r"queue\.length: 80 in the checkpoint, 81 in this recipe"):
        Checkpoints(tmp_path, tiny_recipe("queue.length=81"), "abc").latest()
    with pytest.raises(CheckpointError, match=r"trained on other shards \(manifest abc, now xyz\): point data.shards"):
        Checkpoints(tmp_path, tiny_recipe(), "xyz").latest()


def test_a_setting_younger_than_the_checkpoint_was_then_its_default(tmp_path):
    """A new version goes on with a run of an older one, unless the recipe asks for what that could not do."""
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    state = json.loads(path.read_text())
    del state["meaning"]["loss.contrast_scope"]
    path.write_text(json.dumps(state))
    assert Checkpoints(tmp_path, tiny_recipe(), "abc").latest().step == 1
    younger = tiny_recipe("loss.contrast_scope=global_batch")
    with pytest.raises(
        CheckpointError, match=r"contrast_scope: 'micro_batch' in the checkpoint, 'global_batch' in this"
    ):
        Checkpoints(tmp_path, younger, "abc").latest()


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            "key_encoder=none",
            "key_encoder.momentum=0.999",
            "key_encoder.momentum: None in the checkpoint, 0.999 in this",
        ),
        ("loss.distill=null", "loss.distill={teacher: x}", "loss.distill.weight: None in the checkpoint, 1.0 in this"),
        ("loss.distill={teacher: x}", "loss.distill=null", "loss.distill.weight: 1.0 in the checkpoint, None in this"),
        (None, "loss.distill={teacher: x}", "loss.distill.weight: None in the checkpoint, 1.0 in this"),
    ],
)
def test_a_section_left_out_is_not_one_with_its_defaults(tmp_path, before, now, message):
    """Given now where the checkpoint had none, or is older than the section (None); or the other way round."""
    recipe = tiny_recipe(before or "loss.distill=null")
    Checkpoints(tmp_path, recipe, "abc").save(1, TENSORS.items(), TENSORS.items(), None, about={})
    if before is None:
        path = tmp_path / "checkpoints" / "step-00000001" / "state.json"
        state = json.loads(path.read_text())
        del state["meaning"]["loss.distill"]
        path.write_text(json.dumps(state))
        assert Checkpoints(tmp_path, recipe, "abc").latest().step == 1
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, tiny_recipe(now), "abc").latest()


def test_a_rank_that_does_not_write_still_walks_through_the_collective(tmp_path):
    """Else the others would wait for it for ever."""
    walked = []
    named = ((name, walked.append(name) or tensor) for name, tensor in TENSORS.items())
    Checkpoints(tmp_path, tiny_recipe(), "abc").save(1, named, [], None, about={}, write=False)
    assert walked == list(TENSORS)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_without_a_checkpoint_says_what_to_do(tmp_path):
    """Evaluation and export have nothing to read."""
    with pytest.raises(CheckpointError, match=r"no checkpoint under .*: train with --output"):
        newest_checkpoint(tmp_path)
