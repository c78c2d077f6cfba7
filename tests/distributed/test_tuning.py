"""Parts of a ViT are trained on two ranks as on one at the ZeRO stages; LIFT's run begins, resumes and is exported."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.evaluation.exporter import answers, export
from paco_ds.evaluation.predictor import load
from tests.distributed.test_step import FLOAT32, check
from tests.matrix import matrix
from tests.models.tiny_networks import of
from tests.recipes import model_of, tiny_recipe, write_tiny_recipe

STEP = "tests.distributed.runs:run_steps"
SMALL = ("step.micro_batch=4", "step.micro_batches=2", "optimizer.lr=0.05", "queue.length=16")
METHODS = {
    "paco": ("key_encoder.batch_norm=auto", "model.projection=three_layer"),
    "lift": ("loss.method=logit_adjustment", "model.centers=cosine"),
}
PARTS = {
    "norms": ("norm",),
    "biases": ("bias",),
    "lora": ("lora_down", "lora_up"),
    "adaptformer": ("adapter",),
    "centers": (),
}


def steps(pool, world_size, stage, *overrides):
    return pool(world_size).run(STEP, stage=stage, steps=3, overrides=(*SMALL, *overrides))[0]


@pytest.mark.parametrize(
    ("trained", "method", "stage"),
    matrix(
        PARTS,
        METHODS,
        (0, 1, 3),
        each_change=[
            ("lora", "paco", 3),
            ("adaptformer", "lift", 1),
            ("norms", "lift", 3),
            ("biases", "paco", 0),
            ("centers", "paco", 3),
        ],
    ),
)
def test_two_ranks_train_the_part_and_nothing_else(pool, trained, method, stage):
    """Losses to 1e-5 and updates to 1e-3; frozen weights of both encoders are bit-equal to what they were."""
    settings = (*of("vit"), *METHODS[method], f"model.trained={trained}", "model.start_from=somewhere")
    two = steps(pool, 2, stage, *settings)
    check(two, steps(pool, 1, 0, *settings), FLOAT32)
    changed = {name for name, before in two.before.items() if not torch.equal(two.after[name], before)}
    in_backbones = {name for name in changed if ".backbone." in name}
    assert all(any(part in name for part in PARTS[trained]) for name in in_backbones)
    assert bool(in_backbones) == bool(PARTS[trained])
    assert "centers.weight" in changed
    if method == "paco":  # keys follow the same parts, and the projection
        followed = {name.replace("query_encoder", "key_encoder") for name in changed if name.startswith("query")}
        assert {name for name in changed if name.startswith("key_encoder")} <= followed
        assert any(name.startswith("key_encoder") for name in changed)


def test_cutmix_is_the_same_on_two_ranks(pool):
    """And is not the step without."""
    settings = ("loss.method=balanced_softmax", "step.cutmix=1")
    one = steps(pool, 1, 0, *settings)
    check(steps(pool, 2, 1, *settings), one, FLOAT32)
    assert one.losses != steps(pool, 1, 0, settings[0]).losses


@pytest.mark.parametrize(
    ("trained", "stage"), [("lora", 1), pytest.param("lora", 3, marks=pytest.mark.soak), ("adaptformer", 3)]
)
def test_experts_of_a_vit_have_parts_of_their_own(pool, trained, stage):
    """Of two experts each learns its own, on two ranks as on one; what is frozen stays."""
    parts = (*of("vit"), f"model.trained={trained}", "model.start_from=somewhere")
    settings = (*parts, "loss.method=ride", "model.experts=2", "model.centers=cosine")
    two = steps(pool, 2, stage, *settings)
    check(two, steps(pool, 1, 0, *settings), FLOAT32)
    changed = {name for name, before in two.before.items() if not torch.equal(two.after[name], before)}
    in_backbone = {name for name in changed if ".backbone." in name}
    assert all(any(part in name for part in PARTS[trained]) for name in in_backbone)
    assert all(any(f".experts.{e}." in name for name in in_backbone) for e in range(2))


@pytest.mark.soak
@pytest.mark.parametrize("trained", ["lora", "adaptformer"])
def test_a_compiled_network_trains_its_part(pool, trained):
    """As it does uncompiled, on two ranks."""
    settings = (*of("vit"), *METHODS["paco"], f"model.trained={trained}", "model.start_from=somewhere")
    check(steps(pool, 2, 1, *settings, "engine.compile=true"), steps(pool, 2, 1, *settings), FLOAT32)


LIFT = (
    "loss.method=logit_adjustment",
    "model.centers=cosine",
    "model.centers_scale=25",
    "model.trained=adaptformer",
    "model.adaptformer={width: 4, scale: 1, learned_scale: true}",
    "model.centers_from=class_means",
    'views.evaluation={"name": "eval", "size": 32, "resize": 40, "crops": "five"}',
)


@pytest.fixture
def lift(striped_shards, tmp_path):
    """LIFT's recipe for a tiny ViT whose weights are in a file."""
    network = model_of(tiny_recipe(*of("vit"), "seed=7"), 4).query_encoder.backbone.network
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    where = (f"data.shards={striped_shards}", "engine.deepspeed=zero.json", "model.start_from=weights.safetensors")
    small = ("step.micro_batch=4", "step.micro_batches=2", "schedule.epochs=1", "evaluation.split=null")
    write_tiny_recipe(tmp_path / "tiny.yaml", *of("vit"), *where, *small, *LIFT)
    return tmp_path


def test_class_means_are_the_same_on_any_number_of_ranks(pool, lift):
    """To 1e-6; five crops of the evaluation's view."""
    one, two = (pool(n).run("tests.distributed.evaluating:means", recipe=lift / "tiny.yaml")[0] for n in (1, 2))
    assert one.shape == (1, 4, 16)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
    assert F.normalize(one[0], dim=1).T.corrcoef().isfinite().all()


def test_lifts_run_starts_resumes_and_is_exported(pool, lift, tmp_path):
    """Two ranks at stage 3: resumed bit-equal, frozen weights are the file's, and a program of it answers the same."""
    train, whole, halves = "tests.distributed.training:train", lift / "whole", lift / "halves"
    pool(2).run(train, recipe=lift / "tiny.yaml", run=whole)
    pool(2).run(train, recipe=lift / "tiny.yaml", run=halves, stop_at_step=2)
    pool(2).run(train, recipe=lift / "tiny.yaml", run=halves)
    first, second = (newest_checkpoint(run).model() for run in (whole, halves))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    file = model_of(tiny_recipe(*of("vit"), "seed=7"), 4).query_encoder.backbone.network.state_dict()
    assert all(torch.equal(first[f"query_encoder.backbone.network.{name}"], t) for name, t in file.items())
    folder = newest_checkpoint(whole).path
    (frozen,) = folder.parent.glob("frozen-*")
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 0.6 * frozen.stat().st_size
    assert not set(load_file(frozen)) & set(load_file(folder / "model.safetensors"))
    assert (json.loads((whole / "started_from.json").read_text()))["not in the file, drawn from the seed"] == []
    model = load(whole)
    export(model, "torch-export", tmp_path / "lift.pt2")  # checked against the model before it is kept
    images = torch.randint(256, (3, 3, 160, 32), dtype=torch.uint8)
    with torch.no_grad():
        five = torch.stack([answers(model)(crop) for crop in images.split(32, dim=2)]).mean(0)
        torch.testing.assert_close(model.recogniser(images).mean_logits(), five)
