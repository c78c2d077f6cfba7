"""Weights in the layouts of their authors give the features of timm's own network; those of another are refused."""

import argparse
import json
import logging

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from paco_ds.errors import RecipeError
from paco_ds.evaluation.exporter import export
from paco_ds.evaluation.predictor import Predictor
from paco_ds.models.families import ImageSizes
from paco_ds.training.identify_network import backbone_of
from paco_ds.training.initial_weights import load_initial_weights
from paco_ds.training.published import read_published
from tests.models.tiny_networks import SIZE, TINY, of
from tests.recipes import model_of, tiny_recipe
from tests.training.drawn import drawn


def theirs(family, size=SIZE, classes=7, **more):
    """timm's own network of random weights, with a classifier."""
    name, kwargs = TINY[family]
    sized = {} if family in ("convnext", "efficientnet") else {"img_size": size}
    return drawn(timm.create_model(name, num_classes=classes, **{**kwargs, **sized, **more})).eval()


def started(family, path, *overrides, **more):
    """(a fresh model with the weights of a file, what became of them)."""
    recipe = tiny_recipe(*of(family, **more), f"model.start_from={path}", *overrides)
    model = model_of(recipe, 5).eval()
    sizes = ImageSizes.of(recipe.views)
    return model, load_initial_weights(model, recipe.model, sizes)


def images(size=SIZE):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def feature_of(network, size=SIZE):
    with torch.no_grad():
        return network.forward_head(network.forward_features(images(size)), pre_logits=True)


def check(family, path, network, *overrides, unused=(), **more):
    """Both encoders give the features of timm's network, to 1e-5; all of the file but `unused` is taken."""
    model, fit = started(family, path, *overrides, **more)
    with torch.no_grad():
        torch.testing.assert_close(model.query_encoder.backbone(images()), feature_of(network), rtol=1e-5, atol=1e-5)
    ours = model.query_encoder.backbone.state_dict()
    assert all(torch.equal(p, ours[name]) for name, p in model.key_encoder.backbone.named_parameters())
    assert (fit.share, fit.missing, fit.reshaped) == (1.0, [], [])
    assert fit.unused == sorted(unused)
    return fit


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timms_weights_fill_both_encoders(tmp_path, family, ending):
    """Of each family; its classifier is left out."""
    network, path = theirs(family), tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(network.state_dict(), path)
    fit = check(family, path, network)
    assert {name.rpartition(".")[2] for name in fit.classifier} == {"weight", "bias"}
    assert "tensors, 100.0 % of the weights" in fit.in_words()


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"state_dict": prefixed(s, "module."), "optimizer": {"state": {}}},
        lambda s: {"state_dict": prefixed(s, "module.encoder_q.") | prefixed(s, "module.encoder_k.")},
        lambda s: {"state_dict": prefixed(s, "module.base_encoder.") | prefixed(s, "module.momentum_encoder.")},
        lambda s: {"student": {}, "teacher": prefixed(s, "backbone.") | {"head.mlp.0.weight": torch.ones(3)}},
        lambda s: {"model": {n: t + 1 for n, t in s.items()}, "model_ema": s},
        lambda s: {"module": prefixed(s, "module._orig_mod.")},
        lambda s: prefixed(s, "backbone.network.") | {"normalize.mean": torch.ones(3), "centers.weight": torch.ones(3)},
    ],
    ids=["model", "state_dict", "encoder_q", "base_encoder", "teacher", "ema", "wrapped", "ours"],
)
def test_nested_layouts_are_unpacked(tmp_path, nest):
    """Of MAE, DistributedDataParallel, MoCo and PaCo, MoCo v3, DINO, averaged weights, DeepSpeed, our own export."""
    network, path = theirs("vit"), tmp_path / "file.pth"
    torch.save(nest(network.state_dict()), path)
    check("vit", path, network)


def test_mae_gives_its_encoder(tmp_path):
    """Its decoder and mask token are not used; a pooled ViT's norm after the pool is missing there and said."""
    network = theirs("vit", global_pool="avg")
    state = {n: t for n, t in network.state_dict().items() if not n.startswith(("head", "fc_norm"))}
    decoder = {"decoder_embed.weight": torch.ones(8, 16), "decoder_pos_embed": torch.ones(1, 17, 8)}
    lost = {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16), "mask_token": torch.ones(1, 1, 8)}
    path = tmp_path / "mae_pretrain_vit_base_full.pth"
    torch.save({"model": state | decoder | lost}, path)
    model, fit = started("vit", path, global_pool="avg")
    assert fit.missing == ["fc_norm.bias", "fc_norm.weight"]
    assert set(fit.unused) >= set(decoder) | {"norm.weight", "norm.bias"}
    assert fit.share > 0.99
    network.fc_norm = nn.LayerNorm(16, 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.query_encoder.backbone(images()), feature_of(network))
    assert "2 not in the file (fc_norm.bias, fc_norm.weight)" in fit.in_words()


def as_dinov2(state):
    """A ViT with registers of timm as facebookresearch/dinov2 saves it: the class token apart from its position."""
    state = {n: t for n, t in state.items() if not n.startswith("head")}
    where = torch.randn(1, 1, 16)
    state["pos_embed"] = torch.cat([where, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - where
    state["register_tokens"] = state.pop("reg_token")
    return state | {"mask_token": torch.zeros(1, 16)}


def test_dinov2_with_registers_is_read_as_timm_reads_it(tmp_path):
    """Its class token has a position of its own, timm's none."""
    network, path = theirs("dinov2"), tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    torch.save(as_dinov2(network.state_dict()), path)
    check("dinov2", path, network)


CLIP = {"pre_norm": True, "act_layer": "quick_gelu"}
_SWAPS = [
    ("patch_embed.proj", "conv1"), ("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre"), ("norm1", "ln_1"),
    ("norm2", "ln_2"), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"), ("norm.", "ln_post."),
]  # fmt: skip


def as_clip(state):
    """A ViT of timm as OpenAI's CLIP and OpenCLIP name its parts, in half precision, with a text tower."""
    clip = {}
    for name, tensor in state.items():
        for ours, name_there in _SWAPS:
            name = name.replace(ours, name_there)
        clip[f"visual.{name}"] = tensor
    clip["visual.class_embedding"] = clip.pop("visual.cls_token")[0, 0]
    clip["visual.positional_embedding"] = clip.pop("visual.pos_embed")[0]
    clip["visual.proj"] = clip.pop("visual.head.weight").T.contiguous()
    del clip["visual.head.bias"]
    text = {"token_embedding.weight": torch.ones(9, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    return clip | text | {"positional_embedding": torch.ones(5, 4), "logit_scale": torch.tensor(1.0)}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": prefixed(s, "module."), "epoch": 32}])
def test_the_image_tower_of_clip_is_read_as_timm_reads_it(tmp_path, wrap):
    """OpenAI's state dict, and OpenCLIP's checkpoints; the text tower and its projection are left out."""
    network, path = theirs("vit", **CLIP), tmp_path / "clip.pt"
    torch.save(wrap(as_clip(network.state_dict())), path)
    check("vit", path, network, **CLIP)


def test_clip_with_a_tower_of_timm(tmp_path):
    """As OpenCLIP saves SigLIP and ConvNeXt towers."""
    for family in ("vit", "convnext"):
        network, path = theirs(family), tmp_path / f"{family}.pth"
        state = {n: t for n, t in network.state_dict().items() if not n.startswith(("head.weight", "head.fc"))}
        torch.save(prefixed(state, "visual.trunk.") | {"text.ln.weight": torch.ones(3)}, path)
        check(family, path, network)


def test_half_precision_becomes_float32(tmp_path):
    """As CLIP's files are."""
    network, path = theirs("vit").half().float(), tmp_path / "half.safetensors"
    save_file({n: t.half() for n, t in network.state_dict().items()}, path)
    check("vit", path, network)
    assert all(p.dtype == torch.float32 for p in started("vit", path)[0].parameters())


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin", "eva"])
def test_position_embeddings_of_another_size_are_resampled(tmp_path, family):
    """As timm itself does where it loads the file of a network of 64 pixels into one of 32."""
    network, path = theirs(family, size=64), tmp_path / "of_64.pth"
    torch.save(network.state_dict(), path)
    name, kwargs = TINY[family]
    overlay = {"state_dict": network.state_dict(), "num_classes": 7}
    expected = timm.create_model(
        name, num_classes=7, img_size=SIZE, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs
    ).eval()
    check(family, path, expected)


def test_torchvisions_vit_is_resampled_by_torchvision(tmp_path):
    """From 32 to 16 pixels."""
    recipe = tiny_recipe(*of("vit")[2:], "model.backbone=vit_b_16", f"model.start_from={tmp_path / 'vit.pth'}")
    with torch.device("meta"):
        state = torchvision.models.vit_b_16().state_dict()
    # one tensor has numbers, the others none: 86 million of them would take seconds
    state = {n: torch.zeros(1).expand(t.shape) for n, t in state.items()}
    state["encoder.pos_embedding"] = torch.randn(1, 197, 768)
    torch.save(state, tmp_path / "vit.pth")
    model = model_of(recipe, 5)
    fit = load_initial_weights(model, recipe.model, ImageSizes(SIZE, SIZE))
    assert fit.missing == fit.reshaped == fit.unused == []
    ours = model.query_encoder.backbone.get_parameter("network.encoder.pos_embedding")
    assert ours.shape == (1, 5, 768)
    torch.testing.assert_close(ours[:, 0], state["encoder.pos_embedding"][:, 0])


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_experts_start_from_one_pretrained_network(tmp_path, family):
    """Each takes the last stages, so that all begin as that network."""
    network, path = theirs(family), tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    model, fit = started(family, path, "model.experts=2")
    assert fit.share == 1.0
    with torch.no_grad():
        for feature in model.query_encoder.backbone(images()):
            torch.testing.assert_close(feature, feature_of(network), rtol=1e-5, atol=1e-5)


def test_a_folder_that_timm_puts_on_the_hub_is_read(tmp_path):
    """config.json and model.safetensors, as `timm.models.push_to_hf_hub` writes them."""
    network = theirs("vit")
    timm.models.save_for_hf(network, tmp_path / "hub", model_config={"num_classes": 7}, safe_serialization=True)
    check("vit", tmp_path / "hub", network)


def test_our_own_folder_for_the_hub_is_read_back_by_timm_and_by_us(tmp_path):
    """`paco-export --to hf` of a ViT: arguments and image size are in its config.json."""
    recipe = tiny_recipe(*of("vit"), "loss.method=balanced_softmax")
    model = drawn(model_of(recipe, 3)).eval()
    predictor = Predictor(model, recipe.model.backbone, "abc", recipe.views.evaluation, 10**6, 4, False)
    for to, name in (("hf", "hf"), ("timm", "timm"), ("safetensors", "safetensors"), ("torch-export", "vit.pt2")):
        export(predictor, to, tmp_path / name)
    back = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(images()), model.centers(model.query_encoder.backbone(images())))
    check("vit", tmp_path / "hf", back)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_args"]["depth"] == 4
    asked = dict(each.split("=", 1) for each in backbone_of(read_published(tmp_path / "hf"), ()))
    assert asked["model.backbone"] == recipe.model.backbone
    assert json.loads(asked["model.kwargs"]) == recipe.model.kwargs  # what paco-import takes over


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depth": 6}, "6[0-9.]* % of the weights fit"),
        ({"embed_dim": 24}, r"blocks.0.attn.proj.bias is \(24,\), not \(16,\)\. 0.0 %"),
    ],
)
def test_weights_of_a_larger_network_are_refused(tmp_path, other, message):
    """Deeper, whose first blocks would fit, or wider: the share counts what the file has for the same parts."""
    path = tmp_path / "weights.pth"
    torch.save(theirs("vit", **other).state_dict(), path)
    with pytest.raises(RecipeError, match=f"does not fit this network: .*{message}"):
        started("vit", path)


@pytest.mark.parametrize("family", ["swin", "convnext", "efficientnet", "eva"])
def test_weights_of_another_architecture_are_refused(tmp_path, family):
    """By the file's name, with names of both and the setting to change."""
    path = tmp_path / "vit.pth"
    torch.save({"model": theirs("vit").state_dict()}, path)
    with pytest.raises(
        RecipeError, match=r"model.start_from .*vit.pth does not fit this .*set model.backbone"
    ) as caught:
        started(family, path)
    assert "\n" not in str(caught.value)


def test_names_of_another_library_are_refused_with_those_names(tmp_path):
    """HuggingFace transformers' own, which timm does not read."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "vit"}')
    save_file({"vit.embeddings.cls_token": torch.ones(1, 1, 16)}, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(RecipeError, match=r"the file has vit\.embeddings\.cls_token"):
        started("vit", tmp_path / "hub")


def test_a_smaller_share_is_taken_where_it_is_allowed(tmp_path):
    """The rest stays as the seed drew it, and every name is listed."""
    network, path = theirs("vit"), tmp_path / "weights.pth"
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("blocks.3.")}
    torch.save(state | {"extra.weight": torch.ones(3)}, path)
    with pytest.raises(RecipeError, match=r"12 tensors are missing, blocks.3.* model.start_from_min_share is 90 %"):
        started("vit", path)
    model, fit = started("vit", path, "model.start_from_min_share=0.7")
    block = "query_encoder.backbone.network.blocks.3"
    fresh = model_of(tiny_recipe(*of("vit")), 5).get_submodule(block).state_dict()
    for name, tensor in model.get_submodule(block).state_dict().items():
        assert torch.equal(tensor, fresh[name])
    assert 0.7 < fit.share < 0.9
    lists = fit.lists()
    assert len(lists["not in the file, drawn from the seed"]) == 12
    assert lists["not used"] == ["extra.weight"]
    assert "12 not in the file (blocks.3.attn.proj.bias" in fit.in_words()
    assert "and 7 more" in fit.in_words()


def test_what_holds_no_tensors_is_no_file_of_weights(tmp_path):
    """Named, in one line."""
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(RecipeError, match="is not a state dict of tensors by name"):
        started("vit", tmp_path / "empty.pth")


def test_timm_prints_nothing_of_its_own(tmp_path, capsys, caplog):
    """One line of ours says it all."""
    caplog.set_level(logging.WARNING)
    path = tmp_path / "weights.pth"
    torch.save(theirs("eva").state_dict(), path)
    started("eva", path)
    assert capsys.readouterr().out == ""
    assert caplog.records == []
