"""Comparison: the sentences are right whoever wins, and page, picture and figures agree with them."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from paco_ds.command import Screen
from paco_ds.paper.comparison import MethodResults, SeedResult, verdicts, write_comparison
from paco_ds.paper.intervals import paired_difference


def _method(name: str, *alls: float, paper: dict[str, float] | None = None) -> MethodResults:
    return MethodResults(name, [SeedResult(i, 0.9, 0.6, None, figure) for i, figure in enumerate(alls)], paper)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


CROSS_ENTROPY = _method("cross_entropy", 0.74, 0.674, 0.70)
BALANCED = _method("Balanced Softmax", 0.826, 0.819, 0.838)


def test_a_win_beyond_the_spread_is_claimed() -> None:
    """83.3 against 70.5 with ranges of .5 and 6.6 points."""
    first, _ = verdicts([CROSS_ENTROPY, BALANCED, _method("paco", 0.836, 0.833, 0.831)])
    assert first == (
        "PaCo's mean All is 83.3 %, 12.8 points above cross-entropy's 70.5 %; "
        "the gap exceeds the seeds' spread of 6.6 points."
    )


def test_a_win_within_the_spread_is_not_claimed() -> None:
    """83.3 against 82.8 with ranges of .5 and 1.9 points."""
    _, second = verdicts([CROSS_ENTROPY, BALANCED, _method("paco", 0.836, 0.833, 0.831)])
    assert second == (
        "PaCo's mean All is 83.3 %, 0.5 points above Balanced Softmax's 82.8 %; "
        "the gap is within the seeds' spread of 1.9 points: neither is shown to be better."
    )


def test_a_loss_is_said_as_plainly() -> None:
    """PaCo below Balanced Softmax, beyond the spread."""
    _, second = verdicts([CROSS_ENTROPY, BALANCED, _method("paco", 0.80, 0.801, 0.799)])
    assert second == (
        "PaCo's mean All is 80.0 %, 2.8 points below Balanced Softmax's 82.8 %; "
        "the gap exceeds the seeds' spread of 1.9 points."
    )


def test_equal_means_and_single_seeds_settle_nothing() -> None:
    """A gap of nothing is equal; one seed has no spread."""
    first, second = verdicts([_method("cross_entropy", 0.8), BALANCED, _method("paco", 0.81, 0.836, 0.837)])
    assert "equal to Balanced Softmax's 82.8 %; the gap is within" in second
    assert first.endswith("with a single seed the spread is unknown, so this is not conclusive.")


def test_absent_methods_are_said() -> None:
    """No PaCo, or no rival, is no silence."""
    assert verdicts([BALANCED]) == ["PaCo is not among the methods, so there is no comparison."]
    assert verdicts([BALANCED, _method("PaCo", 0.8, 0.9)])[0].startswith("cross-entropy is not among the methods")


def test_paco_is_held_against_the_best_of_the_others_on_its_backbone() -> None:
    """As in Tables 9 and 14, where neither cross-entropy nor Balanced Softmax need be a row; CE is cross-entropy."""
    rows = [
        MethodResults(method, [SeedResult(1, None, None, None, figure)], backbone=backbone)
        for method, backbone, figure in [
            ("tau-normalize", "ResNet-50", 0.7),
            ("CE", "ResNet-50", 0.5),
            ("PaCo", "ResNet-50", 0.8),
            ("PaCo", "ResNet-152", 0.9),
        ]
    ]
    absent, *held = verdicts(rows)
    assert absent.startswith("Balanced Softmax is not among the methods")
    assert [sentence.partition(";")[0] for sentence in held] == [
        "ResNet-50: PaCo's mean All is 80.0 %, 30.0 points above cross-entropy's 50.0 %",
        "ResNet-50: PaCo's mean All is 80.0 %, 10.0 points above tau-normalize's 70.0 %",
    ]


def test_long_names_give_way_to_figures(tmp_path: Path) -> None:
    """On a terminal of 80 columns, or none."""
    out = io.StringIO()
    rows = [_method("multi-task (Balanced Softmax + Re-weighting), weight 0.05", 0.71, 0.72), _method("paco", 0.8)]
    write_comparison(rows, tmp_path / "c.html", tmp_path / "c.png", console=Screen(out, width=80))
    assert "71.0-72.0" in out.getvalue()


def test_print_page_picture_and_figures_agree(tmp_path: Path) -> None:
    """Sentences and means are on the screen, the self-contained page and in the JSON; a PNG is there."""
    out = io.StringIO()
    rows = [CROSS_ENTROPY, BALANCED, _method("paco", 0.836, 0.833, 0.831, paper={"all": 0.57})]
    html, png = tmp_path / "c.html", tmp_path / "c.png"
    sentences = write_comparison(rows, html, png, title=r"A <set> of $\alpha$", console=Screen(out, width=300))
    page, figures = html.read_text(), json.loads((tmp_path / "c.json").read_text())
    assert figures["sentences"] == sentences == verdicts(rows)
    assert figures["rows"][2]["seeds"][1] == {
        "seed": 1,
        "many": 0.9,
        "medium": 0.6,
        "few": None,
        "all": 0.833,
    }
    assert all(sentence in out.getvalue() for sentence in sentences)
    for text in ("Cross-entropy", "Balanced Softmax", "PaCo", "83.3", "70.5", "57.0", "67.4-74.0"):
        assert text in out.getvalue()
        assert text in page
    assert r"A &lt;set&gt; of $\alpha$" in page
    assert not re.search(r'https?://|<script|(?:src|href)="(?![#d])', page)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.html", "c.json", "c.md", "c.png"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to compare"),
        ([_method("paco")], "method 'paco' has no runs"),
        ([_method("paco", 0.8), _method("PaCo", 0.9)], "two methods share a name among paco, PaCo"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(rows: list[MethodResults], message: str, tmp_path: Path) -> None:
    """The reason is named and nothing is written."""
    with pytest.raises(ValueError, match=message):
        write_comparison(rows, tmp_path / "c.html", tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_a_row_in_another_precision_than_published_is_named(tmp_path: Path) -> None:
    """After the verdicts, on the page too."""
    rows = [replace(_method("paco", 0.5), deviation="bfloat16 where float32 is published"), _method("CE", 0.4)]
    sentences = write_comparison(rows, tmp_path / "c.html", tmp_path / "c.png", console=Screen(io.StringIO()))
    assert sentences[-1] == "PaCo: run in bfloat16 where float32 is published."
    assert sentences[-1] in (tmp_path / "c.html").read_text()
    assert sum("published" in sentence for sentence in sentences) == 1


def test_every_row_has_pacos_lead_with_its_interval_and_its_trials(tmp_path: Path) -> None:
    """Where the runs say which images were right: 3 seeds, 40 images, of which PaCo has 4 more in each."""
    ours, theirs = np.arange(40) < 30, np.arange(40) < 26
    rows = [
        MethodResults(name, [SeedResult(s, None, None, None, right.mean(), right) for s in (1, 2, 3)], trials=trials)
        for name, right, trials in [("paco", ours, 23), ("CE", theirs, 3)]
    ]
    out = io.StringIO()
    write_comparison(rows, tmp_path / "c.html", tmp_path / "c.png", console=Screen(out, width=200))
    expected = paired_difference(dict.fromkeys((1, 2, 3), ours), dict.fromkeys((1, 2, 3), theirs))
    page, figures = (tmp_path / "c.html").read_text(), json.loads((tmp_path / "c.json").read_text())
    for text in expected.parts():
        assert text in out.getvalue()
        assert text in page
    assert [row["lead"] for row in figures["rows"]] == [None, asdict(expected)]
    assert [row["trials"] for row in figures["rows"]] == [23, 3]
    assert re.search(r"Cross-entropy</b></td><td[^>]*>3</td>", page)
    header, _, first, second = ([c.strip() for c in line.split("|")[1:-1]] for line in _lines(tmp_path / "c.md"))
    assert header == ["method", "seeds", "Many", "Medium", "Few", "All", "trials", "PaCo's lead"]
    assert first == ["PaCo", "3", "-", "-", "-", "75.0 (75.0-75.0)", "23", "-"]
    assert second[-3:] == ["65.0 (65.0-65.0)", "3", "{} ({})".format(*expected.parts())]


def test_rows_without_known_images_have_no_lead(tmp_path: Path) -> None:
    """Kept results of versions before 0.13.0: neither an empty column nor a difference without interval."""
    write_comparison([CROSS_ENTROPY, _method("paco", 0.8)], tmp_path / "c.html", tmp_path / "c.png")
    assert "PaCo's lead" not in (tmp_path / "c.html").read_text()
    assert [row["lead"] for row in json.loads((tmp_path / "c.json").read_text())["rows"]] == [None, None]
