"""LARS and Muon: those of timm and of torch on the same gradients, clipped and not; a refused step; what Muon steps."""

import pytest
import timm.optim
import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from paco_ds.training.lars_muon import GuardedLars, GuardedMuon
from paco_ds.training.parameter_groups import LR_FACTOR, MUON, hidden_matrices, parameter_groups
from tests.models.tiny_networks import of
from tests.recipes import model_of, tiny_recipe

SHAPES = {"matrix": (6, 4), "wide": (3, 8), "convolution": (4, 2, 3, 3), "bias": (5,), "still": (4,)}


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES.values()]
    made[-1].zero_()  # a weight of length 0 has no direction to keep to
    return [torch.nn.Parameter(each) for each in made]


def give_gradients(number, *lists):
    generator = torch.Generator().manual_seed(100 + number)
    for each in zip(*lists, strict=True):
        gradient = torch.randn(each[0].shape, generator=generator, dtype=torch.float64)
        for parameter in each:
            parameter.grad = gradient.to(parameter.dtype, copy=True)


def lars(parameters, **settings):
    groups = [{"params": parameters[:3], "weight_decay": 0.02}, {"params": parameters[3:], "weight_decay": 0.0}]
    return GuardedLars(groups, 0.3, whole=True, trust_coefficient=0.01, **settings)


def muon(parameters, **settings):
    groups = [
        {"params": parameters[:3], "weight_decay": 0.02, MUON: True},
        {"params": parameters[3:], "weight_decay": 0.01, MUON: False},
    ]
    return GuardedMuon(groups, 0.1, whole=True, momentum=0.9, betas=(0.8, 0.95), eps=1e-3, **settings)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 3.0])
def test_lars_is_that_of_timm(nesterov, clip_norm):
    """Five steps in float64, clipped before; without weight decay it is SGD."""
    ours, theirs = weights(torch.float64), weights(torch.float64)
    guarded = lars(ours, clip_norm=clip_norm, momentum=0.9, nesterov=nesterov)
    groups = [{"params": theirs[:3], "weight_decay": 0.02}, {"params": theirs[3:], "weight_decay": 0.0}]
    plain = timm.optim.Lars(groups, 0.3, momentum=0.9, nesterov=nesterov, trust_coeff=0.01)
    for number in range(5):
        give_gradients(number, ours, theirs)
        if clip_norm:
            clip_grad_norm_(theirs, clip_norm)
        guarded.step()
        plain.step()
    for name, one, other in zip(SHAPES, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)  # the factor of clipping is float32
        momenta = (guarded.state[one]["momentum_buffer"], plain.state[other]["momentum_buffer"])
        torch.testing.assert_close(*momenta, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 3.0])
def test_muon_is_that_of_torch_and_the_rest_is_adamw(nesterov, clip_norm):
    """Five steps, clipped before; of a convolution with its weight as a matrix."""
    ours, theirs = weights(), weights()
    guarded = muon(ours, clip_norm=clip_norm, nesterov=nesterov)
    matrices = [torch.nn.Parameter(p.detach().flatten(1)) for p in theirs[:3]]
    options = {"momentum": 0.9, "weight_decay": 0.02, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    plain = torch.optim.Muon(matrices, 0.1, **options)
    rest = torch.optim.AdamW(theirs[3:], 0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.01)
    for number in range(5):
        give_gradients(number, ours, theirs)
        if clip_norm:
            gradients = [p.grad for p in theirs]  # bit for bit: Muon rounds to bfloat16
            torch._foreach_div_(gradients, (get_total_norm(gradients) / clip_norm).clamp(min=1))
        for matrix, parameter in zip(matrices, theirs, strict=False):
            matrix.grad = parameter.grad.flatten(1)
        for optimizer in (guarded, plain, rest):
            optimizer.step()
    for name, one, other in zip(SHAPES, ours, [*matrices, *theirs[3:]], strict=True):
        torch.testing.assert_close(one.flatten(), other.flatten(), rtol=1e-5, atol=1e-6, msg=name)
        state = plain.state[other] if other in plain.state else rest.state[other]
        for key, value in state.items():
            torch.testing.assert_close(guarded.state[one][key].flatten(), value.flatten(), rtol=1e-5, atol=1e-6)
    assert [sorted(guarded.state[p]) for p in ours[2:4]] == [["momentum_buffer"], ["exp_avg", "exp_avg_sq", "step"]]


@pytest.mark.parametrize("make", [lars, muon])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_refused_step_changes_nothing(make, wrong):
    """Weights and states, bit for bit; a refused first one leaves states of zero."""
    parameters = weights()
    settings = {"momentum": 0.9} if make is lars else {}
    optimizer = make(parameters, clip_norm=3.0, nesterov=True, **settings)
    for number in range(4):
        give_gradients(number, parameters)
        refused = number in (0, 2)
        if refused:
            parameters[1].grad[0, 0] = wrong
        before = [p.detach().clone() for p in parameters]
        states = [{name: state.clone() for name, state in optimizer.state[p].items()} for p in parameters]
        optimizer.step()
        assert bool(optimizer.applied) is not refused
        for parameter, weight, state in zip(parameters, before, states, strict=True):
            assert torch.equal(parameter, weight) is refused
            for name, value in optimizer.state[parameter].items():
                assert refused is torch.equal(value, state.get(name, torch.zeros_like(value))), name


def names_of_matrices(*overrides):
    return hidden_matrices(model_of(tiny_recipe(*overrides), 9))


def test_muon_steps_the_matrices_inside_the_query_encoder():
    """Of a ResNet the convolutions but the first, and the projection; of a ViT no embeddings. Never the centers."""
    resnet = names_of_matrices()
    assert "query_encoder.backbone.network.blocks.0.conv1.weight" in resnet
    assert not any(name.endswith(("bias", "bn1.weight")) or "centers" in name or "key_enc" in name for name in resnet)
    assert "query_encoder.backbone.network.conv1.weight" not in resnet
    vit = names_of_matrices(*of("vit"))
    assert "query_encoder.backbone.network.blocks.0.attn.qkv.weight" in vit
    assert not any(word in name for name in vit for word in ("patch_embed", "pos_embed", "cls_token", "norm"))
    assert any("projection" in name for name in vit)


def test_only_muon_has_groups_of_matrices():
    """Each parameter is in one group."""
    model = model_of(tiny_recipe(), 9)
    for name, kinds in {"muon": {True, False}, "lars": {False}}.items():
        groups = parameter_groups(model, tiny_recipe(f"optimizer.name={name}").optimizer)
        assert {group[MUON] for group in groups} == kinds
        assert {group[LR_FACTOR] for group in groups} == {1.0}
        assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
