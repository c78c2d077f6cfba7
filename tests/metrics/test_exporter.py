"""The exporter as Prometheus sees it: names, values, ports and the targets file."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.metrics import exporter as exporter_module
from paco_ds.metrics.exporter import Exporter, reachable_host
from paco_ds.metrics.steps import StepRecord
from paco_ds.metrics.targets import target_files, targets

RECORD = StepRecord(
    step=120,
    epoch=3,
    loss=1.5,
    lr=0.1,
    grad_norm=2.5,
    images_per_second=640.0,
    data_wait_seconds=0.25,
    step_seconds=0.5,
    queue_fill=0.75,
    center_probability={"many": 0.5, "medium": 0.6, "few": None},
    center_probability_optimum={"many": 0.4, "medium": 0.7, "few": None},
    positive_probability={"many": 0.01, "medium": 0.02, "few": None},
    positive_probability_optimum={"many": 0.015, "medium": 0.04, "few": None},
    parts={"softmax": 1.2, "contrast": 3.0},
)
ACCURACY = ShotAccuracy(0.9, 0.8, 0.7, 0.85, {}, [], images_by_experts=[6, 2])
EXPECTED = {
    "paco_samples_total": 32,
    "paco_steps_total": 1,
    "paco_skipped_steps_total": 0,
    "paco_step_duration_seconds_sum": 0.5,
    "paco_step_duration_seconds_count": 1,
    "paco_data_wait_seconds_total": 0.25,
    "paco_loss": 1.5,
    'paco_loss_part{part="softmax"}': 1.2,
    'paco_loss_part{part="contrast"}': 3.0,
    "paco_learning_rate": 0.1,
    "paco_queue_fill_ratio": 0.75,
    "paco_grad_norm": 2.5,
    'paco_bad_samples_total{reason="crc"}': 1,
    'paco_shot_accuracy_ratio{shot="few",split="val"}': 0.7,
    'paco_shot_accuracy_ratio{shot="all",split="val"}': 0.85,
    'paco_images_by_experts_ratio{experts="1",split="val"}': 0.75,
    'paco_center_probability{shot="many"}': 0.5,
    'paco_center_probability_optimum{shot="medium"}': 0.7,
    'paco_positive_probability{shot="medium"}': 0.02,
    'paco_positive_probability_optimum{shot="many"}': 0.015,
    'paco_collective_bytes_total{op="all_gather"}': 1024,
    "paco_checkpoint_blocked_seconds_total": 1.25,
    "paco_restarts_total": 3,
    "paco_checkpoint_timestamp_seconds": 1.75e9,
    "paco_checkpoint_bytes": 4096,
    "paco_run_free_bytes": 10**9,
    "paco_images_per_second": 640.0,
    "paco_total_steps": 1000,
    'paco_run_state{state="starting"}': 1,
    'paco_run_state{state="failed"}': 0,
    "paco_step": 120,
    "paco_epoch": 3,
    'paco_build_info{version="1"}': 1,
}


def _report(sink: Exporter) -> None:
    sink.build_info({"version": "1"})
    sink.observe_step(RECORD, samples=32)
    sink.observe_bad_sample("crc")
    sink.observe_accuracy(ACCURACY, "val")
    sink.add_collective_bytes("all_gather", 1024)
    sink.checkpoint_blocked(1.25)
    sink.restarted(3)
    sink.planned(1000)
    sink.checkpoint_saved(1.75e9, 4096, 10**9)
    sink.publish_targets("[]")


def _values(text: str) -> dict[str, float]:
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


def _fetch(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        return _values(response.read().decode())


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    """An exporter that is closed however the test ends."""
    made = Exporter()
    yield made
    made.close()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port someone else listens on."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        yield other.getsockname()[1]


def test_before_the_first_step_its_time_is_that_of_the_start(exporter: Exporter) -> None:
    """With 0, PacoNoProgress would fire while a first step compiles."""
    (sample,) = next(f for f in exporter.registry.collect() if f.name == "paco_last_step_timestamp_seconds").samples
    assert 0 <= time.time() - sample.value < 3600


def test_every_metric_of_the_design_is_served_and_parses(exporter: Exporter) -> None:
    """One scrape over HTTP holds all names with the values that were reported."""
    _report(exporter)
    port = exporter.start(0, 0)
    assert port is not None
    got = _fetch(port)
    assert {name: got.get(name) for name in EXPECTED} == EXPECTED
    assert got["paco_last_step_timestamp_seconds"] > 1.7e9


def test_shot_without_a_figure_is_absent_and_later_keeps_its_last_one(exporter: Exporter) -> None:
    """None is never shown as 0."""
    exporter.observe_step(RECORD, samples=32)
    values = _values(generate_latest(exporter.registry).decode())
    assert 'paco_center_probability{shot="few"}' not in values
    assert 'paco_positive_probability{shot="few"}' not in values


def test_counters_start_at_zero(exporter: Exporter) -> None:
    """A new process counts from 0, whatever the job did before, so that rate() holds."""
    got = _values(generate_latest(exporter.registry).decode())
    assert got["paco_samples_total"] == got["paco_steps_total"] == got["paco_step_duration_seconds_count"] == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say(exporter: Exporter) -> None:
    """`promtool check metrics` is clean."""
    _report(exporter)
    text = generate_latest(exporter.registry)
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_taken_port_moves_to_the_next_free_one(
    exporter: Exporter, taken_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Base port + local rank is taken: a higher port serves, and the log names both."""
    with caplog.at_level(logging.WARNING):
        port = exporter.start(taken_port - 1, local_rank=1)
    assert port is not None
    assert port > taken_port
    assert _fetch(port)["paco_steps_total"] == 0
    assert f"port {taken_port} is taken; /metrics is served on port {port}" in caplog.text


def test_no_port_at_all_warns_and_goes_on(
    exporter: Exporter, taken_port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every try taken, or a port that does not exist, start gives None and a warning."""
    monkeypatch.setattr(exporter_module, "PORT_TRIES", 1)
    assert exporter.start(taken_port, 0) is None
    assert exporter.start(65536, 0) is None
    assert caplog.text.count("training continues") == 2


def test_close_gives_the_port_back(exporter: Exporter) -> None:
    """After close the same port can be bound, and closing twice is fine."""
    port = exporter.start(0, 0)
    assert port is not None
    exporter.close()
    exporter.close()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("0.0.0.0", port))


def test_targets_are_in_file_sd_form() -> None:
    """A group per rank with run and rank as labels; a rank that serves nothing is left out."""
    assert json.loads(targets(["10.0.0.1:9000", None, "10.0.0.2:9000"], run="demo")) == [
        {"targets": ["10.0.0.1:9000"], "labels": {"run": "demo", "rank": "0"}},
        {"targets": ["10.0.0.2:9000"], "labels": {"run": "demo", "rank": "2"}},
    ]


def test_runs_of_one_name_have_two_files_in_the_folder_of_all_runs(tmp_path: Path) -> None:
    """Told apart by their run directories."""
    first, second = (target_files(tmp_path / parent / "demo", str(tmp_path / "all"))[1] for parent in "ab")
    assert first != second
    assert first.parent == tmp_path / "all"
    assert target_files(tmp_path / "demo", None) == [tmp_path / "demo" / "metrics_targets.json"]


def test_reachable_host_is_on_the_masters_network(caplog: pytest.LogCaptureFixture) -> None:
    """Loopback stays loopback; a master that cannot be resolved warns and gives the host's name."""
    assert reachable_host("127.0.0.1") == "127.0.0.1"
    assert reachable_host("node.invalid") == socket.gethostname()
    assert "no route to master 'node.invalid'" in caplog.text
