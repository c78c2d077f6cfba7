"""The page of a run that trains."""

import logging
from types import SimpleNamespace
from typing import cast

import pytest

from paco_ds.distributed.heartbeat import Heartbeat
from paco_ds.report.history import History
from paco_ds.training.trainer import Trainer


@pytest.mark.parametrize("damage", ["no log", "metrics.json", "a folder in its place"])
def test_a_page_that_cannot_be_drawn_is_one_warning(tmp_path, caplog, damage):
    """Training goes on."""
    log = tmp_path / "metrics.jsonl"
    if damage != "no log":
        log.touch()
    if damage == "metrics.json":
        (tmp_path / damage).write_text("{")
    if damage == "a folder in its place":
        (tmp_path / "report.html").mkdir()
    ranks = SimpleNamespace(first=True)
    trainer = SimpleNamespace(ranks=ranks, heartbeat=Heartbeat(), steps_done=1, run_dir=tmp_path, history=History(log))
    with caplog.at_level(logging.WARNING):
        assert Trainer._draw_page(cast(Trainer, trainer)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be drawn, training goes on" in caplog.text
