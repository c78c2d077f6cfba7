"""Views: sizes, ranges, what each operation does to known images, and how an image is decoded for two of them."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from paco_ds.config.views import (
    ChainView,
    CifarKeyView,
    CifarView,
    EvalView,
    MocoV2View,
    RandClsStackView,
    RandClsView,
    RegularView,
    Sim02View,
    SimView,
    SmallView,
)
from paco_ds.data.shard import RawSample
from paco_ds.data.stream.decode import EncodedImage, open_image
from paco_ds.data.stream.views import Drawn, MakeViews, make_view, pair
from paco_ds.data.stream.views.crop import Box, resampled
from paco_ds.data.stream.views.cutout import Cutout
from paco_ds.data.stream.views.geometry import Interpolation, TranslateX, TranslateY
from paco_ds.data.stream.views.point import AutoContrast, Equalize

PLAIN = SmallView(size=28, zoom=(1, 1), shift=0, flip=0, cutout=0)
IMAGE = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
CHAINS = (RegularView, RandClsView, RandClsStackView, SimView, Sim02View, MocoV2View, CifarKeyView)
RANDOM = [kind(size=28) for kind in (*CHAINS, CifarView, SmallView)]
ALL = [*RANDOM, EvalView(size=28, resize=32)]
SHAPES = [(28, 28), (60, 40), (31, 90), (1, 1), (200, 7), (1, 5000), (5000, 1)]


def draw(settings, image, seed=0):
    height, width = image.shape[:2]
    return make_view(settings).draw(height, width, np.random.default_rng(seed)).render(image)


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_view_is_square_bytes_whatever_the_image(settings, shape):
    """Any image, also one pixel or a strip, gives uint8 [size, size, 3] in one piece, and stays as it was."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    before = image.copy()
    for seed in range(3):
        view = draw(settings, image, seed)
        assert view.shape == (28, 28, 3)
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("settings", RANDOM, ids=lambda settings: settings.name)
def test_a_view_is_a_function_of_its_generator(settings):
    """The same draw gives the same bytes, and another one others."""
    np.testing.assert_array_equal(draw(settings, IMAGE, 3), draw(settings, IMAGE, 3))
    assert (draw(settings, IMAGE, 3) != draw(settings, IMAGE, 4)).any()


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        EvalView(size=28, resize=28),
        ChainView(size=28, area=(1, 1), ratio=(1, 1), flip=0, jitter=0),
        CifarView(size=28, padding=0, flip=0, autoaugment=None, cutout=0),
    ],
)
def test_without_strength_the_image_stays_as_it_is(settings):
    """Every setting turned off is the identity, as is evaluation at the image's own size."""
    np.testing.assert_array_equal(draw(settings, IMAGE), IMAGE)


def test_the_small_view_keeps_its_bits():
    """The demo's published results were made with these."""
    digest = hashlib.sha256()
    for seed in range(50):
        image = np.random.Generator(np.random.PCG64([9, seed])).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        for settings in (SmallView(size=28, cutout=0), SmallView(size=12, cutout=4, shift=1)):
            view = make_view(settings).draw(28, 28, np.random.Generator(np.random.PCG64([4, 1, 0, seed])))
            digest.update(view.render(image).tobytes())
    assert digest.hexdigest() == "e882814f0eb26dcf428eb66898973b341a2831a958f3a29d711503a20366a1c7"


@pytest.mark.parametrize("settings", [PLAIN, RegularView(size=28, area=(1, 1), ratio=(1, 1), jitter=0)])
def test_flip_mirrors_left_and_right(settings):
    """Probability 1 always flips."""
    np.testing.assert_array_equal(draw(settings.model_copy(update={"flip": 1.0}), IMAGE), IMAGE[:, ::-1])


@pytest.mark.parametrize("kind", [SmallView, CifarView])
def test_cutout_erases_at_most_its_square(kind):
    """One square of 6 pixels becomes black; at the edge a part of it hangs over."""
    white = np.full((28, 28, 3), 255, np.uint8)
    off = {"zoom": (1, 1), "shift": 0} if kind is SmallView else {"padding": 0, "autoaugment": None}
    settings = kind(size=28, cutout=6, **off)
    erased = [(draw(settings, white, seed) == 0).all(2).sum() for seed in range(200)]
    assert max(erased) == 36
    assert 9 <= min(erased) < 36


def test_cutout_covers_the_published_rows_and_columns():
    """From center - 8 to center + 7, clipped."""
    view = Cutout(y=3, x=20, side=16)(np.full((32, 32, 3), 9, np.uint8))
    assert (view[:11, 12:28] == 0).all()
    assert (view == 0).sum() == 11 * 16 * 3


def test_erasing_puts_noise_into_a_rectangle_of_the_published_sizes():
    """2 to 33 % of the view, sides .3 to 3.3 of each other; about as often as asked; nothing else changes."""
    view = ChainView(size=28, area=(1, 1), ratio=(1, 1), flip=0, jitter=0, erasing=0.75)
    changed = [(draw(view, IMAGE, seed) != IMAGE).any(2) for seed in range(300)]
    erased = [mask for mask in changed if mask.any()]
    assert 190 < len(erased) < 260
    for mask in erased:
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 < box / 28**2 < 0.36
        assert mask.sum() > 0.9 * box - 2  # a byte of noise may be that of the image


def test_erasing_draws_last_so_that_the_view_is_otherwise_the_same():
    """Crop, flip and colors of a seed do not depend on it."""
    plain, erasing = RegularView(size=28), RegularView(size=28, erasing=1.0)
    kept = [(draw(plain, IMAGE, seed) == draw(erasing, IMAGE, seed)).all(2).mean() for seed in range(50)]
    assert min(kept) > 0.63


def test_a_shift_moves_the_image_and_fills_with_black():
    """All shifts stay inside their range."""
    dot = np.zeros((29, 29, 3), np.uint8)
    dot[14, 14] = 255
    settings = SmallView(size=29, zoom=(1, 1), shift=3, flip=0, cutout=0)
    views = [draw(settings, dot, seed)[..., 0].astype(float) for seed in range(100)]
    centers = np.array([[(v * axis).sum() / v.sum() for axis in np.mgrid[:29, :29]] for v in views]) - 14
    assert np.abs(centers).max() <= 3.01
    assert np.abs(centers).max() > 2.5


@pytest.mark.parametrize("kind", [RegularView, MocoV2View])
def test_jitter_keeps_gray_images_gray(kind):
    """Brightness, contrast, saturation and hue act alike on equal channels."""
    gray = np.repeat(IMAGE[..., :1], 3, axis=2)
    view = draw(kind(size=28), gray).astype(int)
    assert np.abs(view[..., 0] - view[..., 1]).max() <= 1


def test_evaluation_takes_the_center():
    """The shorter side is resized, then the middle square is cut out."""
    image = np.zeros((28, 56, 3), np.uint8)
    image[:, 14:42] = 200
    assert (draw(EvalView(size=28, resize=28), image) == 200).all()


@pytest.mark.parametrize("operation", [AutoContrast(), Equalize()])
def test_one_color_has_nothing_to_stretch(operation):
    """No division by an empty range."""
    flat = np.full((8, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(operation(flat), flat)


@pytest.mark.parametrize("kind", [TranslateX, TranslateY])
@pytest.mark.parametrize("share", [-1.0, 1.0, 2.5])
def test_a_translation_out_of_the_view_leaves_its_fill(kind, share):
    """No pixel wraps around."""
    for interpolation in Interpolation:
        assert (kind(share, interpolation, (1, 2, 3))(IMAGE) == (1, 2, 3)).all()


def test_a_cifar_image_of_another_size_is_resized_first():
    """Its shorter side becomes the view's; at the view's own size pixels stay as they are."""
    image = np.full((64, 100, 3), 200, np.uint8)
    view = draw(CifarView(size=32, padding=0, autoaugment=None, cutout=0), image)
    assert (view == 200).all()


def encoded(height, width):
    """A smooth photograph as JPEG."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return RawSample("k", 0, "s.tar", file.getvalue())


@pytest.mark.parametrize(
    ("crops", "reduction"), [((800, 800), 2), ((1000, 448), 2), ((1000, 447), 1), ((1000, 100), 1)]
)
def test_an_image_is_decoded_once_at_the_scale_of_its_smaller_crop(monkeypatch, crops, reduction):
    """Both views take their parts from the same pixels."""
    asked = []

    def opened(sample, max_pixels, **options):
        image = pair_open(sample, max_pixels, **options)
        return EncodedImage(image.height, image.width, lambda r: asked.append(r) or image.decode(r))

    pair_open = pair.open_image
    monkeypatch.setattr(pair, "open_image", opened)

    class Fixed:
        def __init__(self, side):
            self.side = side

        def draw(self, height, width, rng):
            box = Box(0, 0, self.side, self.side, height, width, 224)
            return Drawn(box)

    views = MakeViews(tuple(map(Fixed, crops)), 10**9)(encoded(1000, 1200), *map(np.random.default_rng, range(2)))
    assert asked == [reduction]
    assert [view.shape for view in views] == [(224, 224, 3)] * 2


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (17, 31), (41, 53)])
def test_a_view_of_a_reduced_image_is_that_of_the_whole(reduction, top, left):
    """Mean and deviation within 2 / 255, and no shift of a pixel or more."""
    side = 56 * reduction + 3
    image = open_image(encoded(520, 600), 10**9)
    box = Box(top, left, side, side, image.height, image.width, 56)
    assert box.reduction == reduction
    whole, small = box(image.decode()).astype(int), box(image.decode(reduction)).astype(int)
    for of in (np.mean, np.std):
        np.testing.assert_allclose(of(small, (0, 1)), of(whole, (0, 1)), atol=2)
    error = np.abs(small - whole)[1:-1, 1:-1].mean()
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        assert error < np.abs(np.roll(small, shift, (0, 1)) - whole)[1:-1, 1:-1].mean()


def test_a_part_of_an_image_is_resampled_like_a_copy_of_it():
    """Strides of the whole image do not leak into the result."""
    part = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)[11:71, 20:100]
    np.testing.assert_array_equal(resampled(part, 28, 28), resampled(part.copy(), 28, 28))
    assert resampled(part, 28, 28).flags.c_contiguous
