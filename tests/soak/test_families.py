"""Each family of timm trains PaCo, GPaCo, Balanced Softmax and LIFT's way on two ranks; resumed there and elsewhere."""

import json

import pytest
import torch
from safetensors.torch import save_file

from paco_ds.checkpoint import newest_checkpoint, read_checkpoint
from tests.models.tiny_networks import TINY, of
from tests.recipes import model_of, tiny_recipe, write_tiny_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
TRAIN = "tests.distributed.training:train"
SMALL = ("step.micro_batch=4", "step.micro_batches=4", "schedule.epochs=1", "queue.length=16", "optimizer.lr=0.005")
WITH_BOTTLENECKS = ("vit", "deit3", "dinov2")
METHODS = {
    "paco": ("key_encoder.batch_norm=auto", "model.projection=three_layer"),
    "gpaco": ("key_encoder=none", "model.projection=three_layer"),
    "balanced": ("loss.method=balanced_softmax",),
    "lift": ("loss.method=logit_adjustment", "model.centers=cosine", "model.centers_from=class_means"),
}
BOUND = 5e-3  # of the update of all weights in two steps, on another number of ranks at another stage


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", TINY)
def test_it_trains_and_resumes(pool, record, striped_shards, tmp_path, family, method, stage):
    """From weights of a file; bit-equal on two ranks, within the bound on one without ZeRO. Where a network takes no
    bottlenecks, LIFT's way tunes its norms."""
    network = model_of(tiny_recipe(*of(family), "seed=7"), 4).query_encoder.backbone.network
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    for name, each in (("there", stage), ("elsewhere", 0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"zero_optimization": {"stage": each}}))
    trained = "all" if method != "lift" else "adaptformer" if family in WITH_BOTTLENECKS else "norms"
    start = ("model.start_from=w.safetensors", f"model.trained={trained}", "model.adaptformer={width: 4}")
    where = (f"data.shards={striped_shards}", "engine.deepspeed=there.json", "checkpoint.every_steps=2")
    write_tiny_recipe(tmp_path / "r.yaml", *of(family), *SMALL, *METHODS[method], *start, *where)

    def run(name, ranks=2, stop=4, **more):
        pool(ranks).run(TRAIN, recipe=tmp_path / "r.yaml", run=tmp_path / name, stop_at_step=stop, **more)
        return newest_checkpoint(tmp_path / name)

    straight = run("straight")
    half = read_checkpoint(straight.path.with_name("step-00000002")).model()
    run("same", stop=2)
    same, expected = run("same"), straight.model()
    different = [n for n, t in same.model().items() if not torch.equal(t, expected[n])]
    different += [n for n, t in same.optimizer().items() if not torch.equal(t, straight.optimizer()[n])]
    run("other", stop=2)
    other = run("other", ranks=1, overrides=(f"engine.deepspeed={tmp_path / 'elsewhere.json'}",)).model()
    weights = [name for name, t in expected.items() if t.is_floating_point() and "running" not in name]
    moved, off = (
        torch.cat([(a[n] - b[n]).flatten().double() for n in weights]).norm()
        for a, b in ((expected, half), (other, expected))
    )
    holds = not different and moved > 0 and off <= BOUND * moved
    said = f"{len(different)} tensors differ on the same ranks, {off / moved:.1e} of an update elsewhere"
    record(f"{family}, {method}, stage {stage}: resumed", said, bool(holds))
    assert different == []
    assert moved > 0
    assert off <= BOUND * moved
