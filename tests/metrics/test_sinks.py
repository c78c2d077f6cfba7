"""Figures go to TensorBoard, W&B and MLflow as they go to metrics.jsonl; what fails there does not end a training."""

import logging
import struct
import sys
import time
import types

import pytest
import torch

import paco_ds.metrics.sinks as sinks_package
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import RecipeError
from paco_ds.metrics.exporter import Exporter
from paco_ds.metrics.log import read
from paco_ds.metrics.run_logger import RunLogger
from paco_ds.metrics.sinks import Sinks
from paco_ds.metrics.steps import StepRecord
from tests.recipes import tiny_recipe


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def train(run, name, first, last, rank=0, every=1):
    """Log steps first + 1 to last, as a run that is resumed after `first`."""
    run.mkdir(exist_ok=True)
    recipe = tiny_recipe(f"metrics.sinks=[{name}]", f"metrics.log_every={every}")
    ranks = Ranks(rank, 1, 0, torch.device("cpu"))
    logger = RunLogger(recipe.metrics, run, ranks, Exporter(), epochs=2, total_steps=10, steps_done=first)
    for step in range(first + 1, last + 1):
        shots = {"many": 0.5, "few": None}
        logger.step(StepRecord(step, 0, 10.0 + step, 0.1, 1.0, 9.0, 0.0, 0.1, center_probability=shots), 8, None)
    logger.close()


def steps_in_tensorboard(run, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def records_of_wandb(file):
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log, in blocks of 32 KiB."""
    data, at, record = file.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block has no room for a header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or last part
            yield record
            record = b""


def steps_in_wandb(run, name):
    from wandb.proto.wandb_internal_pb2 import Record

    found, ids = [], set()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records_of_wandb(file):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if name in items:
                found.append((int(items["step"]), float(items[name])))
    assert len(ids) == 1
    return found


def steps_in_mlflow(run, name):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(run / "mlflow").as_uri())
    [experiment] = [e for e in client.search_experiments() if e.name == "paco_ds"]
    [found] = client.search_runs([experiment.experiment_id])
    return sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, name))


@pytest.mark.parametrize(
    ("sink", "steps_in"),
    [("tensorboard", steps_in_tensorboard), ("wandb", steps_in_wandb), ("mlflow", steps_in_mlflow)],
)
def test_a_sink_has_the_steps_of_the_log_and_a_resumed_run_goes_on_in_it(sink, steps_in, tmp_path):
    """With the real library and no network; null is no figure."""
    pytest.importorskip(sink)
    train(tmp_path / "run", sink, 0, 3)
    time.sleep(sink == "wandb")  # it names folders by the second; a process that starts again needs longer
    train(tmp_path / "run", sink, 3, 5)
    logged = [(line["step"], line["loss"]) for line in read(tmp_path / "run" / "metrics.jsonl")]
    assert logged == [(step, 10.0 + step) for step in range(1, 6)]
    assert steps_in(tmp_path / "run", "train/loss") == logged
    assert len(steps_in(tmp_path / "run", "train/center_probability/many")) == 5


def test_a_sink_has_means_and_extremes_of_log_every_steps(tmp_path):
    """A sink may be a server far away; training waits for it only then. Epochs of 5 steps end windows, too; what a run
    that stops in one knows of it is left to metrics.jsonl."""
    pytest.importorskip("tensorboard")
    train(tmp_path / "run", "tensorboard", 0, 7, every=3)
    assert steps_in_tensorboard(tmp_path / "run", "train/loss") == [(3, 12.0), (5, 14.5), (6, 16.0)]
    assert steps_in_tensorboard(tmp_path / "run", "train/loss/max") == [(3, 13.0), (5, 15.0)]
    assert steps_in_tensorboard(tmp_path / "run", "train/center_probability/many") == [(3, 0.5), (5, 0.5), (6, 0.5)]
    assert [line["step"] for line in read(tmp_path / "run" / "metrics.jsonl")] == [3, 5, 6, 7]


def test_other_ranks_write_nothing(tmp_path):
    """Only the first."""
    train(tmp_path / "run", "tensorboard", 0, 2, rank=1)
    assert not (tmp_path / "run" / "tensorboard").exists()


class Broken:
    """A sink whose server is gone."""

    def log(self, step, figures):
        raise ConnectionError(f"no server at step {step}")

    def close(self):
        raise AssertionError("closed, though it was left out")


@pytest.mark.parametrize("when", ["open", "log"])
def test_a_sink_that_fails_is_left_out_with_one_warning(when, tmp_path, caplog, monkeypatch):
    """A sink is a module of the folder: this one is added without a change elsewhere."""

    def open_sink(run, steps_done):
        if when == "open":
            raise ConnectionError("no server")
        return Broken()

    module = types.ModuleType("paco_ds.metrics.sinks.broken")
    vars(module)["open_sink"] = open_sink
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "broken.py").touch()
    monkeypatch.setattr(sinks_package, "__path__", [*sinks_package.__path__, str(tmp_path / "more")])
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", "broken", 0, 3)
    assert len(list(read(tmp_path / "run" / "metrics.jsonl"))) == 3
    assert [r.getMessage().split(":")[1] for r in caplog.records] == [
        " broken failed and is left out, training goes on"
    ]


def test_an_unknown_sink_and_a_missing_library_are_told(tmp_path, monkeypatch):
    """The name on every rank; the extra to install."""
    with pytest.raises(RecipeError, match="'tensorbord' is none of mlflow, tensorboard, wandb; did you mean 'tensorb"):
        Sinks(("tensorbord",), tmp_path, False, 0)
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    monkeypatch.delitem(sys.modules, "paco_ds.metrics.sinks.mlflow", raising=False)
    with pytest.raises(RecipeError, match=r"mlflow is not installed .*pip install 'paco_ds\[mlflow\]'"):
        Sinks(("mlflow",), tmp_path, True, 0)
