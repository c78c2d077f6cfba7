"""A trained model in other programs answers as it does here; what a format has no place for is refused by name."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_sample_images

from paco_ds.checkpoint import Checkpoint
from paco_ds.config.views import EvalView
from paco_ds.data.stream.views import make_view
from paco_ds.errors import DataError, UserError
from paco_ds.evaluation import export as command
from paco_ds.evaluation import predictor as predictor_module
from paco_ds.evaluation.export import FORMATS
from paco_ds.evaluation.exporter import answers, export
from paco_ds.evaluation.hub_folder import _card
from paco_ds.evaluation.predictor import Predictor
from paco_ds.models.adapters import is_added
from tests.recipes import model_of, tiny_recipe

NAMES = ("owl", "café", "eel", "fox", "gnu")
SIZE = 64


def made(backbone="resnet18", *overrides, method="balanced_softmax"):
    """A model whose weights and running statistics are drawn, as if it were trained."""
    torch.manual_seed(0)
    recipe = tiny_recipe(f"model.backbone={backbone}", f"loss.method={method}", *overrides)
    model = model_of(recipe, len(NAMES), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_mean", ".bias")):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    return Predictor(model, backbone, NAMES, EvalView(size=SIZE, resize=SIZE + 8), 10**6, 4, False)


@pytest.fixture(scope="module")
def resnet18():
    return made()


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (5, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(images):
    return (images / 255 - torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)) / torch.tensor((0.2, 0.3, 0.4)).view(3, 1, 1)


@pytest.fixture(scope="module")
def expected(resnet18, images):
    """By the model's own forward, which knows nothing of formats."""
    with torch.no_grad():
        return resnet18.recogniser(images).mean_logits()


def same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_torchvisions_own_model_takes_it_strictly(resnet18, images, expected, tmp_path):
    export(resnet18, "torchvision", tmp_path / "model.pth")
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    with torch.no_grad():
        same(theirs(normalised(images)), expected)


def test_timms_own_model_takes_it_by_its_path(resnet18, images, expected, tmp_path):
    export(resnet18, "timm", tmp_path / "model.safetensors")
    theirs = timm.create_model("resnet18", num_classes=5, checkpoint_path=str(tmp_path / "model.safetensors")).eval()
    with torch.no_grad():
        same(theirs(normalised(images)), expected)


def test_a_network_of_timm_is_one_there(images, tmp_path):
    """A ViT, whose classifier has another name."""
    model = made(
        "timm:test_vit",
        *(f"views.{view}.size=160" for view in ("query", "key", "evaluation")),
        "views.evaluation.resize=160",
    )
    model.view = EvalView(size=160, resize=160)
    export(model, "timm", tmp_path / "model.safetensors")
    theirs = timm.create_model("test_vit", num_classes=5, checkpoint_path=str(tmp_path / "model.safetensors")).eval()
    larger = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad():
        same(theirs(normalised(larger)), model.recogniser(larger).mean_logits())


METRICS = {"many": 0.9, "medium": 0.5, "few": None, "all": 0.7, "split": "test", "step": 8, "weights": "query"}


@pytest.fixture
def of_a_run(resnet18, tmp_path):
    """The model as one of step 8 of a run, whose metrics.json is beside it."""
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    model = copy.copy(resnet18)
    model.checkpoint = Checkpoint(tmp_path, 8, {"data": {"license": "CC0"}})
    return model


def test_a_folder_of_the_hub_is_loaded_with_its_names(of_a_run, images, expected, tmp_path):
    """Weights, classes, preprocessing, and a card with the run's figures and the licence of its images."""
    export(of_a_run, "hf", tmp_path / "hub", tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        same(theirs(normalised(images)), expected)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(NAMES)}
    settings = timm.data.resolve_data_config(model=theirs)
    assert settings["mean"] == pytest.approx((0.5, 0.4, 0.3))
    assert tuple(settings["input_size"]) == (3, SIZE, SIZE)
    assert settings["crop_pct"] == pytest.approx(SIZE / (SIZE + 8), abs=1e-4)
    card = (tmp_path / "hub" / "README.md").read_text()
    for line in ("# resnet18 for 5 classes", "| Many | 90.0 |", "| All | 70.0 |", "library_name: timm", "## Limits"):
        assert line in card
    assert 'license_name: "CC0"' in card
    assert "Few |" not in card


@pytest.mark.parametrize(
    "other", [{"step": 7}, {"weights": "ema"}, {"logit_adjustment": 1.0}, {"aggregation": "prediction stability"}]
)
def test_a_card_has_no_figures_of_other_weights_or_a_corrected_model(of_a_run, tmp_path, other):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS | other))
    card = _card(of_a_run, tmp_path)
    assert "| All |" not in card
    assert "The run has none of these weights yet." in card


def test_damaged_figures_are_named(of_a_run, tmp_path):
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"metrics\.json is not JSON .*: write it again with paco-evaluate --run "):
        _card(of_a_run, tmp_path)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_hubs_preprocessing_has_the_pixels_of_our_evaluation(resnet18, tmp_path, monkeypatch, interpolation):
    """timm's own transform of a photograph, within a byte; HuggingFace's by the filter's number."""
    view = EvalView(size=SIZE, resize=SIZE + 8, interpolation=interpolation)
    monkeypatch.setattr(resnet18, "view", view)
    export(resnet18, "hf", tmp_path / "hub", None)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    settings = timm.data.resolve_data_config(model=theirs) | {"mean": (0, 0, 0), "std": (1, 1, 1)}
    photo = load_sample_images().images[0]
    expected = 255 * timm.data.create_transform(**settings)(Image.fromarray(photo)).permute(1, 2, 0).numpy()
    height, width, _ = photo.shape
    pixels = make_view(view).draw(height, width, np.random.default_rng(0)).render(photo)
    assert np.abs(pixels - expected).max() < 1.5
    written = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert Image.Resampling(written["resample"]).name == interpolation.upper()
    assert written["size"] == {"shortest_edge": SIZE + 8}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(("resnet18",), id="linear centers"),
        pytest.param(("cifar_resnet8", "model.centers=cosine", "model.experts=2"), id="cosine experts"),
    ],
)
def test_onnx_takes_any_number_of_images(model, images, tmp_path):
    """uint8 in, logits out; class names go along."""
    import onnxruntime

    model = made(*model)
    export(model, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 5):
        (got,) = session.run(None, {"images": images[:count].numpy()})
        with torch.no_grad():
            same(torch.from_numpy(np.array(got)), model.recogniser(images[:count]).mean_logits(), 1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list(NAMES)
    assert json.loads(about["mean"]) == [0.5, 0.4, 0.3]


def test_torch_export_takes_any_number_of_images(images, tmp_path):
    model = made("cifar_resnet8", "model.centers=cosine", "model.experts=2")
    export(model, "torch-export", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 5):
        with torch.no_grad():
            same(program(images[:count]), model.recogniser(images[:count]).mean_logits())


def test_safetensors_hold_every_tensor_and_what_a_program_needs(resnet18, tmp_path):
    export(resnet18, "safetensors", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    expected = answers(resnet18).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert (about["class_names"], about["size"], about["resize"]) == (list(NAMES), SIZE, SIZE + 8)


@pytest.mark.parametrize(
    ("to", "model", "message"),
    [
        ("torchvision", ("cifar_resnet8",), "cifar_resnet8 is no network of torchvision's"),
        ("timm", ("cifar_resnet8",), "cifar_resnet8 is no network of timm's"),
        ("hf", ("cifar_resnet8",), "--to hf: cifar_resnet8 is no network of timm's"),
        ("hf", ("resnet18", "model.experts=2"), "has no place for experts"),
        ("torchvision", ("resnet18", "model.centers=cosine"), "its classifier is linear, and these are CosineCenters"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(tmp_path, to, model, message):
    """With the formats that have; nothing is written."""
    with pytest.raises(UserError, match=message) as error:
        export(made(*model), to, tmp_path / "out" / "model")
    assert "onnx" in str(error.value)
    assert list(tmp_path.rglob("model*")) == []


@pytest.mark.parametrize("to", FORMATS)
def test_routers_are_refused_as_no_format_has_them(resnet18, tmp_path, to):
    """What was written would be the first stage."""
    model = copy.copy(resnet18)
    model.recogniser = SimpleNamespace(routers=torch.nn.Identity())
    with pytest.raises(UserError, match=f"--to {to} has no place for routers, .*: export the run of the first stage"):
        export(model, to, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_torch_has_the_ending_that_torch_asks_for(resnet18, tmp_path):
    with pytest.raises(UserError, match=r"end in .pt2: --output .*/model.pt2"):
        export(resnet18, "torch-export", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(resnet18, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs the package onnxscript: pip install 'paco_ds\[onnx\]'"):
        export(resnet18, "onnx", tmp_path / "model.onnx")


def test_a_model_that_answers_otherwise_is_not_kept(resnet18, tmp_path, monkeypatch):
    """The check is one: a network with another stride has all tensors, and other answers."""
    get_model = torchvision.models.get_model

    def wrong(name, **options):
        network = get_model(name, **options)
        network.conv1.stride = (1, 1)
        return network

    monkeypatch.setattr(torchvision.models, "get_model", wrong)
    with pytest.raises(AssertionError):
        export(resnet18, "torchvision", tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_never_replaces(resnet18, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predictor_module, "load", lambda run, weights: resnet18)
    arguments = ["run", "--to", "safetensors", "--output", str(tmp_path / "model.safetensors")]
    assert command.main(arguments) == 0
    assert "written:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == UserError.status
    assert "is there already: remove it" in capsys.readouterr().err
    assert set(FORMATS) == {"safetensors", "torchvision", "timm", "onnx", "torch-export", "hf"}


def tuned(trained):
    """A ViT with all that `model.trained` adds drawn."""
    model = made(
        "timm:test_vit",
        *(f"views.{view}.size=160" for view in ("query", "key", "evaluation")),
        "views.evaluation.resize=160",
        f"model.trained={trained}",
        "model.start_from=somewhere",
    )
    model.view = EvalView(size=160, resize=160)
    with torch.no_grad():
        for name, parameter in model.recogniser.named_parameters():
            if is_added(name):
                parameter.normal_(0, 0.1)
    return model


def test_lora_is_merged_into_timms_weights(tmp_path):
    """timm's own model has no place for it, and answers the same; ours keeps its layers."""
    model = tuned("lora")
    export(model, "timm", tmp_path / "model.safetensors")
    theirs = timm.create_model("test_vit", num_classes=5, checkpoint_path=str(tmp_path / "model.safetensors")).eval()
    larger = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad():
        same(theirs(normalised(larger)), model.recogniser(larger).mean_logits())
    assert any(is_added(name) for name in model.recogniser.state_dict())


def test_bottlenecks_have_no_place_in_timms_networks(tmp_path):
    """Refused by name, with the formats that hold them."""
    with pytest.raises(
        UserError, match=r"--to timm has no place for the bottlenecks of model.trained adaptformer: give"
    ):
        export(tuned("adaptformer"), "timm", tmp_path / "model.safetensors")
    export(tuned("adaptformer"), "safetensors", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "backbone.network.blocks.0.adapter.down.weight" in list(file.keys())
