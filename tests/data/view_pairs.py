"""Pairs of one operation, ours and PIL's or timm's, with the same parameters: for tests and the sheet of docs/data.md.

python -m tests.data.view_pairs docs/images/views.png
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm_ops
from torchvision.transforms import InterpolationMode, functional

from paco_ds.data.stream.views import Operation, Pixels
from paco_ds.data.stream.views.blur import Blur, Sharpness
from paco_ds.data.stream.views.color import Brightness, Contrast, Gray, Hue, Saturation
from paco_ds.data.stream.views.crop import Box, CenterCrop, FiveCrops
from paco_ds.data.stream.views.geometry import Flip, Interpolation, Rotate, ShearX, ShearY, TranslateX, TranslateY
from paco_ds.data.stream.views.point import AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd

FILL = (124, 116, 104)
_PIL_MODES = {
    Interpolation.NEAREST: Image.Resampling.NEAREST,
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
}
Rival = Callable[[Image.Image], Image.Image]


def operation_pairs() -> Iterator[tuple[str, Operation, Rival]]:
    """(name with parameters, ours, PIL's or timm's)."""
    for factor in (0.1, 0.6, 1.4, 1.9):
        yield f"brightness {factor}", Brightness(factor), _timm("Brightness", factor)
        yield f"contrast {factor}", Contrast(factor), _timm("Contrast", factor)
        yield f"color {factor}", Saturation(factor), _timm("Color", factor)
        yield f"sharpness {factor}", Sharpness(factor), _timm("Sharpness", factor)
    for shift in (-0.4, 0.1):
        yield f"hue {shift}", Hue(shift), partial(functional.adjust_hue, hue_factor=shift)
    yield "gray", Gray(), lambda image: functional.to_grayscale(image, 3)
    for sigma in (0.1, 0.5, 1.2, 2.0):
        yield f"blur {sigma}", Blur(sigma), partial(Image.Image.filter, filter=ImageFilter.GaussianBlur(sigma))
    yield "flip", Flip(), lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    yield "autocontrast", AutoContrast(), _timm("AutoContrast")
    yield "equalize", Equalize(), _timm("Equalize")
    yield "invert", Invert(), _timm("Invert")
    for bits in (1, 3, 4, 8):
        yield f"posterize {bits}", Posterize(bits), _timm("Posterize", bits)
    for threshold in (0, 180, 256):
        yield f"solarize {threshold}", Solarize(threshold), _timm("Solarize", threshold)
    yield "solarize add 110", SolarizeAdd(110), _timm("SolarizeAdd", 110)
    for mode in Interpolation:
        for sign in (1, -1):
            name = f"{mode.name.lower()} {'+' if sign > 0 else '-'}"
            yield f"rotate {name}30", Rotate(sign * 30, mode, FILL), _timm("Rotate", sign * 30, mode=mode)
            yield f"shear x {name}.29", ShearX(sign * 0.29, mode, FILL), _timm("ShearX", sign * 0.29, mode=mode)
            yield f"shear y {name}.29", ShearY(sign * 0.29, mode, FILL), _timm("ShearY", sign * 0.29, mode=mode)
            across = TranslateX(sign * 0.4321, mode, FILL)
            yield f"translate x {name}.43", across, _timm("TranslateXRel", sign * 0.4321, mode=mode)
            down = TranslateY(sign * 0.4321, mode, FILL)
            yield f"translate y {name}.43", down, _timm("TranslateYRel", sign * 0.4321, mode=mode)


def sampling_pairs(height: int, width: int) -> Iterator[tuple[str, Operation, Rival]]:
    """Crops and resizes of an image of that size."""
    boxes = ((0, 0, height, width), (20, 30, 224, 224), (5, 40, 380, 410), (60, 100, 130, 110), (0, 11, 427, 300))
    for top, left, rows, columns in boxes:
        ours = Box(top, left, rows, columns, height, width, 224)
        area = (left, top, left + columns, top + rows)
        yield f"crop {rows} x {columns}", ours, partial(_crop, area=area)
    yield "eval", CenterCrop(256, 224), lambda image: functional.center_crop(functional.resize(image, [256]), [224])
    bicubic = InterpolationMode.BICUBIC
    yield (
        "eval, bicubic",
        CenterCrop(256, 224, "bicubic"),
        lambda image: functional.center_crop(functional.resize(image, [256], bicubic), [224]),
    )
    yield "five crops", FiveCrops(248, 224), _five_crops


def _five_crops(image: Image.Image) -> Image.Image:
    crops = functional.five_crop(functional.resize(image, [248]), [224])
    return Image.fromarray(np.concatenate([np.array(crop) for crop in crops]))


def _crop(image: Image.Image, area: tuple[int, int, int, int]) -> Image.Image:
    return image.crop(area).resize((224, 224), Image.Resampling.BILINEAR)


def _timm(name: str, *values: float, mode: Interpolation | None = None) -> Rival:
    options = {} if mode is None else {"resample": _PIL_MODES[mode], "fillcolor": FILL}
    return lambda image: timm_ops.NAME_TO_OP[name](image, *values, **options)


def photographs() -> list[Pixels]:
    """scikit-learn's two sample photographs, 427 x 640."""
    return [np.array(image) for image in load_sample_images().images]


def squares() -> list[Pixels]:
    """A detailed part of each photograph, 224 x 224."""
    return [np.ascontiguousarray(image[110:334, 200:424]) for image in photographs()]


def main() -> int:
    """Draw the sheet: for each operation ours, PIL's or timm's, and ten times their difference."""
    photo, square = photographs()[1], squares()[1]
    pairs = [*_both(sampling_pairs(*photo.shape[:2]), photo), *_both(operation_pairs(), square)]
    pairs = [pair for pair in pairs if "-." not in pair[0] and "-3" not in pair[0] and "nearest" not in pair[0]]
    cells = [_cell(*pair) for pair in pairs]
    columns = 5
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    title = np.full((30, rows[0].shape[1], 3), 255, np.uint8)
    _write(title, "each: ours | PIL's or timm's at the same parameters | ten times their difference", 20)
    Image.fromarray(np.vstack([title, *rows])).quantize(256).save(sys.argv[1], optimize=True)
    return 0


def _both(pairs: Iterator[tuple[str, Operation, Rival]], image: Pixels) -> Iterator[tuple[str, Pixels, Pixels]]:
    for name, ours, rival in pairs:
        yield name, ours(image), np.asarray(rival(Image.fromarray(image)))


def _cell(name: str, ours: Pixels, rival: Pixels) -> Pixels:
    difference = np.abs(ours.astype(int) - rival) * 10
    tenfold = difference.clip(0, 255).astype(np.uint8)
    cell = np.full((96 + 22, 3 * 98 + 8, 3), 255, np.uint8)
    for number, picture in enumerate((ours, rival, tenfold)):
        small = cv2.resize(picture, (96, 96), interpolation=cv2.INTER_AREA)
        cell[18:114, 98 * number : 98 * number + 96] = small
    _write(cell, name, 13)
    return cell


def _write(picture: Pixels, text: str, bottom: int) -> None:
    cv2.putText(picture, text, (2, bottom), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)


if __name__ == "__main__":
    sys.exit(main())
