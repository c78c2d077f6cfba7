"""report.html: whole, self-contained, and honest about what is missing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.metrics.log import MetricsLog, StepRecord
from paco_ds.report.entry import main
from paco_ds.report.run_report import read_run, write_report

NAMES = ["T-shirt/top", "<b>Bag</b>", "Ankle $boot", "Coat & hat"]
RECORD = StepRecord(
    1,
    0,
    2.0,
    0.1,
    1.0,
    640.0,
    0.01,
    0.1,
    1.0,
    {"many": 0.5, "medium": 0.6},
    {"many": 0.4, "medium": 0.7},
    {"many": 0.02, "medium": 0.03},
    {"many": 0.01, "medium": 0.04},
)
FINAL: dict[str, Any] = {
    "many": 0.9,
    "medium": 0.755,
    "few": None,
    "all": 0.8,
    "top5": {"many": 1.0, "medium": 1.0, "few": None, "all": 1.0},
    "per_class": [0.9, 0.9, None, 0.61],
    "class_names": NAMES,
    "class_counts": [500, 200, 40, 1234],
    "shots_of_classes": ["many", "many", "medium", "many"],
    "world_size": 2,
    "started": "2025-03-01T10:00:00+00:00",
    "finished": "2025-03-01T10:07:21+00:00",
    "manifest_sha256": "ab" * 32,
    "versions": {"torch": "2.14.1"},
    "split": "test",
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that a test may change."""
    return _write_run(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the run as it is written here, drawn once."""
    run = _write_run(tmp_path_factory.mktemp("unchanged"))
    page = _page(run)
    assert [path.name for path in run.iterdir() if path.suffix == ".partial"] == []
    return page


def _write_run(folder: Path) -> Path:
    """Two epochs of three steps, one refused, each epoch evaluated; recipe and final metrics."""
    run = folder / "a-run"
    run.mkdir()
    log = MetricsLog(run / "metrics.jsonl")
    for step in range(1, 7):
        refused = step == 4
        loss = float("nan") if refused else 2.0 / step
        log.step(
            replace(RECORD, step=step, epoch=(step - 1) // 3, loss=loss, skipped=refused, bad_samples=int(refused))
        )
        if step % 3 == 0:
            log.evaluation(step, step // 3, "val", ShotAccuracy(0.5, 0.25, None, 0.4321, {}, []))
    log.close()
    (run / "recipe.yaml").write_text("seed: 7\ndata: {shards: 's3://bucket/<x>'}\nloss: {method: paco, alpha: 0.02}\n")
    (run / "metrics.json").write_text(json.dumps(FINAL))
    return run


def _page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_page_is_self_contained(page: str) -> None:
    """Nothing is fetched: no addresses, no scripts, no outside styles, images or fonts."""
    assert not re.search(r"https?://|<script|<iframe|@import|@font-face", page)
    for reference in re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page):
        assert reference.startswith(("#", "data:"))


def test_the_final_test_evaluation_does_not_replace_the_watched_curve(run_dir: Path, page: str) -> None:
    """The accuracy chart keeps drawing the split evaluated in every epoch."""
    before = page.split('id="accuracy')[1].split("</svg>")[0]
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.evaluation(6, 2, "test", ShotAccuracy(0.9, 0.9, None, 0.9, {}, []))
    log.close()
    assert _page(run_dir).split('id="accuracy')[1].split("</svg>")[0] == before


def test_a_scaled_run_says_so(run_dir: Path, page: str) -> None:
    """More micro-batches a step than the recipe has make another model."""
    assert "Scaled" not in page
    (run_dir / "metrics.json").write_text(json.dumps({**FINAL, "scale": 2.0}))
    assert "2 times the recipe&#39;s micro-batches a step" in _page(run_dir)


def test_page_shows_the_run(page: str) -> None:
    """Headline figures, refused updates, recipe, versions, digest and seven charts are there."""
    for text in (
        ">a-run<",
        "90.0",
        "75.5",
        "80.0",
        "test split",
        "1 of 6 steps",
        "Unreadable images: 1",
        "0:07:21",
    ):
        assert text in page
    for text in ("alpha", "0.02", "2.14.1", "ab" * 32, "s3://bucket/&lt;x&gt;", "1,234", "2 epochs, 6 steps"):
        assert text in page
    assert page.count("<svg") == 7


def test_restarts_are_listed_with_their_reasons(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as log:
        line = {"kind": "restart", "step": 6, "number": 1, "reason": "killed <b>", "time": "2026-01-01T00:00:00+00:00"}
        log.write(json.dumps(line) + "\n")
    page = write_report(run_dir).read_text()
    assert "Started again: 1 times" in page
    assert "2026-01-01T00:00:00+00:00, after step 6: killed &lt;b&gt;" in page


def test_every_class_is_named_and_escaped(page: str) -> None:
    """Class names stand in chart and table; markup in one is shown, not obeyed."""
    assert "<b>Bag</b>" not in page
    for name in ("T-shirt/top", "&lt;b&gt;Bag&lt;/b&gt;", "Ankle $boot", "Coat &amp; hat"):
        assert page.count(name) >= 2


def test_ids_of_charts_do_not_clash(page: str) -> None:
    """Every id is used once on the page, and every reference has its id."""
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_same_files_give_the_same_page(run_dir: Path, page: str) -> None:
    """Nothing of the time of writing gets in."""
    assert _page(run_dir) == page


def test_missing_files_are_said_on_the_page(run_dir: Path) -> None:
    """Without recipe and final metrics the last validation is the headline, and the gaps are named."""
    (run_dir / "recipe.yaml").unlink()
    (run_dir / "metrics.json").unlink()
    page = _page(run_dir)
    for text in ("recipe.yaml is missing", "metrics.json is missing", "val split after epoch 2", "43.2"):
        assert text in page


def test_run_without_a_line_yet_has_a_page(tmp_path: Path) -> None:
    """An empty log gives a page that says so."""
    (tmp_path / "metrics.jsonl").touch()
    page = _page(tmp_path)
    assert "No evaluation yet" in page
    assert "No optimizer step has been logged yet" in page


def test_final_metrics_without_classes_still_give_the_headline(run_dir: Path) -> None:
    """metrics.json with the four figures only is enough for the tiles."""
    (run_dir / "metrics.json").write_text(json.dumps({key: FINAL[key] for key in ("many", "medium", "few", "all")}))
    page = _page(run_dir)
    assert "75.5" in page
    assert "metrics.json does not hold the classes" in page


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what other tests left
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_many_classes_become_dots(run_dir: Path) -> None:
    """With more classes than bars have room for, each is still named in the table, seen or not."""
    final = FINAL | {
        "class_names": [f"species {c}" for c in range(60)],
        "class_counts": list(range(60, 0, -1)),
        "shots_of_classes": ["medium"] * 41 + ["few"] * 19,
        "per_class": [None] * 30 + [0.5] * 30,
    }
    (run_dir / "metrics.json").write_text(json.dumps(final))
    page = _page(run_dir)
    assert all(f">species {c}<" in page for c in range(60))


def test_without_contrast_the_page_says_why(run_dir: Path) -> None:
    """Probabilities that a method does not have leave no empty chart: null in the log, or not there at all."""
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.cut_after(-1)
    log.step(replace(RECORD, positive_probability={"many": None}, positive_probability_optimum={"many": None}))
    log.close()
    page = _page(run_dir)
    assert "Probabilities of positives were not logged" in page
    assert "Probability of the own center, p_c" in page
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.cut_after(-1)
    log.step(replace(RECORD, center_probability={}, center_probability_optimum={}))
    log.close()
    page = _page(run_dir)
    assert "Center probabilities were not logged" in page
    assert "Probability of each positive, p+" in page


def test_parts_of_the_loss_are_drawn_where_a_method_says_them(run_dir: Path, page: str) -> None:
    """Seven charts become eight; lines without a part, before it was there or refused, are gaps."""
    assert "What the loss is made of" not in page
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.step(replace(RECORD, step=7, epoch=2, parts={"softmax": 1.5, "contrast": float("nan")}))
    log.step(replace(RECORD, step=8, epoch=2, parts={"softmax": 1.25, "contrast": 3.0}))
    log.step(replace(RECORD, step=9, epoch=2))
    log.close()
    parts = read_run(run_dir).parts
    gap = pytest.approx(float("nan"), nan_ok=True)
    assert parts["softmax"].tolist() == [*[gap] * 6, 1.5, 1.25, gap]
    assert parts["contrast"].tolist() == [*[gap] * 6, gap, 3.0, gap]
    of_parts = _page(run_dir)
    assert of_parts.count("<svg") == 8
    assert "What the loss is made of" in of_parts
    assert ">contrast<" in of_parts


def test_log_columns_are_read_in_order(run_dir: Path) -> None:
    """Null becomes NaN, true becomes 1, and a missing shot NaN."""
    steps = read_run(run_dir).steps
    assert steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert [int(i) for i in range(6) if steps["loss"][i] != steps["loss"][i]] == [3]
    assert steps["skipped"].tolist() == [0, 0, 0, 1, 0, 0]
    assert steps["own_many"][0] == 0.5
    assert steps["own_few"][0] != steps["own_few"][0]
    assert (steps["positive_medium"][0], steps["positive_optimum_medium"][0]) == (0.03, 0.04)


def test_wrong_directory_and_damaged_files_are_named(run_dir: Path, tmp_path: Path) -> None:
    """Each message holds the file and what to do."""
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is missing: .* is not the output directory of a run"):
        write_report(tmp_path)
    (run_dir / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is not JSON .*; evaluate the run again"):
        write_report(run_dir)
    (run_dir / "metrics.json").unlink()
    (run_dir / "recipe.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"recipe\.yaml is not valid YAML"):
        write_report(run_dir)


def test_the_command_writes_the_page_of_a_stopped_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without metrics.json, as a stopped run is; a path that is no run is one line with status 2."""
    (run_dir / "metrics.json").unlink()
    assert main([str(run_dir)]) == 0
    assert "metrics.json is missing" in (run_dir / "report.html").read_text()
    with pytest.raises(SystemExit) as ended:
        main([str(run_dir), str(run_dir.parent)])
    assert ended.value.code == 2
    assert "is not the run directory of a training" in capsys.readouterr().err


def test_f1_calibration_and_confusions_of_the_final_evaluation_are_shown(run_dir: Path, page: str) -> None:
    """Names are text there too; without the keys the page has no such part."""
    assert "Single predictions" not in page
    pair = {"class": "</script><b>x", "taken_for": "Coat & hat", "images": 17, "share": 0.125}
    figures = {"balanced": 0.611, "macro_f1": 0.622, "calibration_error": 0.033, "confusions": [pair]}
    (run_dir / "metrics.json").write_text(json.dumps(FINAL | figures))
    page = _page(run_dir)
    for text in ("61.1", "62.2", ">3.3<", "&lt;/script&gt;&lt;b&gt;x", ">Coat &amp; hat<", ">17<", ">12.5<"):
        assert text in page
    assert "</script>" not in page
