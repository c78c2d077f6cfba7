"""Misclassified images on report.html: there, left out on request, and no reason to fail."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from paco_ds.data.manifest import load_manifest
from paco_ds.report import entry
from paco_ds.report.pictures import SIDE, thumbnail
from paco_ds.report.run_report import write_report
from tests.recipes import write_tiny_recipe

PICTURE = re.compile(r'<img src="data:image/jpeg;base64,([^"]+)" alt="([^"]*)"')


@pytest.fixture
def run(tmp_path, striped_shards):
    """A finished run with three mistakes, two of them the same image."""
    run = tmp_path / "run"
    run.mkdir()
    write_tiny_recipe(run / "recipe.yaml", f"data.shards={striped_shards}")
    (run / "metrics.jsonl").write_text("")
    rows = [
        {"image": image, "class": f"class{image // 5}", "taken_for": "<i>class2</i>", "confidence": 0.9}
        for image in (0, 7)
    ]
    final = {
        "split": "test",
        "manifest_sha256": load_manifest(striped_shards).sha256,
        "mistakes": {"confused": [rows], "tail": rows[1:]},
    }
    (run / "metrics.json").write_text(json.dumps(final))
    return run


def pictures(page):
    return [(base64.b64decode(jpeg), about) for jpeg, about in PICTURE.findall(page.read_text())]


def test_mistakes_are_shown_by_small_pictures_in_the_page(run):
    """Those of the shards, 12 x 12 here; names are text."""
    found = pictures(write_report(run))
    assert [about for _, about in found] == [f"class{c}, taken for &lt;i&gt;class2&lt;/i&gt;" for c in (0, 1, 1)]
    assert all(Image.open(io.BytesIO(jpeg)).size == (12, 12) for jpeg, _ in found)
    assert found[0][0] != found[1][0]


def test_pictures_can_be_left_out_of_a_page_and_of_a_run(run, capsys):
    """For data that others may not see: no shard is opened."""
    assert entry.main(["--no-pictures", str(run)]) == 0
    assert pictures(run / "report.html") == []
    assert "Pictures: left out" in (run / "report.html").read_text()
    text = (run / "recipe.yaml").read_text()
    assert "pictures: true" in text
    (run / "recipe.yaml").write_text(text.replace("pictures: true", "pictures: false"))
    assert pictures(write_report(run)) == []


@pytest.mark.parametrize(
    ("key", "value", "said"), [("manifest_sha256", "0" * 64, "other shards"), ("split", "elsewhere", "elsewhere")]
)
def test_shards_that_are_not_those_of_the_evaluation_are_said(run, key, value, said):
    """The page is written without pictures."""
    final = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(final | {key: value}))
    page = write_report(run)
    assert pictures(page) == []
    assert re.search(f"Pictures: .*{said}", page.read_text())


def test_shards_that_are_gone_are_said(run):
    """As where a run was copied to a laptop."""
    write_tiny_recipe(run / "recipe.yaml", "data.shards=gone")
    page = write_report(run)
    assert pictures(page) == []
    assert re.search("Pictures: .*gone", page.read_text())


def test_a_thumbnail_is_small_whatever_the_image_is():
    """And what is no image, or of too many pixels, has none."""
    file = io.BytesIO()
    Image.effect_noise((1500, 900), 90).save(file, "PNG")
    jpeg = base64.b64decode(thumbnail(file.getvalue) or "")
    assert max(Image.open(io.BytesIO(jpeg)).size) == SIDE
    assert len(jpeg) < 10_000
    assert thumbnail(lambda: b"no image") is None
