"""Views rendered on a device have the draws of those made on the CPU, and their pixels within 2 / 255 in mean and
deviation, whatever else is in the batch; the host reads nothing of them."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils._python_dispatch import TorchDispatchMode

from paco_ds.config.views import (
    CifarKeyView,
    CifarView,
    MocoV2View,
    RandAugmentSettings,
    RandClsStackView,
    RandClsView,
    SimView,
    SmallView,
)
from paco_ds.data.shard import RawSample
from paco_ds.data.stream.decode import open_image
from paco_ds.data.stream.views import (
    Drawn,
    MakeRawViews,
    MakeViews,
    Operation,
    RawView,
    concatenated,
    make_view,
    raw_batch,
    render,
)
from paco_ds.data.stream.views.blur import Blur, Sharpness
from paco_ds.data.stream.views.color import Brightness, Contrast, Gray, Hue, Saturation
from paco_ds.data.stream.views.crop import Box, CenterCrop, PaddedCrop, ScaledAndShifted
from paco_ds.data.stream.views.cutout import Cutout
from paco_ds.data.stream.views.geometry import Flip, Interpolation, Rotate, ShearX, ShearY, TranslateX, TranslateY
from paco_ds.data.stream.views.instructions import Kind, instruction
from paco_ds.data.stream.views.point import AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd
from paco_ds.data.stream.views.schedule import schedule
from paco_ds.errors import RecipeError

CPU, SIZE, FILL = torch.device("cpu"), 96, (124, 116, 104)
PHOTOGRAPHS = list(map(np.array, load_sample_images().images))
MOVES = [
    kind(amount, interpolation, FILL)
    for interpolation in Interpolation
    for kind, amount in ((Rotate, -27), (Rotate, 11), (ShearX, 0.3), (ShearY, -0.2), (TranslateX, 0.31))
] + [TranslateY(-0.43, Interpolation.BICUBIC, FILL), TranslateY(0.1, Interpolation.BILINEAR, FILL)]
COLORS = [kind(factor) for kind in (Brightness, Contrast, Saturation, Sharpness) for factor in (0.1, 0.7, 1.3, 1.9)]
OPERATIONS: list[Operation] = [
    *MOVES,
    *COLORS,
    *map(Hue, (-0.1, 0.03, 0.4)),
    *map(Posterize, (0, 3, 8)),
    *map(Solarize, (0, 100, 256)),
    *map(Blur, (0.1, 1.0, 2.0)),
    *(Flip(), Gray(), AutoContrast(), Equalize(), Invert(), SolarizeAdd(80), Cutout(5, 90, 30)),
]


def raw(image, sampling, operations=(), size=SIZE):
    return RawView(sampling.patch(image), tuple(instruction(each, size) for each in operations))


def flat(raws):
    return torch.cat([torch.from_numpy(view.patch.pixels.copy()).flatten() for view in raws])


def rendered(raws, size=SIZE):
    """[n, size, size, 3] as on the CPU."""
    return render(flat(raws), raw_batch(raws), size, CPU).permute(0, 2, 3, 1).numpy()


def assert_alike(ours, theirs, limit=2.0):
    """Mean and deviation of each channel."""
    for of in (np.mean, np.std):
        np.testing.assert_allclose(of(ours, (0, 1)), of(theirs, (0, 1)), atol=limit)


@pytest.mark.parametrize("photograph", [0, 1])
def test_each_operation_is_that_of_the_cpu(photograph):
    """All in one batch; closer than asked, since only edges that a translation lets in mix with the color beyond."""
    image = PHOTOGRAPHS[photograph]
    box = Box(31, 52, 300, 410, 427, 640, SIZE)
    views = rendered([raw(image, box, (operation,)) for operation in OPERATIONS])
    for operation, ours in zip(OPERATIONS, views, strict=True):
        theirs = Drawn(box, (operation,)).render(image)
        assert_alike(ours, theirs, limit=1.0)
        assert np.abs(ours.astype(int) - theirs).mean() < 1, operation


@pytest.mark.parametrize(
    "sampling",
    [
        Box(31, 52, 300, 410, 427, 640, SIZE),
        Box(0, 0, SIZE, SIZE, 427, 640, SIZE),
        Box(200, 300, 50, 41, 427, 640, SIZE),
        Box(7, 3, 90, 420, 427, 640, SIZE),
        PaddedCrop(96, 144, 0, 30, SIZE, 8),
        PaddedCrop(96, 144, 16, 64, SIZE, 8),
        ScaledAndShifted(0.2, 3, -3, SIZE),
        ScaledAndShifted(1.3, 0, 2, SIZE),
    ],
    ids=str,
)
def test_each_sampling_is_that_of_the_cpu(sampling):
    """Within half a byte, and no pixel is off by more than two; black stays black."""
    ours, theirs = rendered([raw(PHOTOGRAPHS[0], sampling)])[0], sampling(PHOTOGRAPHS[0])
    assert_alike(ours, theirs, limit=0.5)
    # OpenCV rounds positions to 32nds of a pixel
    assert np.abs(ours.astype(int) - theirs).max() <= (16 if isinstance(sampling, ScaledAndShifted) else 2)
    assert (ours[(theirs == 0).all(2)] <= 1).all()


SETTINGS: list[Any] = [
    RandClsStackView(size=64, randaugment=RandAugmentSettings(operations=3, probability=0.8)),
    RandClsView(size=64),
    SimView(size=64),
    MocoV2View(size=64),
    CifarKeyView(size=64),
    CifarView(size=64),
    SmallView(size=64),
]


def photograph(number, short=None):
    image = Image.fromarray(PHOTOGRAPHS[number % 2])
    if short:
        image = image.resize((round(image.width * short / image.height), short), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, subsampling="4:2:0")
    return RawSample(f"{number}", 0, "photographs", file.getvalue())


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.name)
def test_the_distribution_of_a_view_is_that_of_the_cpu(settings):
    """The same draws of whole views, from the files: 2 / 255 over all of them, and 4 for a single one, where an
    operation may find a stretch of colors to be full that is not."""
    view, ours, theirs = make_view(settings), [], []
    for number in range(24):
        sample = photograph(number, short=64 if settings.name in ("small", "cifar") else None)
        (one,) = MakeRawViews((view,), 10**9, 64)(sample, np.random.default_rng(number))
        ours.append(one)
        theirs += MakeViews((view,), 10**9)(sample, np.random.default_rng(number))
    found = rendered(ours, size=64)
    assert_alike(found.reshape(-1, 64, 3), np.stack(theirs).reshape(-1, 64, 3), limit=0.5)
    for one, other in zip(found, theirs, strict=True):
        assert_alike(one, other, limit=4.0)


@pytest.mark.parametrize("shape", [(64, 64), (31, 90), (1, 1), (200, 7), (1, 3000), (3000, 1)], ids=str)
def test_any_image_can_be_rendered(shape):
    """One pixel, or a strip."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for settings in SETTINGS:
        small = settings.model_copy(update={"size": 28})
        drawn = make_view(small).draw(shape[0], shape[1], np.random.default_rng(0))
        assert_alike(rendered([raw(image, drawn.sampling, size=28)], 28)[0], drawn.sampling(image), limit=8)


def test_a_part_of_many_pixels_is_averaged_first():
    """At most twice the view's pixels are sent along its shorter side, and the view hardly changes."""
    image = np.asarray(Image.fromarray(PHOTOGRAPHS[0]).resize((1920, 1281), Image.Resampling.BICUBIC))
    box = Box(20, 33, 1203, 1407, 1281, 1920, SIZE)
    maker = MakeRawViews((), 10**9, SIZE)
    view = maker._raw(Drawn(box), image)
    assert min(view.patch.pixels.shape[:2]) < 2 * SIZE
    ours, theirs = rendered([view])[0].astype(int), box(image).astype(int)
    assert_alike(ours, theirs, limit=1)
    error = np.abs(ours - theirs)[1:-1, 1:-1].mean()
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        assert error < np.abs(np.roll(ours, shift, (0, 1)) - theirs)[1:-1, 1:-1].mean()


def test_colors_decoded_quickly_stay_within_two_bytes():
    """Chroma of half resolution is repeated; luma is the same."""
    for number in (0, 1):
        whole = open_image(photograph(number), 10**9).decode()
        quick = open_image(photograph(number), 10**9, quick=True).decode()
        assert_alike(quick, whole, limit=0.5)
        assert np.abs(quick.astype(int) - whole).mean() < 2


def some_views(count=12):
    view = make_view(RandClsStackView(size=32, randaugment=RandAugmentSettings(operations=2, probability=1.0)))
    return [MakeRawViews((view,), 10**9, 32)(photograph(n), np.random.default_rng(n))[0] for n in range(count)]


def test_a_view_does_not_depend_on_its_batch():
    """Alone, in another order, in another chunk, with more threads: bit for bit."""
    raws = some_views()
    together = rendered(raws, size=32)
    np.testing.assert_array_equal(rendered(raws[::-1], size=32)[::-1], together)
    for number, view in enumerate(raws):
        np.testing.assert_array_equal(rendered([view], size=32)[0], together[number])
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        np.testing.assert_array_equal(rendered(raws, size=32), together)
    finally:
        torch.set_num_threads(threads)


def test_batches_of_loader_processes_are_those_of_one():
    """Shares of any size, each padded to its own longest sequence."""
    raws = some_views()
    whole = raw_batch(raws)
    joined = concatenated([raw_batch(raws[:1]), raw_batch(raws[1:5]), raw_batch(raws[5:])])
    for name in ("sides", "axes", "kinds", "numbers", "tables"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_two_views_of_different_kinds_are_rendered_together():
    """A cubic and an antialiased one, with their own numbers of operations."""
    query, key = make_view(SmallView(size=32)), make_view(CifarKeyView(size=32))
    made = MakeRawViews((query, key), 10**9, 32)
    pairs = [made(photograph(n, short=40), *map(np.random.default_rng, (n, n + 50))) for n in range(4)]
    views = [view for pair in pairs for view in pair]
    for number, found in enumerate(rendered(views, size=32)):
        np.testing.assert_array_equal(found, rendered([views[number]], size=32)[0])


NO_KERNEL = {"view", "_unsafe_view", "slice", "split", "unbind", "select", "permute", "expand", "unsqueeze", "detach"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "item"}


class Watched(TorchDispatchMode):
    """Counts operations that launch something, and refuses those whose result or shape the host would wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype is not torch.bool for i in args[1]), "indexed by a mask"
        self.count += name not in NO_KERNEL
        return function(*args, **(kwargs or {}))


def test_the_host_reads_nothing_and_launches_as_much_for_many_images():
    """All kinds are there; twice the images take as many steps."""
    each_once = {each.kind: each for each in (instruction(operation, 16) for operation in OPERATIONS)}.values()
    patch = Box(0, 0, 60, 50, 427, 640, 16).patch(PHOTOGRAPHS[0])
    raws = [RawView(patch, (each,)) for each in each_once]
    counts = []
    for times in (1, 1, 2):  # the first makes what is kept
        pixels, batch = flat(raws * times), raw_batch(raws * times)
        with Watched() as watched:
            render(pixels, batch, 16, CPU)
        counts.append(watched.count)
    assert counts[1] == counts[2] < 240
    assert len(each_once) == len(Kind) - 1


def test_an_image_meets_its_operations_in_order():
    """Whatever the others need; those that need a dear one wait for each other."""
    sequences = [
        (Hue(0.1), Saturation(0.5), Contrast(1.1)),
        (Saturation(0.5), Hue(0.1), Invert(), Hue(0.2)),
        (),
        (Invert(), Saturation(0.5), Hue(0.1)),
    ]
    batch = raw_batch([raw(PHOTOGRAPHS[0], Box(0, 0, 9, 9, 427, 640, 8), each, size=8) for each in sequences])
    met = [[] for _ in sequences]
    layers = schedule(batch)
    for layer in layers:
        for member in layer.members:
            met[member].append(layer.kind)
    names = {Hue: Kind.HUE, Saturation: Kind.MATRIX, Contrast: Kind.MATRIX, Invert: Kind.TABLE}
    assert met == [[names[type(each)] for each in sequence] for sequence in sequences]
    assert [list(layer.members) for layer in layers if layer.kind is Kind.HUE] == [[0, 1, 3], [1]]


def test_what_has_no_form_for_a_device_is_refused_in_a_line():
    """An operation or a sampling from elsewhere."""

    class Swirl:
        def __call__(self, view):
            return view

    with pytest.raises(RecipeError, match=r"^views.device: accelerator has no Swirl, .*; set views.device to cpu$"):
        instruction(Swirl(), 8)

    class View:
        def draw(self, height, width, rng):
            return Drawn(CenterCrop(16, 16))

    with pytest.raises(RecipeError, match=r"^views.device: accelerator has no CenterCrop, .*; set views.device to cpu"):
        MakeRawViews((View(),), 10**9, 16)(photograph(0), np.random.default_rng(0))
