"""report.html: whole, self-contained, and honest about what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.metrics.log import MetricsLog
from paco_ds.metrics.steps import StepRecord
from paco_ds.report.entry import main
from paco_ds.report.run_report import write_report

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
    log.start(0, {"world_size": 2})
    for step in range(1, 7):
        refused = step == 4
        loss = float("nan") if refused else 2.0 / step
        log.step(
            replace(RECORD, step=step, epoch=(step - 1) // 3, loss=loss, skipped=refused, bad_samples=int(refused))
        )
        if step % 3 == 0:
            log.evaluation(step, step // 3, "val", ShotAccuracy(0.5, 0.25, None, 0.4321, {}, []), seconds=220)
    log.close()
    (run / "recipe.yaml").write_text("seed: 7\ndata: {shards: 's3://bucket/<x>'}\nloss: {method: paco, alpha: 0.02}\n")
    (run / "metrics.json").write_text(json.dumps(FINAL))
    return run


def _page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def _data(page: str) -> Any:
    """What the page's script draws."""
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def _charts(page: str) -> list[str]:
    return re.findall(r'data-chart="(\w+)"', page.split("<script")[0])


def test_page_is_self_contained(page: str) -> None:
    """Nothing is fetched: no outside scripts, styles, images or fonts, and the page forbids its browser to."""
    assert not re.search(r"<script[^>]* src|<iframe|<link[^>]* rel=.stylesheet|@import|@font-face", page)
    assert "default-src 'none'; img-src data:" in page
    text = page.split("<script")[0]
    for reference in re.findall(r'(?:src|href)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text):
        assert reference.startswith(("#", "data:"))


def test_the_final_test_evaluation_does_not_replace_the_watched_curve(run_dir: Path, page: str) -> None:
    """The accuracy chart keeps drawing the split evaluated in every epoch."""
    drawn = _data(page)["accuracy"]
    assert [(row["x"], row["group"]) for row in drawn if row["y"] == 50] == [(1, "many"), (2, "many")]
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.evaluation(6, 2, "test", ShotAccuracy(0.9, 0.9, None, 0.9, {}, []))
    log.close()
    assert _data(_page(run_dir))["accuracy"] == drawn


def test_a_scaled_run_says_so(run_dir: Path, page: str) -> None:
    """More micro-batches a step than the recipe has make another model."""
    assert "Scaled" not in page
    (run_dir / "metrics.json").write_text(json.dumps({**FINAL, "scale": 2.0}))
    assert "2 times the recipe&#39;s micro-batches a step" in _page(run_dir)


def test_page_shows_the_run(page: str) -> None:
    """Headline figures, refused updates, recipe, versions, digest and charts are there."""
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
    assert _charts(page) == [
        *("loss", "accuracy", "lr", "norm", "classes", "sizes", "center", "positive", "throughput", "wait", "time"),
    ]


def test_an_evaluation_on_one_rank_does_not_pass_for_the_training(run_dir: Path, page: str) -> None:
    """It writes metrics.json anew, with its own ranks and times."""
    (run_dir / "metrics.json").write_text(json.dumps(FINAL | {"world_size": 1, "started": "2025-03-01T10:07:01+00:00"}))
    facts = re.compile(r"<dt>(?:Ranks|Trained for)</dt>\s*<dd>[^<]*</dd>")
    assert len(facts.findall(page)) == 2
    assert facts.findall(_page(run_dir)) == facts.findall(page)


def test_restarts_are_listed_with_their_reasons(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as log:
        line = {"kind": "restart", "step": 6, "number": 1, "reason": "killed <b>", "time": "2026-01-01T00:00:00+00:00"}
        log.write(json.dumps(line) + "\n")
    page = write_report(run_dir).read_text()
    assert "Started again: 1 times" in page
    assert "2026-01-01T00:00:00+00:00, after step 6: killed &lt;b&gt;" in page


def test_every_class_is_named_and_nothing_in_a_name_is_markup(run_dir: Path) -> None:
    """Not even the end of the script that holds the names; escapes of the terminal are shown as such."""
    evil = ["</script><script>alert(1)</script>", "<!--", "Coat & \u202e", "https://a:S3CRET@b"]
    (run_dir / "metrics.json").write_text(json.dumps(FINAL | {"class_names": evil}))
    page = _page(run_dir)
    assert not re.search("<script>alert|<!--|S3CRET|\u202e", page)
    assert page.count("<script") == page.count("</script>") == 3
    names = [row[0] for row in _data(page)["classes"]]
    assert names == ["https://***@b", evil[0], "<!--", r"Coat & \u202e"]


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
    """Lines without a part, before it was there or refused, are gaps."""
    assert "What the loss is made of" not in page
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.step(replace(RECORD, step=7, epoch=2, parts={"softmax": 1.5, "contrast": float("nan")}))
    log.step(replace(RECORD, step=8, epoch=2, parts={"softmax": 1.25, "contrast": 3.0}))
    log.step(replace(RECORD, step=9, epoch=2))
    log.close()
    page = _page(run_dir)
    curves = _data(page)["curves"]
    assert [row[1] for row in curves["part_softmax"]] == [1.5, 1.25]
    assert [row[1] for row in curves["part_contrast"]] == [3.0]
    assert "parts" in _charts(page)


def test_curves_leave_out_what_was_not_logged(page: str) -> None:
    """Null, a refused step and a shot without anchors are gaps."""
    curves = _data(page)["curves"]
    assert [round(3 * row[0]) for row in curves["loss"]] == [1, 2, 3, 5, 6]
    assert _data(page)["skips"] == [4 / 3]
    assert curves["center_many"][0][1] == 0.5
    assert "center_few" not in curves
    assert (curves["positive_medium"][0][1], curves["positive_optimum_medium"][0][1]) == (0.03, 0.04)


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
    assert page.count("</script>") == 3


def test_settings_without_effect_are_folded(run_dir: Path) -> None:
    """Of other methods, of keys where there are none, and those that are not set."""
    (run_dir / "recipe.yaml").write_text(
        "seed: 7\nloss: {method: ride, alpha: 0.01, ride: {base: ldam}, focal: {gamma: 3.0}, distill: null}\n"
        "queue: {length: 12345}\nmodel: {backbone: cifar_resnet20, experts: 3, centers: cosine, centers_scale: 30.0}\n"
    )
    used, _, rest = _page(run_dir).split("<h2>Settings that this run uses")[1].partition("<details")
    for shown in ("<td>ride.base</td><td>ldam</td>", "<td>centers_scale</td>", "<td>seed</td><td>7</td>"):
        assert shown in used
    for folded in ("<td>alpha</td>", "<td>focal.gamma</td>", "<td>distill</td><td>-</td>", "<td>length</td>"):
        assert folded not in used
        assert folded in rest


def test_how_the_run_was_started_is_shown(run_dir: Path) -> None:
    """Command, commit and hardware of the last start; they are in the log, so a stopped run has them too."""
    (run_dir / "metrics.json").unlink()
    log = MetricsLog(run_dir / "metrics.jsonl")
    about = {
        "command": "paco-train <x>",
        "commit": "c0ffee",
        "hardware": {"device": "CPU 9"},
        "versions": {"torch": "2"},
    }
    log.start(6, about)
    log.checkpoint(6, 30.0)
    log.close()
    page = _page(run_dir)
    for text in ("paco-train &lt;x&gt;", "c0ffee", "CPU 9", "<td>torch</td><td>2</td>"):
        assert text in page
    assert {"part": "checkpoints", "seconds": 30.0} in _data(page)["time"]


def test_a_page_is_drawn_without_torch() -> None:
    """Its import alone takes seconds, and ten times the memory of a long log."""
    program = "import sys, paco_ds.report.run_report; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
