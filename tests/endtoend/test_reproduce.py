"""A table as a user makes it: rows trained by the launcher, a second stage among them, kept, and drawn elsewhere."""

import json

import torch

from paco_ds.checkpoint import newest_checkpoint
from tests.commands import run_command
from tests.recipes import write_tiny_recipe

TABLE = """
title: Two rows
recipe: tiny.yaml
rows:
  - method: SupCon, first stage
    set: [loss.method=supcon]
    drawn: false
  - method: SupCon, two stages
    after: SupCon, first stage
    set: [loss.method=cross_entropy, model.trained=centers]
  - method: Balanced Softmax
    set: [loss.method=balanced_softmax]
"""


def test_a_table_is_trained_kept_and_drawn_elsewhere(striped_shards, tmp_path):
    """Two rows at a time; the classifier of the second stage stands on the backbone of the first."""
    (tmp_path / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    settings = (f"data.shards={striped_shards}", "engine.deepspeed=zero1.json", "evaluation.checkpoint=last")
    write_tiny_recipe(tmp_path / "tiny.yaml", *settings)
    (tmp_path / "table.yaml").write_text(TABLE)

    def reproduce(output, *more):
        options = ("--table", tmp_path / "table.yaml", "--seeds", 1, "--ranks", 1, "--keep", tmp_path / "kept.jsonl")
        done = run_command("paco_ds.paper.reproduce", *options, "--output", tmp_path / output, *more, check=False)
        assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in tmp_path.glob("*/*/run.log"))
        return done.stdout

    assert "SupCon, two stages, seed 1: All" in reproduce("runs", "--jobs", "2")
    first, second = (
        newest_checkpoint(tmp_path / "runs" / f"supcon--{name}-seed1").model() for name in ("first-stage", "two-stages")
    )
    backbone = [name for name in second if name.startswith("query_encoder.backbone.")]
    assert backbone
    assert all(torch.equal(first[name], second[name]) for name in backbone)
    assert not torch.equal(first["centers.weight"], second["centers.weight"])
    kept = [json.loads(line)["row"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == ["balanced-softmax-seed1", "supcon--two-stages-seed1"]
    assert "Balanced Softmax" in reproduce("elsewhere", "--draw-only")
    assert not list((tmp_path / "elsewhere").glob("*-seed1"))
