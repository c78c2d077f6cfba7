"""Files in the layout of the authors' code become runs that answer as a plain network does, and go on."""

import json

import pytest
import torch
import torchvision
from torch import nn

import paco_ds
from paco_ds.checkpoint import newest_checkpoint
from paco_ds.errors import RecipeError
from paco_ds.training.import_checkpoint import main
from paco_ds.training.imported import import_published
from tests.recipes import write_tiny_recipe
from tests.training.drawn import SmallBlock, drawn

CLASSES, DIM, QUEUE = 4, 8, 80


def encoder(kind):
    """torchvision's ResNet-18 whose `fc` is PaCo's or GPaCo's projection."""
    network = torchvision.models.resnet18(num_classes=DIM)
    inner = [nn.BatchNorm1d(512), nn.ReLU()] if kind == "paco" else [nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    network.fc = nn.Sequential(nn.Linear(512, 512), *inner, network.fc)
    return drawn(network)


def published(kind, folder):
    """(file as the authors' code saves it, its query encoder, its centers)."""
    torch.manual_seed(0)
    query, linear = encoder(kind), drawn(nn.Linear(512, CLASSES))
    parts = {"encoder_q": query, "linear": linear}
    if kind == "paco":
        parts |= {"encoder_k": encoder(kind), "linear_k": drawn(nn.Linear(512, CLASSES))}
    state = {f"module.{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    state |= {
        "module.queue": nn.functional.normalize(torch.randn(QUEUE, DIM), dim=1),
        "module.queue_l": torch.randint(CLASSES, (QUEUE,)),
        "module.queue_ptr": torch.tensor([24]),
    }
    optimizer = torch.optim.SGD(query.parameters(), 0.1, momentum=0.9).state_dict()
    path = folder / "moco_ckpt.pth.tar"
    torch.save({"epoch": 7, "arch": "resnet18", "acc": 55.5, "state_dict": state, "optimizer": optimizer}, path)
    return path, query, linear, state


def recipe_of(kind, shards, folder, *more):
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    own = () if kind == "paco" else ("key_encoder=none", "model.projection=three_layer")
    settings = (f"data.shards={shards}", "engine.deepspeed=zero.json", "model.backbone=resnet18", *own, *more)
    write_tiny_recipe(folder / "tiny.yaml", *settings)
    return folder / "tiny.yaml"


@pytest.mark.parametrize("kind", ["paco", "gpaco"])
def test_a_published_file_becomes_a_run_that_answers_and_goes_on(kind, striped_shards, pool, tmp_path, capsys):
    """Logits of the plain network to 1e-5; its queue, key encoder and projection are taken over; training continues."""
    path, query, linear, state = published(kind, tmp_path)
    recipe, run = recipe_of(kind, striped_shards, tmp_path), tmp_path / "run"
    assert main([str(path), "--config", str(recipe), "--output", str(run)]) == 0
    said = capsys.readouterr().out
    assert "trained for 7 epochs" in said
    assert ("linear_k.weight" in said) == (kind == "paco")

    model = paco_ds.load(run)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        output = model.recogniser(images)
        normalised = model.recogniser.normalize(images)
        keys = nn.functional.normalize(query(normalised), dim=1)
        query.fc = nn.Identity()
        expected = linear(query(normalised))
    torch.testing.assert_close(output.mean_logits(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.queries, keys, rtol=1e-5, atol=1e-5)
    checkpoint = newest_checkpoint(run)
    assert torch.equal(checkpoint.queue()["keys"], state["module.queue"])
    assert int(checkpoint.queue()["count"]) % QUEUE == 24
    assert checkpoint.state["imported"]["epoch"] == 7
    pool(1).run("tests.distributed.training:train", recipe=recipe, run=run, stop_at_step=2)
    assert newest_checkpoint(run).step == 2
    with pytest.raises(RecipeError, match="has checkpoints already"):
        import_published(path, recipe, run)


class SmallResNet(nn.Module):
    """Of the same file: conv1, bn1, layer1 to layer3, fc; two blocks a stage are 14 layers."""

    def __init__(self, blocks=2):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (channels, out) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = SmallBlock(channels, out, 1 if stage == 1 else 2)
            made = nn.Sequential(first, *(SmallBlock(out, out, 1) for _ in range(blocks - 1)))
            self.add_module(f"layer{stage}", made)
        self.fc = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, DIM))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def test_a_published_file_of_a_small_resnet_has_its_blocks_in_their_place(striped_shards, tmp_path):
    """The authors' CIFAR networks have stages, ours one row of blocks."""
    torch.manual_seed(0)
    query, linear = drawn(SmallResNet()), drawn(nn.Linear(64, CLASSES))
    parts = {"encoder_q": query, "linear": linear, "encoder_k": drawn(SmallResNet())}
    state = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    state |= {"queue": torch.randn(QUEUE, DIM), "queue_l": torch.zeros(QUEUE, dtype=torch.long)}
    torch.save({"state_dict": state}, tmp_path / "small.pth.tar")
    recipe = recipe_of("paco", striped_shards, tmp_path, "model.backbone=cifar_resnet14", "model.width=16")
    import_published(tmp_path / "small.pth.tar", recipe, tmp_path / "run")
    model = paco_ds.load(tmp_path / "run").recogniser
    images = torch.randint(256, (3, 3, 12, 12), dtype=torch.uint8)
    with torch.no_grad():
        output = model(images)
        keys = nn.functional.normalize(query(model.normalize(images)), dim=1)
        query.fc = nn.Identity()
        expected = linear(query(model.normalize(images)))
    torch.testing.assert_close(output.mean_logits(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.queries, keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "as_if", "settings", "message"),
    [
        ("gpaco", "paco", (), "key encoder, as GPaCo's: set key_encoder=null"),
        ("paco", "gpaco", (), "key encoder, as PaCo's: the recipe needs one"),
        ("paco", "paco", ("model.projection=three_layer",), "PaCo's is two_layer, GPaCo's three_layer"),
        ("paco", "paco", ("model.backbone=resnet34",), "model.backbone is resnet34"),
        ("paco", "paco", ("queue.length=96",), "a queue of 80 keys: set queue.length=80, not 96"),
    ],
)
def test_a_recipe_of_another_model_is_told_the_setting(striped_shards, tmp_path, kind, as_if, settings, message):
    """And nothing is written."""
    path, *_ = published(kind, tmp_path)
    recipe = recipe_of(as_if, striped_shards, tmp_path, *settings)
    with pytest.raises(RecipeError, match=message):
        import_published(path, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_such_file_is_refused(striped_shards, tmp_path):
    """Other weights, other classes, code, nothing."""
    recipe = recipe_of("paco", striped_shards, tmp_path)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "backbone.pth")
    torch.save({"state_dict": print}, tmp_path / "code.pth")
    for name, message in (
        ("backbone.pth", "does not fit the recipe"),
        ("code.pth", "holds no weights that can be read safely"),
        ("absent.pth", "there is no such file"),
    ):
        with pytest.raises(RecipeError, match=message):
            import_published(tmp_path / name, recipe, tmp_path / "run")
    path, *_, state = published("paco", tmp_path)
    state["module.linear.weight"], state["module.linear.bias"] = torch.randn(9, 512), torch.randn(9)
    torch.save({"state_dict": state}, path)
    with pytest.raises(RecipeError, match="has 9 classes, the shards 4"):
        import_published(path, recipe, tmp_path / "run")
