"""Every row of Tables 9 to 14 trained for some steps on 2 ranks, with its own recipe, method and backbone.

Only sizes are reduced: 64 pixels, micro-batches of 4, a queue of 32, four classes of small images.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import load_manifest
from paco_ds.metrics.log import read
from paco_ds.paper.tables import load_table
from tests.recipes import model_of

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]
TRAIN = "tests.distributed.training:train"
EVALUATE = Path(__file__).parents[2] / "paco_ds" / "evaluate.py"
STEPS = 3
ROWS = [
    pytest.param(number, row, id=f"table{number}-{row.folder}")
    for number in range(9, 15)
    for row in load_table(str(number)).rows
]
REDUCED = (
    "data.classes=4",
    "data.workers=0",
    "views.query.size=64",
    "views.key.size=64",
    "views.evaluation.size=64",
    "views.evaluation.resize=64",
    "queue.length=32",
    "step.micro_batch=4",
    "step.micro_batches=2",
    "evaluation.batch=8",
    "engine.threads=1",
    "metrics.serve=false",
    "metrics.log_every=1",
)


def test_the_tables_have_36_rows():
    """So that none is left out below."""
    assert len(ROWS) == 36


@pytest.mark.parametrize(("number", "row"), ROWS)
def test_every_row_trains_on_two_ranks(pool, record, striped_shards, tmp_path, number, row):
    """Losses are finite, no update is refused, and every weight moves; a row that is judged by options of
    evaluate.py is evaluated with them."""
    table, run = load_table(str(number)), tmp_path / "run"
    overrides = (*table.overrides(row), *REDUCED, f"data.shards={striped_shards}")
    holds, figure, began = False, "did not end", time.monotonic()
    try:
        pool(2).run(TRAIN, recipe=table.recipe_of(row), run=run, overrides=overrides, stop_at_step=STEPS)
        steps = [line for line in read(run / "metrics.jsonl") if line["kind"] == "step"]
        losses = [step["loss"] for step in steps]
        still, parameters = unmoved_weights(table, row, overrides, run)
        figure = f"loss {', '.join(f'{loss:.3f}' for loss in losses)}; {parameters / 1e6:.1f} M parameters"
        if row.evaluate:
            figure += f"; tau {evaluated(run, tmp_path / 'row.json', row)['tau_normalization']:g} of its evaluation"
        figure += f"; {time.monotonic() - began:.0f} s"
        holds = (
            len(losses) == STEPS
            and all(math.isfinite(loss) for loss in losses)
            and not any(step["skipped"] for step in steps)
            and not still
        )
    finally:
        record(f"Table {number}, {row.name}: {STEPS} steps on 2 ranks", figure, holds)
        shutil.rmtree(run, ignore_errors=True)  # hundreds of megabytes
        pool(2).run("tests.distributed.training:free_memory")
    assert holds, (losses, still)


def unmoved_weights(table, row, overrides, run) -> tuple[list[str], int]:
    """Trained tensors that are still what the seed gave them, and how many parameters are trained in all."""
    recipe = load_recipe(table.recipe_of(row), overrides)
    manifest = load_manifest(recipe.data.shards)
    before = model_of(recipe, len(manifest.classes), manifest.mean, manifest.std)
    after = newest_checkpoint(run).model()
    trained = {name: value for name, value in before.named_parameters() if not name.startswith("key_encoder")}
    still = [name for name, value in trained.items() if torch.equal(value, after[name])]
    return still, sum(value.numel() for value in trained.values())


def evaluated(run, output, row) -> dict[str, float]:
    """What evaluate.py writes with the row's options."""
    command = [sys.executable, str(EVALUATE), f"--run={run}", f"--output={output}", *row.evaluate]
    environment = {**os.environ, "PYTHONPATH": str(EVALUATE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())
