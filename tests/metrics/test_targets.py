"""The lists of targets of a run: when they are there, and which address they name."""

from __future__ import annotations

import json
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from paco_ds.config.recipe import MetricsSettings
from paco_ds.distributed.heartbeat import Heartbeat
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import UserError
from paco_ds.metrics.exporter import Exporter
from paco_ds.metrics.targets import announced, served_metrics, target_files
from tests.multinode.hosts import free_port


def serve(folder: Path, **settings: object) -> AbstractContextManager[Exporter]:
    """`served_metrics` of one rank, on a free port."""
    made = MetricsSettings.model_validate({"port": free_port(), "targets_dir": str(folder / "all"), **settings})
    return served_metrics(made, folder / "run", Ranks(0, 1, 0, torch.device("cpu")), {}, Heartbeat())


def lists(folder: Path) -> list[Path]:
    return [file for file in target_files(folder / "run", str(folder / "all")) if file.exists()]


def test_lists_stand_during_a_run_and_a_finished_one_removes_them(tmp_path: Path) -> None:
    """Its own and that in the folder of all runs, which is made; a list of another run stays."""
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "other.json").write_text("[]")
    with serve(tmp_path) as metrics:
        own, of_all = lists(tmp_path)
        assert own.read_text() == of_all.read_text()
        assert json.loads(own.read_text())[0]["labels"] == {"run": "run", "rank": "0"}
        metrics.ended("finished")
    assert lists(tmp_path) == []
    assert [file.name for file in (tmp_path / "all").iterdir()] == ["other.json"]


def test_a_run_that_was_asked_to_stop_removes_them(tmp_path: Path) -> None:
    """It ends without a state of its own."""
    with serve(tmp_path):
        assert len(lists(tmp_path)) == 2
    assert lists(tmp_path) == []


def test_a_failed_run_leaves_them_and_its_next_start_replaces_them(tmp_path: Path) -> None:
    """Its ranks are missed until then."""
    with pytest.raises(RuntimeError, match="disk full"), serve(tmp_path):
        raise RuntimeError("disk full")
    left = [file.read_text() for file in lists(tmp_path)]
    assert len(left) == 2
    with serve(tmp_path):
        assert [file.read_text() for file in lists(tmp_path)] != left  # of another port


def test_a_start_that_is_refused_for_its_settings_removes_them(tmp_path: Path) -> None:
    """No rank of it will be missed."""
    with pytest.raises(UserError, match="the shards have 10"), serve(tmp_path):
        raise UserError("data.classes is 9 and the shards have 10")
    assert lists(tmp_path) == []


@pytest.mark.parametrize(("address", "host"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("[::1]", "[::1]")])
def test_metrics_address_is_where_it_serves_and_what_the_list_names(tmp_path: Path, address: str, host: str) -> None:
    """IPv4 and, in brackets, IPv6."""
    with serve(tmp_path, address=address) as metrics:
        metrics.planned(7)
        (target,) = json.loads(lists(tmp_path)[0].read_text())[0]["targets"]
        assert target.rpartition(":")[0] == host
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=60) as response:
            assert b"paco_total_steps 7.0" in response.read()


@pytest.mark.parametrize(("address", "named"), [("0.0.0.0", None), ("::", None), ("::1", "::1"), ("node1", "node1")])
def test_all_addresses_are_none_that_a_list_can_name(address: str, named: str | None) -> None:
    """One that is reachable stands for them."""
    assert announced(address) == named


def test_an_address_of_another_host_is_no_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, and the run goes on: 192.0.2.1 is reserved for documentation."""
    with serve(tmp_path, address="192.0.2.1"):
        assert [json.loads(file.read_text()) for file in lists(tmp_path)] == [[], []]
    assert "cannot be served" in caplog.text
