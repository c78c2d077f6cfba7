"""Checkpoints on disk: whole or not at all, verified, pruned, and free of anything executable."""

import errno
import json
import os
import random
import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError

from paco_ds.checkpoint import (
    Checkpoints,
    chosen_checkpoint,
    hint_after_storage_errors,
    newest_checkpoint,
    read_checkpoint,
    recover,
    resume_hint,
)
from paco_ds.checkpoint.read import state_digest
from paco_ds.errors import CheckpointError, NotFiniteError, StorageError
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
    assert torch.equal(checkpoint.optimizer()["weight"], torch.ones(2, 3))
    assert torch.equal(checkpoint.queue()["keys"], torch.zeros(2))


FROZEN = {"query_encoder.backbone.stem": torch.arange(1000.0), "centers.weight": torch.ones(3)}


def test_frozen_weights_are_written_once_for_all_checkpoints(tmp_path):
    """A checkpoint reads as if it held them, and its averages what is equal to them; a later run finds them again."""
    for step in (1, 2):
        checkpoints = Checkpoints(tmp_path, tiny_recipe(), "abc")
        checkpoints.latest()
        checkpoints.keep_frozen(FROZEN)
        trained = {"projection": torch.full((2,), float(step)), "key_encoder.projection": torch.zeros(2)}
        checkpoints.save(step, trained.items(), [], None, about={})
    recover(tmp_path)
    (file,) = (tmp_path / "checkpoints").glob("frozen-*")
    weights = checkpoints.latest().model()
    assert torch.equal(weights["key_encoder.backbone.stem"], FROZEN["query_encoder.backbone.stem"])
    assert weights.keys() == {*FROZEN, *trained, "key_encoder.backbone.stem"}
    assert weights["projection"][0] == 2
    assert all(path.stat().st_size < 400 for path in (tmp_path / "checkpoints").glob("step-*/model.safetensors"))
    assert file.stat().st_size > 4000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.unlink(),
            r"needs the frozen weights of its run, .*frozen-\w+\.safetensors is missing: copy",
        ),
        (lambda file: file.write_bytes(b"other"), r"frozen-\w+\.safetensors holds others or is damaged \(SHA-256"),
    ],
)
def test_other_frozen_weights_than_a_checkpoints_own_are_refused(tmp_path, damage, message):
    """By their digest, with what to copy."""
    checkpoints = Checkpoints(tmp_path, tiny_recipe(), "abc")
    checkpoints.keep_frozen(FROZEN)
    checkpoints.save(1, [("projection", torch.ones(2))], [], None, about={})
    damage(next((tmp_path / "checkpoints").glob("frozen-*")))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "checkpoints" / "step-00000001")


def test_the_momentum_of_checkpoints_until_version_2_is_read(tmp_path):
    """It was a file of SGD's alone, by the names of the parameters; its recipe named no optimizer."""
    checkpoints = save(tmp_path, 7)
    folder = tmp_path / "checkpoints" / "step-00000007"
    (folder / "optimizer.safetensors").rename(folder / "momentum.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["momentum.safetensors"] = state["sha256"].pop("optimizer.safetensors")
    added = ("name", "lr_per_256", "betas", "eps", "decay_norms_and_biases", "layer_decay")
    for key in (*(f"optimizer.{name}" for name in added), "schedule.minimum_lr"):
        del state["meaning"][key]
    state["version"] = 2
    state["state_sha256"] = state_digest(state)
    (folder / "state.json").write_text(json.dumps(state))
    assert checkpoints.latest().optimizer().keys() == {"momentum_buffer.weight"}
    with pytest.raises(CheckpointError, match=r"optimizer\.name: 'sgd' in the checkpoint, 'adamw' in this recipe"):
        Checkpoints(tmp_path, tiny_recipe("optimizer.name=adamw"), "abc").latest()


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
        (
            lambda p: (p / "optimizer.safetensors").unlink(),
            r"half-written or damaged: optimizer.safetensors is missing",
        ),
        (lambda p: (p / "state.json").write_text('{"step": '), r"half-written or damaged: state.json"),
        (lambda p: (p / "state.json").unlink(), r"half-written or damaged: state.json"),
        (lambda p: (p / "queue.safetensors").write_bytes(b"x"), r"damaged: SHA-256 of queue.safetensors differs"),
        (lambda p: changed(p, version=99), r"state.json is not a 'paco_ds checkpoint' of version 1 to 4"),
        (lambda p: changed(p, step=3), r"damaged: SHA-256 of the entries of state.json differs"),
        (lambda p: changed(p, state_sha256=7), r"damaged: SHA-256 of the entries of state.json differs"),
        (lambda p: (p / "state.json").write_text("[" * 100_000), r"damaged: state.json: it is nested too deep"),
        (lambda p: (p / "state.json").write_bytes(b"\xff{}"), r"damaged: state.json: .*utf-8"),
        (lambda p: (p / "state.json").write_text("[]"), r"state.json is not a 'paco_ds checkpoint'"),
        (lambda p: as_of_0_9(p, sha256=[]), r"damaged: state.json: sha256: Input should be a valid dictionary"),
        (lambda p: as_of_0_9(p, sha256={"../x": "0"}), r"damaged: state.json: sha256.../x"),
        (lambda p: as_of_0_9(p, sha256={}), r"damaged: state.json: it has no digest of model.safetensors"),
        (lambda p: as_of_0_9(p, step="2"), r"damaged: state.json: step: Input should be a valid integer"),
        (lambda p: as_of_0_9(p, step=1), r"damaged: state.json: it is of step 1, its folder's name of step 2"),
        (lambda p: as_of_0_9(p, manifest_sha256=None), r"damaged: state.json: manifest_sha256"),
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


def changed(checkpoint, **entries):
    """Other entries in its state.json, and nothing else."""
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def as_of_0_9(checkpoint, without=None, **entries):
    """A checkpoint as 0.8 and 0.9 wrote it: state.json has no digest of itself."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text()) | {"version": 1} | entries
    del state["state_sha256"]
    state["meaning"].pop(without, None)
    path.write_text(json.dumps(state))


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
    as_of_0_9(tmp_path / "checkpoints" / "step-00000001", without="loss.contrast_scope")
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
        as_of_0_9(tmp_path / "checkpoints" / "step-00000001", without="loss.distill")
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


def test_other_names_are_no_checkpoints_and_no_errors(tmp_path):
    """Copies put aside, files, and links to nothing stay where they are; a link to a folder is a checkpoint."""
    folder = tmp_path / "checkpoints"
    save(tmp_path, 4)
    others = ["step-00000055-backup", "step-00000055.away", "step-55", "step-000000055", "step-00000056", ".step-9.x"]
    for name in others:
        shutil.copytree(folder / "step-00000004", folder / name)
    shutil.rmtree(folder / "step-00000056")
    (folder / "step-00000056").write_text("a file")
    (folder / "step-00000057").symlink_to(tmp_path / "nothing")
    assert resume_hint(tmp_path).endswith("from step 4")
    checkpoints = save(tmp_path, 5, tiny_recipe("checkpoint.keep=1"))
    recover(tmp_path)
    assert checkpoints.latest().step == 5
    names = {"step-00000005", "step-00000057", *others}
    assert {path.name for path in folder.iterdir()} == names
    (folder / "step-00000005").rename(tmp_path / "elsewhere")
    (folder / "step-00000005").symlink_to(tmp_path / "elsewhere")
    assert checkpoints.latest().step == 5
    save(tmp_path, 6, tiny_recipe("checkpoint.keep=1"))
    assert not os.path.lexists(folder / "step-00000005")
    assert (tmp_path / "elsewhere" / "state.json").exists()


def test_those_of_every_few_epochs_are_kept_for_good(tmp_path):
    """Beside the newest."""
    checkpoints = Checkpoints(tmp_path, tiny_recipe("checkpoint.keep=1", "checkpoint.keep_every_epochs=2"), "abc")
    for step in range(5, 75, 5):
        checkpoints.save(step, TENSORS.items(), [], None, about={}, epoch_steps=15)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000030", "step-00000060", "step-00000070"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model", "optimizer", "queue"])
def test_values_that_are_not_finite_are_never_written(tmp_path, where, value):
    """The tensor is named, and what was kept stays, even where only one was to be kept."""
    checkpoints = save(tmp_path, 7, tiny_recipe("checkpoint.keep=1"))
    tensors = {key: {"weight": torch.ones(2, 3)} for key in ("model", "optimizer", "queue")}
    tensors[where]["running_var"] = torch.tensor([1.0, value])
    with pytest.raises(
        NotFiniteError, match=rf"after step 8 are not finite, the first running_var \({where}.*step 7 is kept"
    ) as error:
        checkpoints.save(8, tensors["model"].items(), tensors["optimizer"].items(), tensors["queue"], about={})
    assert error.value.status == 70
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]
    if where == "model":
        with pytest.raises(NotFiniteError):
            checkpoints.save_best(8, tensors["model"].items(), {"score": 1.0})
    assert checkpoints.latest().step == 7


def save_best(run, step, score):
    checkpoints = Checkpoints(run, tiny_recipe("evaluation.checkpoint=best_all"), "abc")
    checkpoints.save_best(step, [("weight", torch.full((2,), score))], {"score": score, "autocast": False})
    return checkpoints


def test_a_lowered_setting_is_told_of_the_checkpoint_that_a_run_goes_on_from_alone(tmp_path):
    """Its best weights may be older than the change."""
    save_best(tmp_path, 1, 0.5)
    lower = tiny_recipe("optimizer.lr=0.01", "evaluation.checkpoint=best_all")
    save(tmp_path, 2, lower)
    resumed = Checkpoints(tmp_path, lower, "abc")
    resumed.latest()
    assert resumed.best(until=2) is not None
    assert resumed.lowered == {}


def test_a_run_is_not_lost_with_damaged_best_weights(tmp_path, caplog):
    """Training goes on without them, and says so; an evaluation that was to use them refuses."""
    checkpoints = save_best(tmp_path, 5, 0.5)
    save(tmp_path, 6)
    (tmp_path / "checkpoints" / "best" / "model.safetensors").write_bytes(b"x")
    assert checkpoints.best(until=6) is None
    assert "best is damaged: SHA-256 of model.safetensors" in caplog.text
    with pytest.raises(CheckpointError, match="best is damaged"):
        chosen_checkpoint(tmp_path, "best_all")


@pytest.mark.parametrize("what", ["best", "step"])
def test_killed_between_any_two_system_calls_one_is_whole(tmp_path, what):
    """The one before or the new one, never none; the next start removes what was left, and the save succeeds."""

    def write(value):
        if what == "best":
            return save_best(tmp_path, 5, value)
        checkpoints = Checkpoints(tmp_path, tiny_recipe("evaluation.checkpoint=best_all"), "abc")
        checkpoints.save(5, [("weight", torch.full((2,), value))], [], None, about={"score": value})
        return checkpoints

    def found():
        checkpoint = chosen_checkpoint(tmp_path, "best_all") if what == "best" else newest_checkpoint(tmp_path)
        return checkpoint.state["score"], checkpoint.model()["weight"][0].item()

    write(0.25)
    calls = in_a_child(lambda: write(0.25), kill_at=None)
    assert 15 < calls < KILLED
    seen = set()
    for at in range(calls):
        assert in_a_child(lambda: write(0.5), kill_at=at) == KILLED
        if what == "best":  # also before anyone tidies up
            assert found() in {(0.25, 0.25), (0.5, 0.5)}
        recover(tmp_path)
        seen.add(found())
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [
            "best" if what == "best" else "step-00000005"
        ]
        write(0.25)
    assert seen == {(0.25, 0.25), (0.5, 0.5)}


KILLED = 255


def in_a_child(work, kill_at):
    """How often `work` asks the operating system for something, by Python's audit events; ended at one of them."""
    asks = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir")
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counted = 0

    def hook(event, _):
        nonlocal counted
        if event in asks:
            if counted == kill_at:
                os._exit(KILLED)
            counted += 1

    sys.addaudithook(hook)
    work()
    return os._exit(counted)


DAMAGE = {
    "flips a bit": lambda data, rng: _with(data, at := rng.randrange(len(data)), data[at] ^ (1 << rng.randrange(8))),
    "sets a byte": lambda data, rng: _with(data, rng.randrange(len(data)), rng.choice(b'0123456789"{}[],:\0\xff\n ')),
    "zeroes a block": lambda data, rng: _block(data, rng, lambda block: bytes(len(block))),
    "doubles a block": lambda data, rng: _block(data, rng, lambda block: block * 2),
    "removes a block": lambda data, rng: _block(data, rng, lambda block: b""),
    "turns a block round": lambda data, rng: _block(data, rng, lambda block: block[::-1]),
    "cuts": lambda data, rng: data[: rng.randrange(len(data))],
    "appends": lambda data, rng: data + rng.randbytes(rng.randrange(1, 20)),
    "replaces all": lambda data, rng: rng.randbytes(rng.randrange(50)),
}


def _with(data, at, byte):
    return data[:at] + bytes([byte]) + data[at + 1 :]


def _block(data, rng, change):
    at, length = rng.randrange(len(data)), rng.randrange(1, 200)
    return data[:at] + change(data[at : at + length]) + data[at + length :]


def read_or_refusal(path):
    """The checkpoint, or what is said against it."""
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "queue.safetensors", "state.json"])
def test_a_thousand_damages_are_refused_or_change_nothing(tmp_path, file):
    """Each is a CheckpointError that names the checkpoint, and the one before is used; or all that is read is equal."""
    save(tmp_path, 1, tiny_recipe("checkpoint.keep=2"))
    save(tmp_path, 2, tiny_recipe("checkpoint.keep=2"))
    path = tmp_path / "checkpoints" / "step-00000002"
    whole, before = (path / file).read_bytes(), read_checkpoint(path)
    refused = 0
    for seed in range(1000):
        rng = random.Random(f"{file} {seed}")
        kind = rng.choice(list(DAMAGE))
        (path / file).write_bytes(DAMAGE[kind](whole, rng))
        found = read_or_refusal(path)
        refused += isinstance(found, str)
        if isinstance(found, str):
            assert str(path) in found, (file, seed, kind)
        else:
            assert found.state == before.state, (file, seed, kind)
            assert file == "state.json" or (path / file).read_bytes() == whole, (file, seed, kind)
        assert seed % 100 or newest_checkpoint(tmp_path).step in (1, 2), (file, seed, kind)
    print(f"seeds 0 to 999: {refused} refused")
    assert refused > 900


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["paco_ds.checkpoint.write.save_file", "paco_ds.checkpoint.write.fsync", "os.rename"])
def test_a_disk_that_takes_no_more_leaves_what_was_there(tmp_path, monkeypatch, code, call):
    """One line with the path, the reason, the remedy and how to resume, a status of its own, and no unfinished file."""
    checkpoints = save(tmp_path, 3)

    def full(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(StorageError) as error, hint_after_storage_errors(tmp_path):
            save(tmp_path, 4)
    said = str(error.value)
    assert f"step-00000004 cannot be written: {os.strerror(code)}; " in said
    assert said.endswith(". Run the same command again to resume from step 3")
    assert "\n" not in said
    assert error.value.status == 74
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert checkpoints.latest().step == 3


def test_what_safetensors_tells_of_a_full_disk_is_understood(tmp_path, monkeypatch):
    """It has a text for the kernel's number."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("paco_ds.checkpoint.write.save_file", full)
    with pytest.raises(StorageError, match="No space left on device; make room there"):
        save(tmp_path, 4)
