"""RIDE's second stage in the model: what routers see, and that experts run on the images routed to them alone."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from paco_ds.training.initial_weights import freeze
from tests.recipes import model_of, tiny_recipe

CLASSES, IMAGES = 5, 40
SECOND_STAGE = (
    "loss.method=routing",
    "model.experts=3",
    "model.centers=cosine",
    "model.trained=routers",
    "model.start_from=unused",
    "model.routers.top_logits=3",
)


def made(*overrides):
    """A model whose routers send on about half of the images that they see."""
    recipe = tiny_recipe(*SECOND_STAGE, *overrides)
    model = model_of(recipe, CLASSES)
    freeze(model, recipe.model)
    generator = torch.Generator().manual_seed(0)
    contrast = torch.linspace(0.1, 1, IMAGES)[:, None, None, None]
    images = (contrast * torch.randint(0, 256, (IMAGES, 3, 12, 12), generator=generator)).to(torch.uint8)
    routers: Any = model.routers
    with torch.no_grad():  # the first number of each router becomes its own bias
        for hidden in routers.hidden:
            hidden.weight[0], hidden.bias[0] = 0, 0
        said = model.train()(images).routers
        for hidden, median in zip(routers.hidden, said.quantile(0.5, dim=1), strict=True):
            hidden.bias[0] = 10 - median
        routers.decide.weight[0, routers.top_logits], routers.decide.bias[0] = 1, routers.decide.bias[0] - 10
    return model, images


def experts_one_by_one(model, image):
    """(feature, logits) of every expert for one image, asked without routing."""
    features = model.query_encoder.eval()(model.normalize(image[None]))[0]
    return [(feature[0], head(feature)[0]) for feature, head in zip(features, model.centers, strict=True)]


def said_by_router(model, e, feature, mean_logits):
    """w . [largest logits in order, relu(A u + a)] + b, number by number."""
    hidden, decide = model.routers.hidden[e - 1], model.routers.decide
    unit = feature / feature.norm()
    seen = sorted(mean_logits.tolist(), reverse=True)[:3] + F.relu(hidden.weight @ unit + hidden.bias).tolist()
    return sum(w * s for w, s in zip(decide.weight[0].tolist(), seen, strict=True)) + float(decide.bias)


@torch.no_grad()
def test_routers_see_the_unit_feature_and_the_largest_mean_logits():
    """In training, of all experts, for every image."""
    model, images = made()
    output = model.train()(images)
    logits, query, said = output.logits, output.queries, output.routers
    assert logits.shape == (3, IMAGES, CLASSES)
    assert query is None
    assert said.shape == (2, IMAGES)
    for i in (0, 7):
        experts = experts_one_by_one(model, images[i])
        for e in (1, 2):
            mean = sum(z for _, z in experts[:e]) / e
            assert float(said[e - 1, i]) == pytest.approx(said_by_router(model, e, experts[e - 1][0], mean), abs=1e-4)


@torch.no_grad()
def test_an_answer_is_the_mean_of_the_experts_that_the_routers_asked():
    """Image by image; some stop after each expert."""
    model, images = made()
    output = model.eval()(images)
    answers, used = output.logits, output.experts_used
    assert output.queries is None
    for i in range(IMAGES):
        experts = experts_one_by_one(model, images[i])
        total, asked = experts[0][1], 1
        while asked < 3 and said_by_router(model, asked, experts[asked - 1][0], total / asked) > 0:
            total, asked = total + experts[asked][1], asked + 1
        assert int(used[i]) == asked
        torch.testing.assert_close(answers[i], total / asked, rtol=1e-4, atol=1e-4)
    assert used.unique().tolist() == [1, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize(("threshold", "experts"), [(1.0, 1), (0.0, 3)])
def test_experts_run_on_no_other_images(threshold, experts):
    """As many as were routed to each; at threshold 1 none goes on, at 0 all do, and that is the whole model."""
    model, images = made()
    seen = []
    for expert in model.query_encoder.backbone.network.experts:
        expert.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    used = model.eval()(images).experts_used
    assert seen == [IMAGES, int((used > 1).sum()), int((used > 2).sum())]
    assert IMAGES > seen[1] > seen[2] > 0
    seen.clear()
    model.routers.threshold = threshold
    output = model(images)
    answers, used = output.logits, output.experts_used
    assert seen == [IMAGES, *[IMAGES if experts == 3 else 0] * 2]
    assert used.tolist() == [experts] * IMAGES
    of_each = torch.stack([torch.stack([z for _, z in experts_one_by_one(model, image)]) for image in images], 1)
    torch.testing.assert_close(answers, of_each[:experts].mean(0), rtol=1e-4, atol=1e-4)


def test_routers_alone_are_trained():
    """Encoder and centers are frozen, BatchNorm keeps its statistics; a backward reaches every router."""
    model, images = made()
    model.train()(images).routers.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"routers"}
    assert len(trained) == 2 * 2 + 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


def test_a_few_classes_are_all_shown():
    """top_logits beyond the number of classes is all of them."""
    model, images = made("model.routers.top_logits=50")
    assert model.routers.decide.in_features == CLASSES + 16
    assert model.eval()(images).logits.shape == (IMAGES, CLASSES)
