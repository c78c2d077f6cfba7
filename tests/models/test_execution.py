"""Memory format and activation checkpointing change how a model is run, not what it computes; no ranks needed."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paco_ds.config.engine import described, deviation, in_words
from paco_ds.config.model import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import make_backbone
from paco_ds.models.execution import Hardware, choose, prepare
from paco_ds.models.recogniser import Recogniser
from tests.recipes import model_of, tiny_recipe

CPU = Hardware()
V100, A100, H200 = (Hardware("cuda", (major, 0), 80 * 2**30) for major in (7, 8, 9))


def made(*overrides: str, stage: int = 0) -> Recogniser:
    recipe = tiny_recipe(*overrides)
    model = model_of(recipe, 5)
    prepare(model, choose(recipe.engine, CPU), stage)
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


@pytest.mark.parametrize(
    ("hardware", "precision", "channels_last", "tf32"),
    [
        (CPU, "float32", False, False),
        (Hardware("cuda", (6, 1)), "float32", False, False),
        (V100, "float32", True, False),
        (A100, "bfloat16", True, True),
        (H200, "bfloat16", True, True),
    ],
)
def test_auto_is_what_the_hardware_is_good_at(hardware, precision, channels_last, tf32):
    """bfloat16 from capability 8, channels_last from 7; float32, planes and no TF32 on CPU, as always. A choice is
    final: nothing changes it."""
    chosen = choose(tiny_recipe().engine, hardware)
    assert (chosen.precision, chosen.channels_last, chosen.tf32) == (precision, channels_last, tf32)
    assert choose(chosen, CPU if hardware is H200 else H200) == chosen.model_copy(
        update={"tf32": chosen.tf32 and hardware is not H200}
    )


@pytest.mark.parametrize("hardware", [CPU, V100, H200])
def test_what_a_recipe_says_stands_on_any_hardware(hardware):
    """bfloat16 on a CPU too; float32 by name has no TF32, unless that is asked for."""
    assert choose(tiny_recipe("engine.precision=bfloat16").engine, hardware).precision == "bfloat16"
    exact = choose(tiny_recipe("engine.precision=float32", "engine.channels_last=false").engine, hardware)
    assert (exact.precision, exact.tf32, exact.channels_last) == ("float32", False, False)
    rounded = choose(tiny_recipe("engine.precision=float32", "engine.tf32=true").engine, hardware)
    assert rounded.tf32 == (hardware.device == "cuda")


@pytest.mark.parametrize(
    ("published", "computed", "deviates"),
    [("float32", "float32", None), ("float16", "bfloat16", "bfloat16 where float16 is published")],
)
def test_the_published_precision_is_had_by_name(published, computed, deviates):
    """float16 is computed as bfloat16, whose loss needs no scaling; that is a deviation. Convolutions are exact."""
    settings = ("engine.precision=published", f"engine.published_precision={published}")
    chosen = choose(tiny_recipe(*settings).engine, H200)
    assert (chosen.precision, deviation(chosen)) == (computed, deviates)
    assert chosen.tf32 == (computed == "bfloat16")


def test_a_recipe_without_a_published_precision_says_so():
    """The setting that would have it is named."""
    with pytest.raises(RecipeError, match=r"engine.precision: .*engine.published_precision.*choose auto, float32"):
        choose(tiny_recipe("engine.precision=published").engine, CPU)


def test_cuda_graphs_are_for_cuda():
    """On CPU the default mode is what compiles; `true` of earlier versions is that mode."""
    assert choose(tiny_recipe("engine.compile=reduce-overhead").engine, H200).compile == "reduce-overhead"
    assert choose(tiny_recipe("engine.compile=reduce-overhead").engine, CPU).compile == "default"
    assert tiny_recipe("engine.compile=true").engine.compile == "default"
    assert tiny_recipe("engine.compile=false").engine.compile is False
    with pytest.raises(RecipeError, match=r"engine.compile.*'default' or 'reduce-overhead'.*given: 'max-autotune'"):
        tiny_recipe("engine.compile=max-autotune")


def test_ranks_compute_what_the_least_of_them_can():
    """The lowest capability, the smallest memory."""
    small = Hardware("cuda", (8, 6), 24 * 2**30)
    assert Hardware.least([H200, small]) == small
    assert Hardware.least([V100, small]) == Hardware("cuda", (7, 0), 24 * 2**30)
    assert Hardware.least([CPU, CPU]) == CPU


def test_what_outlives_a_replay_of_a_graph_is_copied(monkeypatch):
    """Keys and gradients; everything else is used before the graph is replayed. Compilation is left out here."""
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: modes.append(options))
    recipe = tiny_recipe("engine.compile=reduce-overhead")
    model = model_of(recipe, 5)
    kept = torch.nn.functional.normalize(torch.ones(6, 8), dim=1)
    monkeypatch.setattr(model.key_encoder, "forward", lambda images: (None, kept))
    prepare(model, choose(recipe.engine, H200), 0)
    assert modes == [{"mode": "reduce-overhead", "dynamic": False}] * 2
    keys = model(images(), keys=True)
    assert torch.equal(keys, kept)
    assert keys.data_ptr() != kept.data_ptr()
    weight = next(p for p in model.query_encoder.parameters() if p.ndim > 1)
    given = torch.ones_like(weight)
    torch.autograd.backward(weight * 1.0, given)
    assert weight.grad is not None
    assert torch.equal(weight.grad, given)
    assert weight.grad.data_ptr() != given.data_ptr()


def test_a_choice_is_told_on_one_line():
    """Only what is on."""
    engine = tiny_recipe("engine.published_precision=float32", "engine.compile=reduce-overhead").engine
    assert in_words(described(choose(engine, CPU), 1)) == "float32, compiled (default)"
    told = in_words(described(choose(engine, H200), 0))
    assert told == "bfloat16 autocast where float32 is published, channels_last, compiled (reduce-overhead)"
    assert in_words(described(choose(tiny_recipe("engine.tf32=true", "engine.precision=float32").engine, V100), 0)) == (
        "float32, convolutions in TF32, channels_last"
    )
