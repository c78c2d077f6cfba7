"""Pixels of every operation beside PIL's and timm's at the same parameters, on real photographs."""

import numpy as np
import pytest
from PIL import Image

from tests.data.view_pairs import operation_pairs, photographs, sampling_pairs, squares

SQUARES, PHOTOS = squares(), photographs()
# Rounding of another kind, and not a pixel more: what is left for blur and geometry is another filter's tail.
WITHIN_ONE = (
    "brightness",
    "contrast",
    "color",
    "sharpness",
    "gray",
    "translate",
    "solarize",
    "posterize",
    "crop",
    "eval",
)
EXACT = ("flip", "invert", "equalize", "autocontrast", "solarize", "posterize")


def assert_alike(name, ours, rival):
    """Channel mean and deviation within 2 / 255."""
    assert ours.shape == rival.shape
    assert ours.dtype == np.uint8
    for of in (np.mean, np.std):
        np.testing.assert_allclose(of(ours, (0, 1)), of(rival, (0, 1)), rtol=0, atol=2, err_msg=name)
    if name.startswith(EXACT):
        np.testing.assert_array_equal(ours, rival, err_msg=name)
    if name.startswith(WITHIN_ONE):
        difference = np.abs(ours.astype(int) - rival)
        assert difference.max() <= 1, name


@pytest.mark.parametrize(
    ("name", "ours", "rival"), operation_pairs(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_operation_gives_the_pixels_of_pil_and_timm(name, ours, rival):
    """Of both photographs; the input is left as it was."""
    for square in SQUARES:
        before = square.copy()
        view, other = ours(square), np.asarray(rival(Image.fromarray(square)))
        assert_alike(name, view, other)
        np.testing.assert_array_equal(square, before)


@pytest.mark.parametrize(
    ("name", "ours", "rival"), sampling_pairs(427, 640), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_crop_has_the_pixels_of_pil(name, ours, rival):
    """Enlarged, shrunk, of any shape; evaluation as torchvision's Resize and CenterCrop."""
    for photo in PHOTOS:
        assert_alike(name, ours(photo), np.asarray(rival(Image.fromarray(photo))))
