"""Background writes: one at a time; an error is raised once, at the next step."""

import logging
import threading
import time

import pytest
import torch

from paco_ds.checkpoint import Checkpoints, newest_checkpoint, read_checkpoint
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import StorageError, UserError
from paco_ds.training.saver import Saver, sole_writer
from tests.recipes import tiny_recipe

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def full():
    raise StorageError("the disk is full")


def hold_back(saver, event):
    """Writes begin when the event is set."""
    submit = saver.submit
    saver.submit = lambda write: submit(lambda: (event.wait(), write()))


@pytest.fixture
def saver():
    made = Saver()
    yield made
    made.close()


def test_training_goes_on_while_a_checkpoint_is_written(saver, tmp_path):
    """What is written is of the moment of the save, whatever training does to the tensors meanwhile."""
    weight, may_write = torch.zeros(3), threading.Event()

    checkpoints = Checkpoints(tmp_path, tiny_recipe(), "abc", saver)
    hold_back(saver, may_write)
    checkpoints.save(1, [("weight", weight)], [("weight", weight)], {"keys": weight}, about={})
    weight += 1  # the next step
    assert not (tmp_path / "checkpoints").exists()
    may_write.set()
    saver.wait()
    found = newest_checkpoint(tmp_path)
    for tensor in (found.model()["weight"], found.optimizer()["weight"], found.queue()["keys"]):
        assert tensor.tolist() == [0, 0, 0]
    threading.Timer(0.05, may_write.set).start()
    may_write.clear()
    for step in (2, 3):  # the third is copied when the second has been written
        checkpoints.save(step, [("weight", weight)], [], None, about={})
        weight += 1
    saver.wait()
    folder = tmp_path / "checkpoints"
    assert read_checkpoint(folder / "step-00000002").model()["weight"].tolist() == [1, 1, 1]
    assert read_checkpoint(folder / "step-00000003").model()["weight"].tolist() == [2, 2, 2]


def test_the_next_write_waits_for_the_one_under_way(saver):
    """So that at most one copy of a checkpoint is being written."""
    done, may_end = [], threading.Event()
    saver.submit(lambda: (may_end.wait(), done.append(1)))
    threading.Timer(0.05, may_end.set).start()
    saver.submit(lambda: done.append(2))
    assert done[0] == 1
    saver.wait()
    assert done == [1, 2]


@pytest.mark.parametrize("call", ["wait", "submit"])
def test_an_error_of_a_write_is_raised_by_the_next_call(saver, call):
    """Once; the saver can be used after it."""
    saver.submit(full)
    while not saver.failed:
        time.sleep(0.001)
    with pytest.raises(StorageError, match="the disk is full"):
        getattr(saver, call)(*([lambda: None] if call == "submit" else []))
    assert not saver.failed
    saver.submit(lambda: None)
    saver.wait()


def test_an_error_that_nobody_was_told_is_logged_at_the_end(caplog):
    """Where another error ended the run first."""
    saver = Saver()
    saver.submit(full)
    with caplog.at_level(logging.ERROR):
        saver.close()
    assert "the disk is full" in caplog.text


def test_a_run_has_one_writer_and_begins_without_what_a_killed_one_left(tmp_path):
    """Unfinished files go; an old checkpoint whose replacement was not put in place comes back."""
    folder = tmp_path / "run" / "checkpoints"
    for name in (".step-00000004.part", ".best.part", ".best.old", ".step-00000002.old", "step-00000002"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "run" / ".report.html.partial").write_text("half")
    with sole_writer(tmp_path / "run", ALONE):
        assert {path.name for path in folder.iterdir()} == {"best", "step-00000002"}
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", ".lock"}
        with (
            pytest.raises(UserError, match="is in use already, trained by process"),
            sole_writer(tmp_path / "run", ALONE),
        ):
            pass
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_refused_before_it_wrote_anything_leaves_no_folder(tmp_path):
    """A mistake in the recipe is mended, and the same command given again."""
    with pytest.raises(ZeroDivisionError), sole_writer(tmp_path / "run", ALONE):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
