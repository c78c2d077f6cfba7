"""metrics.jsonl: what is written is read back, and a resumed run goes on cleanly."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paco_ds.errors import StorageError
from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.metrics.log import MetricsLog, read
from paco_ds.metrics.steps import StepRecord

RECORD = StepRecord(
    step=1,
    epoch=0,
    loss=float(np.float32(0.1)),
    lr=0.1 + 0.2,
    grad_norm=1.0,
    images_per_second=100.0,
    data_wait_seconds=0.0,
    step_seconds=0.5,
    center_probability={"many": 0.5, "few": None},
)
ACCURACY = ShotAccuracy(0.9, None, 0.7, 0.85, {"many": 1.0, "all": 0.99}, [0.9, 0.7])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of steps 1 to 4 with an evaluation after step 2."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 5):
        log.step(replace(RECORD, step=step))
        if step == 2:
            log.evaluation(2, 1, "val", ACCURACY)
    log.close()
    return path


def test_lines_come_back_with_the_same_bits(path: Path) -> None:
    """Floats survive exactly; kinds, split and figures are there."""
    lines = list(read(path))
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("step", 4),
    ]
    assert (lines[0]["loss"], lines[0]["lr"]) == (RECORD.loss, RECORD.lr)
    assert lines[0]["center_probability"] == {"many": 0.5, "few": None}
    evaluation = {key: lines[2][key] for key in ("epoch", "split", "many", "medium", "all", "top5")}
    assert evaluation == {
        "epoch": 1,
        "split": "val",
        "many": 0.9,
        "medium": None,
        "all": 0.85,
        "top5": {"many": 1.0, "all": 0.99},
    }


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    """A line can be read before the log is closed."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.step(RECORD)
    assert len(list(read(tmp_path / "metrics.jsonl"))) == 1
    log.close()


def test_not_finite_becomes_null_and_the_reason_shows(tmp_path: Path) -> None:
    """NaN and infinity, nested ones too, are valid JSON nulls beside "skipped": true."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.step(
        replace(
            RECORD,
            loss=float("nan"),
            grad_norm=float("inf"),
            center_probability={"few": float("nan")},
            skipped=True,
        )
    )
    log.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["center_probability"]["few"]) == (None, None, None)
    assert line["skipped"] is True


def test_cut_drops_later_lines_and_the_log_goes_on(path: Path) -> None:
    """After cut_after(2) steps 1 and 2 and the evaluation stay to the byte, and step 3 is written anew."""
    before = path.read_bytes().splitlines(keepends=True)
    log = MetricsLog(path)
    log.cut_after(2)
    assert path.read_bytes() == b"".join(before[:3])
    log.step(replace(RECORD, step=3, loss=9.0))
    log.close()
    assert list(read(path))[-1]["loss"] == 9.0
    assert list(path.parent.iterdir()) == [path]


def test_restarts_are_numbered_over_all_starts(tmp_path: Path) -> None:
    """Those after a step that is repeated are forgotten with it."""
    path = tmp_path / "metrics.jsonl"
    for step, reason in ((0, "rank 1 was lost"), (4, "killed"), (9, "its launcher died")):
        log = MetricsLog(path)
        log.cut_after(step)
        log.restart(step, reason)
        log.close()
    assert [(line["number"], line["reason"]) for line in read(path)][1:] == [(2, "killed"), (3, "its launcher died")]
    log = MetricsLog(path)
    log.cut_after(4)
    assert log.restarts == 2


@pytest.mark.parametrize("torn", [b'{"kind": "step", "ste', b'{"kind": "step", "step": 5}'])
def test_torn_last_line_is_dropped(path: Path, torn: bytes) -> None:
    """A crash in mid-line: reading leaves it out, cutting removes it, even if what is there would parse."""
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [line["step"] for line in read(path)][-1] == 4
    log = MetricsLog(path)
    log.cut_after(10)
    log.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"\0" * 70_000, b"\xff{", b"[" * 100_000, b'{"step": 9}', b"{}", b"", b"x" * 2**21])
def test_damaged_lines_are_passed_over_and_said(path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Anywhere in the file, whatever they are; one warning for all of them."""
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [line["step"] for line in read(path)]
    path.write_bytes(b"".join([damage + b"\n", lines[0], damage + b"\n", *lines[1:]]))
    found = read(path)
    assert [line["step"] for line in found] == steps
    assert found.damaged == 2
    assert f"{path}: 2 damaged lines were passed over, the first is line 1" in caplog.text


def test_a_resumed_run_cuts_the_zeros_of_a_crash_and_goes_on(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damage after the last line that is kept goes, damage before it stays."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\0\n" + b"".join(lines) + b"\0" * 200_000 + b"\n{]\n" + b"\0" * 9)
    log = MetricsLog(path)
    log.cut_after(2)
    assert path.read_bytes() == b"\0\n" + b"".join(lines[:3])
    assert f"{path}: 2 damaged lines at its end were removed" in caplog.text
    log.step(replace(RECORD, step=3))
    log.close()
    assert [line["step"] for line in read(path)][-2:] == [2, 3]


def test_a_resume_reads_the_end_of_a_long_log_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the lines lie in the blocks that are read; a position is found for every step."""
    whole = path.read_bytes()
    ends = {0: 0, 1: whole.index(b"\n") + 1, 9: len(whole)}
    for block in (1, 7, 100, 2**16):
        monkeypatch.setattr("paco_ds.metrics.log._BLOCK", block)
        for step, end in ends.items():
            path.write_bytes(whole)
            log = MetricsLog(path)
            log.cut_after(step)
            log.close()
            assert path.stat().st_size == end
    log = MetricsLog(path)
    monkeypatch.setattr(
        "paco_ds.metrics.log._parsed",
        lambda raw: pytest.fail("read") if b'"step": 1,' in raw else {"kind": "step", "step": 4},
    )
    log.cut_after(4)
    log.close()


def test_an_evaluation_says_how_many_experts_routers_asked(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.evaluation(1, 1, "val", ACCURACY)
    log.evaluation(2, 1, "val", replace(ACCURACY, images_by_experts=[6, 2]))
    log.close()
    assert [line.get("experts_used") for line in read(tmp_path / "metrics.jsonl")] == [None, 1.25]


def test_an_evaluation_is_found_if_no_step_follows(path: Path) -> None:
    """A run that ended between a checkpoint and its evaluation has none; settings changed on resume may follow."""
    log = MetricsLog(path)
    assert log.evaluation_of(2) is None
    log.cut_after(2)
    log.changed_setting(2, "optimizer.lr", 0.2, 0.1)
    found = log.evaluation_of(2)
    assert found is not None
    assert found["all"] == 0.85
    assert log.evaluation_of(1) is None
    log.cut_after(1)
    assert log.evaluation_of(1) is None
    log.cut_after(-1)
    assert log.evaluation_of(2) is None
    log.close()
    assert MetricsLog(None).evaluation_of(2) is None


def test_a_full_disk_is_named_and_costs_no_more_than_a_torn_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing does not try again, and the resumed run cuts what was torn."""
    before, log = path.read_bytes(), MetricsLog(path)
    with path.open("ab", buffering=0) as kept:

        class Full:
            def write(self, line: memoryview) -> int:
                if len(line) > 10:
                    return kept.write(line[:10])  # what still fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            def close(self) -> None: ...

        monkeypatch.setattr(log, "_file", Full())
        for _ in range(2):
            with pytest.raises(StorageError, match=r"metrics.jsonl cannot be written: No space .*make room"):
                log.changed_setting(4, "a", 1, 2)
        log.close()
    again = MetricsLog(path)
    again.cut_after(4)
    again.close()
    assert path.read_bytes() == before


def test_log_without_a_path_writes_nothing(tmp_path: Path) -> None:
    """Ranks other than 0 make the same calls."""
    log = MetricsLog(None)
    log.step(RECORD)
    log.evaluation(1, 1, "val", ACCURACY)
    log.cut_after(0)
    log.close()
    assert list(tmp_path.iterdir()) == []
