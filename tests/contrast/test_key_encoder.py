"""The momentum of the key encoder: a function of the step, of the run's length and of the global batch."""

import math

import pytest
from torch import nn

from paco_ds.config.recipe import KeyEncoderSettings
from paco_ds.contrast.key_encoder import groups_of_keys, key_momentum
from paco_ds.errors import RecipeError
from tests.recipes import tiny_recipe


def test_the_momentum_is_constant_by_default_whatever_the_batch():
    """Both changes are off unless asked for."""
    settings = tiny_recipe("key_encoder={momentum: 0.99}").key_encoder
    assert settings
    assert {key_momentum(settings, step, 100, scale) for step in (0, 50, 99) for scale in (1, 4)} == {0.99}


def test_the_cosine_schedule_is_byols():
    """tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2: tau_base at first, half way up in the middle, 1 at the end."""
    settings = KeyEncoderSettings(momentum=0.99, momentum_schedule="cosine")
    values = [key_momentum(settings, k, 100) for k in range(101)]
    assert values[0] == pytest.approx(0.99, abs=1e-15)
    assert values[50] == pytest.approx(0.995, abs=1e-15)
    assert values[100] == 1.0
    assert values == sorted(values)
    for k, value in enumerate(values):
        assert value == pytest.approx(1 - 0.01 * (math.cos(math.pi * k / 100) + 1) / 2, abs=1e-15)


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_a_scaled_momentum_forgets_as_much_per_image(scale):
    """1 / scale steps at G hold as many images as one at G_ref, and keep the same share of the old weights."""
    settings = KeyEncoderSettings(momentum=0.99, scale_momentum=True)
    assert key_momentum(settings, 0, 10, scale) ** (1 / scale) == pytest.approx(0.99, abs=1e-12)


def test_the_schedule_rises_from_the_scaled_momentum():
    """The two go together."""
    settings = KeyEncoderSettings(momentum=0.99, scale_momentum=True, momentum_schedule="cosine")
    assert key_momentum(settings, 0, 10, scale=2.0) == pytest.approx(0.99**2)
    assert key_momentum(settings, 10, 10, scale=2.0) == 1.0


WITH, WITHOUT = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


@pytest.mark.parametrize(
    ("setting", "encoder", "groups"),
    [
        ("auto", WITH, "shuffle"),
        ("auto", WITHOUT, "local"),
        ("shuffle", WITH, "shuffle"),
        ("local", WITH, "local"),
        ("local", WITHOUT, "local"),
    ],
)
def test_groups_of_keys_are_shuffled_where_the_key_encoder_has_batch_norm(setting, encoder, groups):
    """By itself with auto; what the recipe says otherwise."""
    assert groups_of_keys(KeyEncoderSettings(batch_norm=setting), encoder) == groups


def test_a_shuffle_that_would_change_nothing_is_refused_with_the_reason():
    """An exchange of images between ranks would have no use."""
    with pytest.raises(RecipeError, match=r"neither backbone nor projection has BatchNorm.* set it to auto or local"):
        groups_of_keys(KeyEncoderSettings(), WITHOUT)


def test_the_default_stays_shuffle():
    """Recipes and runs of before mean what they meant."""
    assert KeyEncoderSettings().batch_norm == "shuffle"
