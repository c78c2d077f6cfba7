"""What is said before DeepSpeed starts: its configuration, prerequisites, and the number of ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import RecipeError, UserError
from paco_ds.models.execution import Hardware
from paco_ds.training import engine
from tests.recipes import tiny_recipe

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("zero*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_accepted_and_are_what_their_name_says(path):
    """zeroN.json, with _offload where they say so; precision is the recipe's."""
    config = engine.read_deepspeed_config(path)
    zero = config["zero_optimization"]
    assert path.stem == f"zero{zero['stage']}{'_offload' * ('offload_optimizer' in zero)}"
    assert config.keys() == {"zero_optimization"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8}, r"sets 'train_batch_size'; remove it, the recipe decides it by step.micro_batch"),
        ({"gradient_accumulation_steps": 2}, r"'gradient_accumulation_steps'.*step.micro_batches"),
        ({"gradient_clipping": 1.0}, r"'gradient_clipping'.*optimizer.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, r"'optimizer'.*the optimizer section"),
        ({"fp16": {"enabled": True}}, r"'fp16' block.*engine.precision=bfloat16"),
        ({"bf16": {"enabled": True}}, r"'bf16' block.*breaks BatchNorm"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, r"torch_autocast.dtype must be 'bfloat16'"),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            r"'offload_optimizer'.*stage to 1, 2 or 3",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, r"nvme.*device to 'cpu'"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, r"'offload_param'.*remove it"),
        ({"zero_optimization": True}, r"zero_optimization is True, where an object in braces belongs"),
        ({"zero_optimization": None}, r"zero_optimization is None, where"),
        ({"torch_autocast": True}, r"torch_autocast is True, where"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, r"offload_optimizer is 'cpu', where"),
        ({"zero_optimization": {"stage": "two"}}, r"zero_optimization\.stage is 'two'; set it to 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 7}}, r"zero_optimization\.stage is 7; set"),
        ({"zero_optimisation": {"stage": 3}}, r"'zero_optimisation', .* did you mean 'zero_optimization'\?"),
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
    with pytest.raises(RecipeError, match=r"no file .*absent.json; give auto, or zero0 to zero3"):
        engine.read_deepspeed_config(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecipeError, match=r"broken.json is not JSON"):
        engine.read_deepspeed_config(tmp_path / "broken.json")


ONE_RANK = Ranks(0, 1, 0, torch.device("cpu"))
H200 = Hardware("cuda", (9, 0), 141 * 10**9)


@pytest.fixture
def gpu(monkeypatch):
    """The rank's device passes for an H200."""
    monkeypatch.setattr(Hardware, "of", lambda device: H200)


def test_on_cpu_nothing_is_chosen_that_a_recipe_did_not_have():
    """float32 at stage 1, as recipes had it before there was a choice; the file is there."""
    chosen = engine.choose_on_ranks(tiny_recipe("engine.deepspeed=auto").engine, ONE_RANK)
    assert Path(chosen.settings.deepspeed) == ROOT / "ds_configs" / "zero1.json"
    assert (chosen.settings.precision, chosen.settings.channels_last) == ("float32", False)
    assert chosen.why_stage == "auto: ranks on CPU share the memory of their host"
    assert (chosen.changed_precision, chosen.notes) == (None, ())


def test_on_cuda_the_stage_is_that_of_the_plan(gpu):
    """Which is asked with the precision that was chosen and the memory of the smallest GPU; a file is not planned."""
    asked = []

    def plan(settings, memory):
        asked.append((settings.precision, memory))
        return 0, "auto: 3 GiB planned of 131 GiB"

    chosen = engine.choose_on_ranks(tiny_recipe("engine.deepspeed=auto").engine, ONE_RANK, plan_stage=plan)
    assert asked == [("bfloat16", H200.memory)]
    assert Path(chosen.settings.deepspeed) == ROOT / "ds_configs" / "zero0.json"
    assert chosen.why_stage == "auto: 3 GiB planned of 131 GiB"
    given = tiny_recipe(f"engine.deepspeed={ROOT / 'ds_configs' / 'zero2.json'}").engine
    assert engine.choose_on_ranks(given, ONE_RANK, plan_stage=plan).why_stage == "zero2.json"
    assert len(asked) == 1


def test_a_resumed_run_keeps_its_precision_where_the_recipe_leaves_it_to_the_hardware(gpu):
    """A float32 run of 0.13 or of a CPU stays float32 on a GPU, and one in bfloat16 stays so; it is told."""
    auto = tiny_recipe("engine.deepspeed=auto").engine
    stays = engine.choose_on_ranks(auto, ONE_RANK, trained_with=False)
    assert (stays.settings.precision, stays.changed_precision) == ("float32", None)
    assert stays.notes == (
        "precision stays float32, in which the run was trained; a new run would have bfloat16 here, and "
        "--set engine.precision=bfloat16 changes this one",
    )
    same = engine.choose_on_ranks(auto, ONE_RANK, trained_with=True)
    assert (same.settings.precision, same.changed_precision, same.notes) == ("bfloat16", None, ())


def test_a_resumed_run_changes_its_precision_where_the_recipe_says_so():
    """Which is announced as a changed setting."""
    exact = tiny_recipe("engine.deepspeed=auto", "engine.precision=float32").engine
    changed = engine.choose_on_ranks(exact, ONE_RANK, trained_with=True)
    assert (changed.settings.precision, changed.changed_precision) == ("float32", ("bfloat16", "float32"))
    assert changed.notes == ()


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_of_a_users_deepspeed_json_decides_where_the_recipe_does_not(tmp_path, enabled):
    """As in earlier versions; a precision in the recipe stands over it."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"torch_autocast": {"enabled": enabled, "dtype": "bfloat16"}}))
    settings = tiny_recipe(f"engine.deepspeed={path}").engine
    said = "bfloat16" if enabled else "float32"
    assert engine.choose_on_ranks(settings, ONE_RANK, trained_with=not enabled).settings.precision == said
    named = tiny_recipe(f"engine.deepspeed={path}", "engine.precision=float32").engine
    assert engine.choose_on_ranks(named, ONE_RANK).settings.precision == "float32"


def test_the_plan_is_made_on_the_first_rank_and_told_to_the_others(gpu, monkeypatch):
    """What it raises, too."""
    auto = tiny_recipe("engine.deepspeed=auto").engine

    def others(said):
        monkeypatch.setattr(Ranks, "gather_objects", lambda ranks, value: [said if value is None else value] * 2)
        return Ranks(1, 2, 1, torch.device("cpu"))

    def never(*given):
        raise AssertionError("planned on another rank than the first")

    chosen = engine.choose_on_ranks(auto, others((1, "auto: told")), plan_stage=never)
    assert (Path(chosen.settings.deepspeed).name, chosen.why_stage) == ("zero1.json", "auto: told")

    def missing(*given):
        raise UserError("no manifest")

    for ranks, plan in ((ONE_RANK, missing), (others(UserError("no manifest")), never)):
        with pytest.raises(UserError, match="no manifest"):
            engine.choose_on_ranks(auto, ranks, plan_stage=plan)


@pytest.mark.parametrize("name", ["lars", "muon"])
def test_optimizers_of_whole_weights_train_at_stage_0(gpu, name):
    """Which `auto` chooses for them, whatever the plan would; another stage is refused with what to set."""
    whole = tiny_recipe(f"optimizer.name={name}", "engine.deepspeed=auto")
    chosen = engine.choose_on_ranks(whole.engine, ONE_RANK, plan_stage=lambda *_: (1, ""), optimizer=whole.optimizer)
    assert Path(chosen.settings.deepspeed) == ROOT / "ds_configs" / "zero0.json"
    assert chosen.why_stage == f"auto: {name} looks at whole weights"
    given = tiny_recipe(f"engine.deepspeed={ROOT / 'ds_configs' / 'zero2.json'}").engine
    with pytest.raises(RecipeError, match=rf"{name} looks at whole weights, which ZeRO stage 2 parts: set .*zero0"):
        engine.choose_on_ranks(given, ONE_RANK, optimizer=whole.optimizer)


def test_graphs_on_a_cpu_are_told_to_be_none():
    """Compiled all the same."""
    chosen = engine.choose_on_ranks(
        tiny_recipe("engine.deepspeed=auto", "engine.compile=reduce-overhead").engine, ONE_RANK
    )
    assert chosen.notes == ("engine.compile=reduce-overhead needs CUDA: the encoders are compiled in the default mode",)


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
from paco_ds.training import engine, lars_muon, skipping_optimizers, trainer
engine.import_muon_uncompiled()
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
for kind in (skipping_optimizers.GuardedSGD, skipping_optimizers.GuardedAdamW):
    kind([weight], 0.25, clip_norm=None, whole=True, weight_decay=0).step()
assert weight.tolist() == [0.5, 0.5]
print([name for name in ("torch._inductor.compile_fx", "torch._dynamo", "torchvision", "matplotlib")
       if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
