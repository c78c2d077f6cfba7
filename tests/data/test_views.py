"""Views: sizes, ranges, and what each operation does to known images."""

import numpy as np
import pytest

from paco_ds.data.views import make_view
from paco_ds.view_settings import EvalView, RegularView, SmallView

PLAIN = SmallView(size=28, zoom=(1, 1), shift=0, flip=0, cutout=0)
IMAGE = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)


def draw(settings, image, seed=0):
    return make_view(settings)(image, np.random.default_rng(seed))


@pytest.mark.parametrize("settings", [SmallView(size=28), RegularView(size=28), EvalView(size=28, resize=32)])
@pytest.mark.parametrize("shape", [(28, 28), (60, 40), (31, 90), (1, 1), (200, 7)])
def test_a_view_is_square_bytes_whatever_the_image(settings, shape):
    """Any image, also one pixel, gives uint8 [size, size, 3] in one piece."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    view = draw(settings, image)
    assert view.shape == (28, 28, 3)
    assert view.dtype == np.uint8


@pytest.mark.parametrize("settings", [SmallView(size=28), RegularView(size=28)])
def test_a_view_is_a_function_of_its_generator(settings):
    """The same draw gives the same bytes, and another one others."""
    np.testing.assert_array_equal(draw(settings, IMAGE, 3), draw(settings, IMAGE, 3))
    assert (draw(settings, IMAGE, 3) != draw(settings, IMAGE, 4)).any()


@pytest.mark.parametrize("settings", [PLAIN, EvalView(size=28, resize=28)])
def test_without_strength_the_image_stays_as_it_is(settings):
    """Zoom 1, no shift, no flip and no cutout are the identity, as is evaluation at the image's own size."""
    np.testing.assert_array_equal(draw(settings, IMAGE), IMAGE)


def test_flip_mirrors_left_and_right():
    """Probability 1 always flips."""
    np.testing.assert_array_equal(draw(PLAIN.model_copy(update={"flip": 1.0}), IMAGE), IMAGE[:, ::-1])


def test_cutout_erases_at_most_its_square():
    """One square of 6 pixels becomes black; at the edge a part of it hangs over."""
    white = np.full((28, 28, 3), 255, np.uint8)
    settings = PLAIN.model_copy(update={"cutout": 6})
    erased = [(draw(settings, white, seed) == 0).all(2).sum() for seed in range(200)]
    assert max(erased) == 36
    assert 0 < min(erased) < 36


def test_a_shift_moves_the_image_and_fills_with_black():
    """All shifts stay inside their range."""
    dot = np.zeros((29, 29, 3), np.uint8)
    dot[14, 14] = 255
    settings = SmallView(size=29, zoom=(1, 1), shift=3, flip=0, cutout=0)
    views = [draw(settings, dot, seed)[..., 0].astype(float) for seed in range(100)]
    centers = np.array([[(v * axis).sum() / v.sum() for axis in np.mgrid[:29, :29]] for v in views]) - 14
    assert np.abs(centers).max() <= 3.01
    assert np.abs(centers).max() > 2.5


def test_jitter_keeps_grey_images_grey():
    """Brightness, contrast and saturation act alike on equal channels."""
    grey = np.repeat(IMAGE[..., :1], 3, axis=2)
    view = draw(RegularView(size=28, jitter=0.4), grey).astype(int)
    assert np.abs(view[..., 0] - view[..., 1]).max() <= 1


def test_evaluation_takes_the_center():
    """The shorter side is resized, then the middle square is cut out."""
    image = np.zeros((28, 56, 3), np.uint8)
    image[:, 14:42] = 200
    assert (draw(EvalView(size=28, resize=28), image) == 200).all()
