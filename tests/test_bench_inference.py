"""The bench of inference: it measures what the tables name, whole answers, and its bar ends as a line. No time is
asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch

# As `python tools/bench/inference.py` has it: benches are scripts that find their shared modules beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "bench"))

import inference

PAPER = {
    "ResNet-50": 1.0,
    "ResNeXt-50": 1.58,
    "ResNeXt-101": 3.01,
    "RIDEResNet, 1 expert": 0.99,
    "RIDEResNet, 2 experts": 1.45,
    "RIDEResNet, 3 experts": 1.84,
    "RIDEResNeXt, 1 expert": 1.57,
    "RIDEResNeXt, 2 experts": 2.29,
    "RIDEResNeXt, 3 experts": 3.13,
    "ResNet-152": 2.42,
}


@pytest.fixture(scope="module")
def networks():
    return {network.name: network for network in inference.networks()}


def test_every_network_of_tables_9_to_12_is_measured_beside_the_papers_ratio(networks):
    """Ten of them, with the ratios of the paper's milliseconds."""
    reference = networks["ResNet-50"].paper_ms
    assert {name: round(n.paper_ms / reference, 2) for name, n in networks.items()} == PAPER


def test_parameters_and_flops_are_the_known_ones(networks):
    """torchvision's 25.6 M and 4.09 G multiplications of ResNet-50, 60.2 M and 11.51 G of ResNet-152."""
    for name, parameters, multiplications in (("ResNet-50", 25_557_032, 4.09e9), ("ResNet-152", 60_192_808, 11.51e9)):
        assert networks[name].parameters == parameters
        assert networks[name].flops(224) / 2 == pytest.approx(multiplications, rel=2e-3)
    one, two, three = (networks[f"RIDEResNet, {n}"].flops(224) for n in ("1 expert", "2 experts", "3 experts"))
    assert three - two == two - one
    assert one < networks["ResNet-50"].flops(224)


def test_an_answer_is_what_the_model_answers_in_evaluation(networks):
    """Same logits as its forward on uint8 images; of experts their mean."""
    model = networks["RIDEResNet, 2 experts"].make("cpu")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = inference.answer(model, model.normalize(images))
        torch.testing.assert_close(logits, model(images)[0].mean(0))
    assert logits.shape == (2, inference.CLASSES)


def test_the_bar_of_three_experts_ends_the_output_as_a_line(capsys):
    """At a tiny size, in channels_last."""
    sizes = ["--batch", "2", "--size", "32", "--rounds", "1", "--channels-last", "--json"]
    status = inference.main([*sizes, "--only", "RIDEResNet, 3"])
    out = capsys.readouterr().out
    bar = json.loads(out.splitlines()[-1])
    assert bar["name"] == "RIDEResNet, 3 experts / ResNet-50, ms"
    assert (bar["bar"], status) == ("<= 2.2", int(not bar["holds"]))
    assert bar["floor"] / bar["rival"] == pytest.approx(1.4, abs=0.1)
    assert "1.84" in out


def test_a_word_without_a_network_is_named():
    """With the networks there are."""
    with pytest.raises(SystemExit, match="--only VGG: there are ResNet-50; "):
        inference.chosen(["VGG"])
