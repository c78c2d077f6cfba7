"""The page in a browser: it draws, searches and fits a phone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paco_ds.report.run_report import write_report

CLASSES = 8142
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"  # to be looked at, after CI too
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
  wide: document.documentElement.scrollWidth,
  rows: [...document.querySelectorAll(".class-row")].map(row => row.innerText),
  shown: document.getElementById("class-count").textContent, dark: matchMedia("(prefers-color-scheme: dark)").matches,
  drawn: [...document.querySelectorAll("[data-chart]")].filter(place => place.querySelector("svg, canvas")).length,
  charts: document.querySelectorAll("[data-chart]").length, marked: document.querySelectorAll("b.evil").length,
}), "*"), 1500))</script></body>"""
FRAME = """<iframe src="probed.html#q=%s" width="390" height="800"></iframe>
<script>addEventListener("message", message => document.body.append("FOUND" + message.data + "END"))</script>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """As many classes as iNaturalist 2018, one with markup in its name."""
    run = tmp_path_factory.mktemp("large") / "run"
    run.mkdir()
    probabilities = {"many": 0.5, "medium": 0.4, "few": 0.3}
    step = {"kind": "step", "loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "images_per_second": 9.0, "step_seconds": 1.0}
    step |= {"data_wait_seconds": 0.1, "center_probability": probabilities, "positive_probability": probabilities}
    lines = [step | {"step": n, "epoch": n // 10, "parts": {"a.b": 1.0, "c[0]": 2.0}} for n in range(1, 30)]
    accuracy = {"many": 0.5, "medium": None, "few": 0.2, "all": 0.4, "seconds": 3.0}
    lines += [{"kind": "evaluation", "step": 29, "epoch": 3, "split": "val", **accuracy}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = {
        **accuracy,
        "class_names": [f"Genus species {c}" for c in range(CLASSES - 1)] + ["<b class=evil>Rarissima</b></script>"],
        "class_counts": [CLASSES - c for c in range(CLASSES)],
        "shots_of_classes": ["many"] * 8042 + ["medium"] * 80 + ["few"] * 20,
        "per_class": [c % 7 / 7 if c % 5 else None for c in range(CLASSES)],
        "reliability": [{"confidence": 0.5, "accuracy": 0.4, "images": 10}],
    }
    (run / "metrics.json").write_text(json.dumps(final))
    write_report(run)
    return run


def test_a_page_of_thousands_of_classes_is_small(run):
    """No row of the list is in the page before it is in sight."""
    page = (run / "report.html").read_text()
    assert len(page.encode()) < 2_000_000
    assert page.count("Genus species 4000") == 1


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize(("word", "scheme"), [("rarissima", "dark"), ("", "light")])
def test_the_page_draws_searches_and_fits_a_phone(run, tmp_path, word, scheme):
    """All charts are drawn without an error, at 390 pixels nothing scrolls sideways, the search finds a class by a part
    of its name, and few of thousands of rows are elements."""
    (tmp_path / "probed.html").write_text((run / "report.html").read_text().replace("</body>", PROBE))
    (tmp_path / "frame.html").write_text(FRAME % word)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    options += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", f"--user-data-dir={tmp_path}/user"]
    command = [str(BROWSER), *options, "--dump-dom", f"file://{tmp_path}/frame.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" not in done.stderr
    said = re.findall("FOUND({.*})END", done.stdout)[0]
    found = json.loads(said.replace("&lt;", "<").replace("&gt;", ">"))
    assert found["wide"] <= 390
    assert found["drawn"] == found["charts"] == 13
    assert found["dark"] == (scheme == "dark")
    assert found["marked"] == 0
    if word:
        assert found["shown"] == "1 of 8,142"
        assert "<b class=evil>Rarissima</b></script>" in found["rows"][0]
    else:
        assert found["shown"] == "8,142 of 8,142"
        assert 5 < len(found["rows"]) < 40


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_is_drawn_into_the_screenshots(run, tmp_path, width, scheme):
    """At the width of a desk and of a phone: in a frame, since a window of the browser is wider."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    height, file = 4000 if width == 1280 else 7000, SCREENSHOTS / f"report-{width}-{scheme}.png"
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe src="{run}/report.html" width={width} height={height} style="border:0">'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    options += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", f"--user-data-dir={tmp_path}/user"]
    options += [f"--window-size={max(width, 500)},{height}", f"--screenshot={file}"]
    subprocess.run([str(BROWSER), *options, f"file://{tmp_path}/frame.html"], capture_output=True, timeout=120)
    with Image.open(file) as picture:
        page = np.asarray(picture.convert("L"))[:, :width]
    assert page.shape == (height, width)
    assert (page[2, 2] > 128) == (scheme == "light")
    assert len(np.unique(page)) > 20  # not one empty sheet
