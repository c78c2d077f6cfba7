"""Files in the layouts of RIDE, MoCo, timm and torchvision become runs with the logits of their own networks."""

import json
import sys
import types

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import paco_ds
from paco_ds.checkpoint import newest_checkpoint
from paco_ds.errors import RecipeError
from paco_ds.training.import_checkpoint import main
from paco_ds.training.imported import import_published
from tests.recipes import write_tiny_recipe
from tests.training.drawn import SmallBlock, drawn

CLASSES, EXPERTS = 4, 3


def recipe_of(shards, folder, *settings):
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    write_tiny_recipe(folder / "tiny.yaml", f"data.shards={shards}", "engine.deepspeed=zero.json", *settings)
    return folder / "tiny.yaml"


def answer(run, size=12):
    """(images as the network sees them, logits of the run)."""
    model = paco_ds.load(run).recogniser
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        return model.normalize(images), model(images).mean_logits()


class NormedLinear(nn.Module):
    """Of RIDE's authors: cosine centers, [F, C]."""

    def __init__(self, features, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features, classes))

    def forward(self, x):
        return F.normalize(x, dim=1).mm(F.normalize(self.weight, dim=0))


class RideSmall(nn.Module):
    """`ride_resnet_cifar.ResNet_s` with reduced dimension, one block a stage; with the routers of `ea_resnet_cifar`."""

    def __init__(self, cosine=True, routers=False):
        super().__init__()
        head = NormedLinear if cosine else nn.Linear
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(SmallBlock(16, 16, 1))
        self.layer2s = nn.ModuleList(nn.Sequential(SmallBlock(16, 24, 2)) for _ in range(EXPERTS))
        self.layer3s = nn.ModuleList(nn.Sequential(SmallBlock(24, 48, 2)) for _ in range(EXPERTS))
        self.linears = nn.ModuleList(head(48, CLASSES) for _ in range(EXPERTS))
        self.s = 30 if cosine else 1
        if routers:
            self.expert_help_pred_hidden_fcs = nn.ModuleList(nn.Linear(48, 16) for _ in range(EXPERTS - 1))
            self.expert_help_pred_fc = nn.Linear(16 + CLASSES, 1)

    def expert(self, shared, e):
        feature = self.layer3s[e](self.layer2s[e](shared)).mean((2, 3))
        return feature, self.linears[e](feature) * self.s

    def shared(self, x):
        return self.layer1(self.bn1(self.conv1(x)).relu())

    def forward(self, x):
        shared = self.shared(x)
        return torch.stack([self.expert(shared, e)[1] for e in range(EXPERTS)]).mean(0)

    def asked_in_turn(self, x):
        """Image by image, as EAModel at test time."""
        said: list = []
        for image in x.split(1):
            shared, total = self.shared(image), 0
            for e in range(EXPERTS):
                feature, logits = self.expert(shared, e)
                total, used = total + logits, e + 1
                if e + 1 == EXPERTS:
                    break
                unit = feature / feature.norm(dim=1, keepdim=True)
                hidden = self.expert_help_pred_hidden_fcs[e](unit).relu()
                top = torch.topk(total / used, k=CLASSES, dim=1)[0]
                if torch.sigmoid(self.expert_help_pred_fc(torch.cat((top, hidden), 1))) <= 0.5:
                    break
            said.append(total / used)
        return torch.cat(said)


class RideLarge(nn.Module):
    """`RIDEResNet.ResNet` of BasicBlocks and full dimension, the layers of ResNet-18."""

    def __init__(self):
        super().__init__()
        of = [torchvision.models.resnet18() for _ in range(EXPERTS)]
        for name in ("conv1", "bn1", "maxpool", "layer1", "layer2"):
            self.add_module(name, getattr(of[0], name))
        self.layer3s = nn.ModuleList(each.layer3 for each in of)
        self.layer4s = nn.ModuleList(each.layer4 for each in of)
        self.linears = nn.ModuleList(nn.Linear(512, CLASSES) for _ in range(EXPERTS))

    def forward(self, x):
        for name in ("conv1", "bn1"):
            x = self.get_submodule(name)(x)
        for name in ("maxpool", "layer1", "layer2"):
            x = self.get_submodule(name)(x.relu())
        of = [self.linears[e](self.layer4s[e](self.layer3s[e](x)).mean((2, 3))) for e in range(EXPERTS)]
        return torch.stack(of).mean(0)


def save_ride(network, path, prefix="module."):
    """As `base_trainer._save_checkpoint`: with the settings as an object of the authors' module `parse_config`."""
    module = types.ModuleType("parse_config")
    config_parser = type("ConfigParser", (), {"__module__": "parse_config"})
    vars(module)["ConfigParser"] = config_parser
    config = config_parser()
    vars(config).update(_config={"arch": {"type": "ResNet32Model"}}, _save_dir=path.parent)
    state = {f"{prefix}backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    sys.modules["parse_config"] = module
    try:
        torch.save({"arch": "ResNet32Model", "epoch": 200, "state_dict": state, "config": config}, path)
    finally:
        del sys.modules["parse_config"]


RIDE = ("model.experts=3", "model.expert_width=reduced", "model.width=16", "loss.method=cross_entropy")


@pytest.mark.parametrize("kind", ["cosine", "linear", "large"])
def test_rides_experts_answer_as_the_authors_network(kind, striped_shards, tmp_path):
    """Experts, their classifiers and scale; with and without DistributedDataParallel's prefix."""
    torch.manual_seed(0)
    network = drawn(RideLarge() if kind == "large" else RideSmall(kind == "cosine"))
    save_ride(network, tmp_path / "model_best.pth", "module." if kind == "cosine" else "")
    centers = f"model.centers={'cosine' if kind == 'cosine' else 'linear'}"
    more = ("model.backbone=resnet18", "model.expert_width=full") if kind == "large" else ()
    recipe = recipe_of(striped_shards, tmp_path, *RIDE, centers, *more)
    done = import_published(tmp_path / "model_best.pth", recipe, tmp_path / "run")
    assert (done.fresh, done.unused, done.published.epoch) == ([], [], 200)
    images, logits = answer(tmp_path / "run", 64 if kind == "large" else 12)
    torch.testing.assert_close(logits, network(images).detach(), rtol=1e-5, atol=1e-5)


def test_rides_routers_ask_the_same_experts(striped_shards, pool, tmp_path):
    """Of a file of the second stage; without routers in the recipe all experts answer. Training goes on."""
    torch.manual_seed(2)
    network = drawn(RideSmall(routers=True))
    save_ride(network, tmp_path / "ea.pth")
    routers = ("model.centers=cosine", "loss.method=routing", "model.trained=routers", "model.start_from=imported")
    recipe = recipe_of(striped_shards, tmp_path, *RIDE, *routers)
    import_published(tmp_path / "ea.pth", recipe, tmp_path / "run")
    images, logits = answer(tmp_path / "run")
    torch.testing.assert_close(logits, network.asked_in_turn(images).detach(), rtol=1e-5, atol=1e-5)
    pool(1).run("tests.distributed.training:train", recipe=recipe, run=tmp_path / "run", stop_at_step=1)
    recipe = recipe_of(striped_shards, tmp_path, *RIDE, "model.centers=cosine")
    done = import_published(tmp_path / "ea.pth", recipe, tmp_path / "all")
    assert "routers.decide.weight" in done.unused
    images, logits = answer(tmp_path / "all")
    torch.testing.assert_close(logits, network(images).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.experts=2", "model.centers=cosine"), "has 3 experts: set model.experts=3"),
        (("model.experts=3",), "has cosine centers: set model.centers"),
        (("model.experts=3", "model.centers=cosine", "model.expert_width=full"), "see model.backbone"),
        (("model.experts=3", "model.centers=cosine", "model.backbone=cifar_resnet14"), "are missing there"),
    ],
)
def test_what_differs_from_rides_file_is_named(settings, message, striped_shards, tmp_path):
    """And nothing is written."""
    save_ride(RideSmall(), tmp_path / "file.pth")
    recipe = recipe_of(striped_shards, tmp_path, *RIDE, *settings)
    with pytest.raises(RecipeError, match=message):
        import_published(tmp_path / "file.pth", recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


PLAIN = "loss.method=cross_entropy"


def test_torchvisions_file_is_recognised_by_its_shapes(striped_shards, pool, tmp_path, capsys):
    """The recipe names another network; with a contrast the projection is drawn, and training goes on."""
    torch.manual_seed(0)
    network = drawn(torchvision.models.resnet18(num_classes=CLASSES))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    recipe, run = recipe_of(striped_shards, tmp_path), tmp_path / "run"
    assert main([str(tmp_path / "weights.pth"), "--config", str(recipe), "--output", str(run)]) == 0
    said = capsys.readouterr().out
    assert "(resnet18)" in said
    assert "drawn from the recipe's seed: projection" in said
    images, logits = answer(run, 64)
    torch.testing.assert_close(logits, network(images).detach(), rtol=1e-5, atol=1e-5)
    pool(1).run("tests.distributed.training:train", recipe=run / "recipe.yaml", run=run, stop_at_step=1)
    assert newest_checkpoint(run).step == 1


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_timms_weights_answer_as_timms_network(form, name, striped_shards, tmp_path):
    """A folder of the hub says its network; of a file alone the recipe does."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = drawn(timm.create_model(name, num_classes=CLASSES))
    (tmp_path / "hub").mkdir()
    save_file(network.state_dict(), tmp_path / "hub" / "model.safetensors")
    if form == "folder":
        (tmp_path / "hub" / "config.json").write_text(json.dumps({"architecture": name, "num_classes": CLASSES}))
    own = (f"model.backbone=timm:{name}",) if form == "file" else ()
    recipe = recipe_of(striped_shards, tmp_path, PLAIN, *own)
    source = tmp_path / "hub" if form == "folder" else tmp_path / "hub" / "model.safetensors"
    import_published(source, recipe, tmp_path / "run")
    images, logits = answer(tmp_path / "run", 64)
    torch.testing.assert_close(logits, network(images).detach(), rtol=1e-5, atol=1e-5)


def test_mocos_file_becomes_a_run_with_a_new_classifier(striped_shards, tmp_path):
    """Without it the option is named; its backbone is both encoders', its queue has no labels and is left."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=128)
    network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), network.fc)
    drawn(network)
    state = {f"module.{e}.{name}": t for e in ("encoder_q", "encoder_k") for name, t in network.state_dict().items()}
    state |= {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.tensor([0])}
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    recipe, run = recipe_of(striped_shards, tmp_path, "model.backbone=resnet18"), tmp_path / "run"
    with pytest.raises(RecipeError, match="no classifier, as those of MoCo: with --new-classifier"):
        import_published(tmp_path / "moco.pth.tar", recipe, run)
    done = import_published(tmp_path / "moco.pth.tar", recipe, run, new_classifier=True)
    assert done.fresh == ["classifier", "projection"]
    model = paco_ds.load(run).recogniser
    images = torch.randn(2, 3, 64, 64)
    network.fc = nn.Identity()
    torch.testing.assert_close(model.query_encoder.backbone(images), network(images), rtol=1e-5, atol=1e-5)
    stem = newest_checkpoint(run).model()["key_encoder.backbone.network.conv1.weight"]
    assert torch.equal(stem, network.conv1.weight)


def test_other_classes_need_a_new_classifier(striped_shards, tmp_path):
    """As of weights of ImageNet."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "imagenet.pth")
    recipe = recipe_of(striped_shards, tmp_path, PLAIN)
    with pytest.raises(RecipeError, match="has 1000 classes, the shards 4"):
        import_published(tmp_path / "imagenet.pth", recipe, tmp_path / "run")
    done = import_published(tmp_path / "imagenet.pth", recipe, tmp_path / "run", new_classifier=True)
    assert done.fresh == ["classifier"]
