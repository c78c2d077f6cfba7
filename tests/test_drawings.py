"""The pictures of docs/concepts.md are what the code that they explain gives."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import drawings

from paco_ds.data.stream.order import EpochOrder


@pytest.mark.parametrize("file", drawings.drawings(), ids=lambda file: file.name)
def test_a_drawing_is_current_and_well_formed(file):
    """After a change of tools/drawings.py: `make pages`."""
    text = file.read_text(encoding="utf-8")
    assert text == drawings.drawings()[file]
    assert ET.fromstring(text).findtext("{*}title")


def test_the_drawing_of_an_epoch_shows_its_order():
    """Ids in the cells, row by row: the shuffled shards, the rotated sequence, the steps of each slot."""
    root = ET.fromstring(drawings.epoch_order())
    texts = [text.text or "" for text in root.findall("{*}text") if text.get("class") == "mid"]
    ids = [int(text) for text in texts if text.isdigit()]
    shuffled, rotated, grid = np.split(np.array(ids), [26, 52])
    assert sorted(shuffled) == list(range(26))
    assert np.flatnonzero(np.diff(shuffled) != 1).tolist() == [7, 15]  # between three shards
    assert sorted(rotated) == list(range(26))
    order = EpochOrder([10, 8, 8], 4, seed=2, epoch=0, window=3)
    steps = np.stack([order.batch(step, range(4)) for step in range(order.steps)])
    assert grid.reshape(4, 6).T.tolist() == steps.tolist()
