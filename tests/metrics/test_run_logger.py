"""What watches a run: bad samples are counted, named, and end it when they are too many."""

import pytest
import torch
from prometheus_client import generate_latest

from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import DataError
from paco_ds.metrics.exporter import Exporter
from paco_ds.metrics.run_logger import BadSamples, RunLogger
from tests.recipes import tiny_recipe


@pytest.fixture
def bad_samples(tmp_path):
    recipe = tiny_recipe("data.max_bad_share=0.02", "data.shards=/d")
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    logger = RunLogger(recipe.metrics, tmp_path, ranks, Exporter(), epochs=2, total_steps=10, steps_done=0)
    yield BadSamples(logger, recipe.data, ranks, planned=100)
    logger.close()


def test_bad_samples_up_to_the_share_are_counted_and_named(bad_samples, caplog):
    """By reason in /metrics, by key and shard in the log."""
    bad_samples.add([("train-7", "train-0.tar", "crc_mismatch")], on_all_ranks=1)
    bad_samples.add([("train-9", "train-0.tar", "undecodable")], on_all_ranks=1)
    assert "train-7 of train-0.tar: crc_mismatch" in caplog.text
    page = generate_latest(bad_samples._logger.metrics.registry).decode()
    assert 'paco_bad_samples_total{reason="undecodable"} 1.0' in page


def test_more_than_the_share_end_the_run_with_the_list(bad_samples):
    """Those of other ranks count too, and a new epoch begins at none."""
    bad_samples.add([("train-7", "train-0.tar", "crc_mismatch")], on_all_ranks=2)
    with pytest.raises(
        DataError,
        match=r"3 of 100 samples[\s\S]*train-7 of train-0.tar: crc[\s\S]*check /d names all[\s\S]*max_bad_share",
    ):
        bad_samples.add([("train-8", "train-0.tar", "crc_mismatch")], on_all_ranks=1)
    bad_samples.begin_epoch()
    bad_samples.add([("train-8", "train-0.tar", "crc_mismatch")], on_all_ranks=1)
