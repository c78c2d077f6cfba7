"""A method and a backbone are added by new files alone, in the package or outside of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import paco_ds
from paco_ds.checkpoint import newest_checkpoint
from paco_ds.metrics.log import read
from tests.distributed.outside import MODULE, NAME
from tests.recipes import write_tiny_recipe

# All that a new method and a new family of backbones are in the package: three files.
ADDED = {
    "config/methods/sharpened.py": """
from paco_ds.config.methods.base import Method
from paco_ds.config.section import Positive

class SharpenedSettings(Method):
    name = "sharpened"
    loss = "paco_ds.losses.sharpened:make_sharpened"

    sharpness: Positive = 1.0
""",
    "losses/sharpened.py": """
from torch.nn.functional import cross_entropy
from paco_ds.losses.base import Loss, LossOutput

class SharpenedLoss(Loss):
    def __init__(self, sharpness):
        super().__init__()
        self.sharpness = sharpness

    def forward(self, anchors):
        return LossOutput(cross_entropy(self.sharpness * anchors.logits, anchors.labels_B))

def make_sharpened(settings, shared, class_counts, class_names):
    return SharpenedLoss(settings.sharpness)
""",
    "models/families/flat.py": """
from torch import nn
from paco_ds.models.families.base import Family, Network

def _make(settings, sizes):
    size = int(settings.backbone.removeprefix("flat"))
    return Network(nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 8)), 8)

FAMILY = Family(owns=lambda name: name.startswith("flat"), names=lambda: ("flat12",), make=_make)
""",
}
SCRIPT = """
import sys
import torch
from paco_ds.losses import Anchors, make_loss
from paco_ds.models.recogniser import Recogniser
from paco_ds.training.build import Classes, build_model
from tests.recipes import tiny_recipe

recipe = tiny_recipe("loss.method=sharpened", "loss.sharpened.sharpness=3", "model.backbone=flat12")
classes = Classes((4, 3, 2, 1), ("few",) * 4)
model, loss = build_model(recipe, classes), make_loss(recipe.loss, classes.counts)
logits = model(torch.zeros(8, 3, 12, 12, dtype=torch.uint8)).logits
labels = torch.arange(8) % 4
expected = torch.nn.functional.cross_entropy(3 * logits, labels)
assert torch.equal(loss(Anchors(labels, logits)).loss, expected)
print(recipe.resume_identity()["loss.sharpened.sharpness"], model.query_encoder.backbone.feature_dim)
"""


def test_a_method_and_a_backbone_in_the_package_are_new_files_alone(tmp_path: Path) -> None:
    """A copy of the package with three more files: no file of the package is edited. The method's settings have their
    section, the backbone its name."""
    package, tests = Path(paco_ds.__file__).parent, Path(__file__).parents[1]
    shutil.copytree(package, tmp_path / "paco_ds", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tests, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in ADDED.items():
        assert not (package / name).exists()
        (tmp_path / "paco_ds" / name).write_text(text)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["3.0 8"], done.stderr[-3000:]


def test_a_method_and_a_backbone_from_outside_are_trained_on_two_ranks(pool, striped_shards, tmp_path) -> None:
    """One module beside the recipe. Without permission nothing is imported; with it the loss is that of the module, its
    parts are logged, and its settings belong to the identity of the run."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{NAME}.py").write_text(MODULE)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    write_tiny_recipe(recipe, f"data.shards={striped_shards}", "engine.deepspeed=zero.json", "schedule.epochs=1")
    overrides = (f"loss.method={NAME}:Sharpened", "loss.options.sharpness=2.5", f"model.backbone={NAME}:flat_network")
    said = pool(2).run(
        "tests.distributed.outside:train_outside",
        folder=tmp_path / "code",
        recipe=recipe,
        run=run,
        overrides=overrides,
    )
    assert all("is code from outside paco_ds: give --allow-code" in each for each in said)
    steps = [line for line in read(run / "metrics.jsonl") if line["kind"] == "step"]
    assert steps
    assert all(step["parts"] == {"sharpness": 2.5} for step in steps)
    assert newest_checkpoint(run).state["meaning"]["loss.options.sharpness"] == 2.5
