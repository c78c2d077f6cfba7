"""What is said before DeepSpeed starts: its configuration, prerequisites, and the number of ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paco_ds.errors import RecipeError, UserError
from paco_ds.training import engine
from tests.recipes import tiny_recipe

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("zero*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_accepted_and_are_what_their_name_says(path):
    """zeroN.json, with _offload and _autocast where they say so."""
    config = engine.read_deepspeed_config(path)
    zero = config["zero_optimization"]
    offload, autocast = "_offload" * ("offload_optimizer" in zero), "_autocast" * ("torch_autocast" in config)
    assert path.stem == f"zero{zero['stage']}{offload}{autocast}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8}, r"sets 'train_batch_size'; remove it, the recipe decides it by step.micro_batch"),
        ({"gradient_accumulation_steps": 2}, r"'gradient_accumulation_steps'.*step.micro_batches"),
        ({"gradient_clipping": 1.0}, r"'gradient_clipping'.*optimizer.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, r"'optimizer'.*the optimizer section"),
        ({"fp16": {"enabled": True}}, r"'fp16' block.*torch_autocast with bfloat16"),
        ({"bf16": {"enabled": True}}, r"'bf16' block.*breaks BatchNorm"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, r"torch_autocast.dtype must be 'bfloat16'"),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            r"'offload_optimizer'.*stage to 1, 2 or 3",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, r"nvme.*device to 'cpu'"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, r"'offload_param'.*remove it"),
    ],
)
def test_a_configuration_that_decides_what_the_recipe_decides_is_refused(tmp_path, config, message):
    """The file and the setting to use instead are named."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=rf"mine.json[\s\S]*{message}"):
        engine.read_deepspeed_config(path)


def test_a_missing_or_broken_configuration_is_named(tmp_path):
    """With where others lie."""
    with pytest.raises(RecipeError, match=r"no file .*absent.json; ds_configs/ holds zero0.json"):
        engine.read_deepspeed_config(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecipeError, match=r"broken.json is not JSON"):
        engine.read_deepspeed_config(tmp_path / "broken.json")


def test_a_job_of_other_size_than_expected_ends(monkeypatch):
    """DeepSpeed only warns of a hostfile it cannot read, and trains on one host."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"has 1 ranks, --expect-ranks says 8.*--hostfile"):
        engine.start(tiny_recipe().step, threads=1, expect_ranks=8)


def test_ranks_that_do_not_divide_the_micro_batches_end_before_they_wait_for_each_other(monkeypatch):
    """No process group is joined, so nothing hangs."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match=r"3 ranks cannot share step.micro_batches = 4.*1, 2, 4.*micro_batches=6"):
        engine.start(tiny_recipe().step, threads=1)


@pytest.mark.parametrize("script", ["paco_ds/train.py", "paco_ds/evaluate.py", "tools/build_shards.py"])
def test_commands_find_their_own_checkout_from_anywhere(script, tmp_path):
    """The launcher puts the script's own folder first on the path; the package beside it is used all the same."""
    checkout = tmp_path / "checkout"
    for folder in ("paco_ds", "tools"):
        shutil.copytree(ROOT / folder, checkout / folder)
    with (checkout / "paco_ds" / "__init__.py").open("a") as package:
        package.write("print('this checkout')\n")
    command = [sys.executable, str(checkout / script), "--help"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "this checkout" in run.stdout
    assert "usage:" in run.stdout


def test_a_start_does_not_load_torchs_compiler():
    """Nor torchvision nor matplotlib: seconds of a core in every rank, where the recipe needs none of them."""
    program = """
import sys, torch
from paco_ds.training import engine, optimizer, trainer
engine.import_muon_uncompiled()
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
sgd = optimizer.GuardedSGD([weight], 0.25, clip_norm=None, whole=True)
sgd.step()
assert weight.tolist() == [0.75, 0.75]
print([name for name in ("torch._inductor.compile_fx", "torch._dynamo", "torchvision", "matplotlib")
       if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
