"""torchrun starts the same run as deepspeed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.metrics.log import read
from tests.recipes import write_tiny_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "paco_ds" / "train.py"
LAUNCHERS = {"deepspeed": ("--num_gpus", "2", "--master_port"), "torchrun": ("--nproc-per-node", "2", "--master-port")}
TIMES = {"images_per_second", "data_wait_seconds", "step_seconds", "seconds", "time"}


def test_torchrun_trains_stops_and_resumes_as_deepspeed(striped_shards, tmp_path, record):
    """Two ranks, stopped in mid-epoch: the same log, the same weights, momentum and queue, bit for bit."""
    recipe = tmp_path / "recipe.yaml"
    write_tiny_recipe(recipe, f"data.shards={striped_shards}", f"engine.deepspeed={ROOT / 'ds_configs' / 'zero1.json'}")
    found = {}
    for port, (launcher, options) in enumerate(LAUNCHERS.items(), 29741):
        run = tmp_path / launcher
        command = [
            Path(sys.executable).with_name(launcher),
            *options,
            str(port),
            TRAIN,
            "--config",
            recipe,
            "--output",
            run,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for stop in (["--stop-at-step", "3"], []):
            done = subprocess.run([*map(str, command), *stop], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            assert "stopped after step 3" in done.stdout or not stop
        assert "resumes from the checkpoint of step 3" in done.stdout
        checkpoint = newest_checkpoint(run)
        lines = [line for line in read(run / "metrics.jsonl") if line["kind"] not in ("start", "checkpoint")]
        log = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        found[launcher] = (log, {**checkpoint.model(), **checkpoint.optimizer(), **checkpoint.queue()})
    (log, tensors), (other_log, others) = found.values()
    same = log == other_log and tensors.keys() == others.keys()
    same = same and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    record("torchrun, two ranks, stopped and resumed: log, weights, momentum, queue of deepspeed", "bit-equal", same)
    assert same
