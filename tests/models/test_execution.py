"""Memory format and activation checkpointing change how a model is run, not what it computes; no ranks needed."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paco_ds.config.recipe import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import make_backbone
from paco_ds.models.execution import prepare
from paco_ds.models.recogniser import Recogniser
from tests.recipes import model_of, tiny_recipe


def made(*overrides: str, stage: int = 0) -> Recogniser:
    recipe = tiny_recipe(*overrides)
    model = model_of(recipe, 5)
    prepare(model, recipe.engine, stage)
    return model


def images() -> Tensor:
    return torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run(model: Recogniser) -> dict[str, Tensor]:
    """Logits, queries, every gradient and every buffer after one forward and backward."""
    _, logits, query, *_ = model(images())
    (logits.square().mean() + query[:, 0].sum()).backward()
    gradients = {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), "query": query.detach(), **gradients, **dict(model.named_buffers())}


def test_recomputed_blocks_give_the_same_bits_and_move_running_statistics_once():
    """Logits, gradients, running means and variances, and the count of batches."""
    plain, recomputed = run(made()), run(made("engine.activation_checkpointing=true"))
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name
    assert all(int(v) == 1 for name, v in recomputed.items() if name.endswith("num_batches_tracked"))


def test_checkpointing_by_itself_would_move_running_statistics_twice():
    """Negative control: without our care the comparison above fails."""
    model = made()
    for block in model.query_encoder.backbone.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    statistics = {name: value for name, value in run(made()).items() if "running_mean" in name}
    twice = run(model)
    assert any(not torch.equal(twice[name], value) for name, value in statistics.items())


def test_of_recomputed_blocks_only_the_input_is_kept():
    """Autograd sees nothing of the blocks to save; each runs once more in backward."""

    def saved_bytes(model: Recogniser) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images())
        return sum(kept.values())

    deep = "model.backbone=cifar_resnet20"
    model = made(deep, "engine.activation_checkpointing=true")
    assert saved_bytes(model) < saved_bytes(made(deep)) / 3
    runs = []
    model.query_encoder.backbone.blocks()[0].conv1.register_forward_hook(lambda *_: runs.append(1))
    logits = model(images()).logits
    logits.sum().backward()
    assert len(runs) == 2


def test_nothing_is_recomputed_where_no_gradient_is_asked_for():
    """Evaluation costs one forward, and a copy of the model runs its own weights."""
    model = made("engine.activation_checkpointing=true").eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images())[:3], made().eval()(images())[:3])
        first: Any = twin.query_encoder.backbone.blocks()[0]
        first.conv1.weight.zero_()
        assert not torch.equal(twin(images()).logits, model(images()).logits)


def test_activations_are_channels_last_from_the_images_to_the_pooled_feature():
    """Of queries and keys; weights keep their format, as ZeRO lays them out flat; results agree to rounding."""
    model, plain = made("engine.channels_last=true").double(), made().double()
    formats = []

    def note_format(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        formats.append(output.is_contiguous(memory_format=torch.channels_last))

    for encoder in (model.query_encoder, model.key_encoder):
        for module in encoder.backbone.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(note_format)
    torch.testing.assert_close(model(images(), keys=True), plain(images(), keys=True))
    fast, expected = run(model), run(plain)
    for name, value in expected.items():
        # outputs are rounded to float32; the gradient of a bias before BatchNorm is 0 but for rounding
        assert (fast[name] - value).double().norm() <= 1e-6 * value.double().norm() + 1e-12, name
    assert formats
    assert all(formats)
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16), ("cifar_resnet32", 15)])
def test_every_backbone_names_its_residual_blocks(name, blocks):
    """Otherwise checkpointing would silently do nothing."""
    with torch.device("meta"):
        assert len(make_backbone(ModelSettings(backbone=name)).blocks()) == blocks


def test_compile_is_refused_where_it_cannot_work():
    """At ZeRO stage 3, and beside activation checkpointing; setting and remedy are named."""
    with pytest.raises(RecipeError, match=r"engine.compile: ZeRO stage 3 .*engine.compile=false"):
        made("engine.compile=true", stage=3)
    with pytest.raises(RecipeError, match=r"compile and activation_checkpointing .*set one to false"):
        tiny_recipe("engine.compile=true", "engine.activation_checkpointing=true")


def test_these_settings_may_change_when_a_run_goes_on():
    """They are no part of a recipe's meaning."""
    fast = tiny_recipe("engine.compile=true", "engine.channels_last=true")
    assert fast.resume_identity() == tiny_recipe().resume_identity()
