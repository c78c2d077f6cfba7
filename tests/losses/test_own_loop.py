"""The documented loop of one's own, run as it is printed."""

import importlib.util
import inspect
from pathlib import Path

LOOP = Path(__file__).resolve().parents[2] / "docs" / "own_loop.py"


def test_loss_and_queue_serve_a_loop_without_deepspeed_or_shards():
    """It learns from 101 to 2 images a class, in at most 30 lines that touch nothing else of the project."""
    spec = importlib.util.spec_from_file_location("own_loop", LOOP)
    assert spec is not None
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    assert len(inspect.getsourcelines(loop.train)[0]) <= 30
    assert not {"deepspeed", "webdataset"} & set(vars(loop))
    chance, untrained = 0.1, loop.train(steps=0)
    assert untrained < 2.5 * chance
    assert loop.train(steps=100) > 5 * chance
