"""Tables of the results page are those that the kept results give."""

from pathlib import Path

import pytest

from paco_ds.paper import reproduce

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("table", "kept", "seeds"), [("methods", "methods", 3), ("settings", "settings", 1), ("glyphs", "glyphs676", 3)]
)
def test_the_page_has_the_table_of_the_kept_results(tmp_path, table, kept, seeds):
    """`--draw-only` without runs and shards, as a reader of the repository would."""
    keep = ROOT / "results" / f"{kept}.jsonl"
    arguments = ["--table", table, "--seeds", str(seeds), "--keep", str(keep), "--output", str(tmp_path)]
    assert reproduce.main([*arguments, "--draw-only"]) == 0
    assert (tmp_path / "comparison.md").read_text() in (ROOT / "docs" / "results.md").read_text()
