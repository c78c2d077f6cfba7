"""Owns the bench of views: both training views of the ResNet-50 recipe from encoded photographs, one thread.

    python tools/bench/views.py [--images N] [--repeats N] [--json]

ours       `MakeViews` of ds_configs/recipes/imagenet_lt_resnet50.yaml: randcls and sim from one decoded image
published  the same views as the paper's code makes them: PIL, torchvision's transforms and timm's RandAugment,
           the image decoded once for both, ToTensor and Normalize as there
bare       published without ToTensor and Normalize: what is left if those ran on the device, as ours do
floor      libjpeg-turbo's decoding of the whole image alone, which no view from whole images goes without

Photographs are scikit-learn's two (CC-BY), cropped and scaled to longer sides of 500 to 800 pixels and re-encoded as
JPEG with qualities of 85 to 95 and 4:2:0, as cameras and sites write them.
"""

import argparse
import io
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision import transforms

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import at_least, median_seconds, print_bars, print_table

from paco_ds.config.load import load_recipe
from paco_ds.data.shard import RawSample
from paco_ds.data.stream.views import MakeViews, make_view
from paco_ds.randomness import DrawPurpose, generator

RECIPE = Path(__file__).resolve().parents[2] / "ds_configs/recipes/imagenet_lt_resnet50.yaml"
BAR = 3.0


def photographs(count: int, seed: int = 0) -> list[RawSample]:
    """Encoded parts of the sample photographs, none like another."""
    rng = np.random.default_rng(seed)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    samples = []
    for number in range(count):
        source = sources[number % len(sources)]
        share = rng.uniform(0.7, 1.0)
        width, height = round(source.width * share), round(source.height * share)
        left, top = int(rng.integers(source.width - width + 1)), int(rng.integers(source.height - height + 1))
        longer = int(rng.integers(500, 801))
        image = source.crop((left, top, left + width, top + height))
        image = image.resize((longer, round(longer * height / width)), Image.Resampling.BICUBIC)
        if number % 3 == 0:  # a third are upright
            image = image.transpose(Image.Transpose.ROTATE_90)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(85, 96)), subsampling="4:2:0")
        samples.append(RawSample(f"photo-{number}", 0, "none", file.getvalue()))
    return samples


def published_views(*, on_device: bool) -> Callable[[bytes], tuple[Any, Any]]:
    """randcls and sim as the paper's code composes them; `on_device` leaves ToTensor and Normalize out."""
    from timm.data.auto_augment import rand_augment_transform

    last = (
        [] if on_device else [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.0)], p=1.0)
    fill = {"translate_const": int(224 * 0.45), "img_mean": (124, 116, 104)}
    randcls = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            jitter,
            rand_augment_transform("rand-n2-m10-mstd0.5", fill),
            *last,
        ]
    )
    sim = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            jitter,
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([_blurred], p=0.5),
            transforms.RandomHorizontalFlip(),
            *last,
        ]
    )

    def views(data: bytes) -> tuple[Any, Any]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return randcls(image), sim(image)

    return views


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def main() -> int:
    """Entry point; 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="photographs of one measurement")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each, in turn")
    parser.add_argument("--json", action="store_true", help="end with a JSON line for each bar")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    samples = photographs(arguments.images)
    recipe = load_recipe(RECIPE)
    ours = MakeViews((make_view(recipe.views.query), make_view(recipe.views.key)), recipe.data.max_pixels)
    published, bare = published_views(on_device=False), published_views(on_device=True)
    position = iter(range(10**9))  # other draws in each repeat

    def ours_of_all() -> None:
        for sample in samples:
            place = next(position)
            ours(sample, *(generator(stream, 1, 0, place) for stream in (DrawPurpose.QUERY_VIEW, DrawPurpose.KEY_VIEW)))

    works: dict[str, Callable[[], object]] = {
        "ours": ours_of_all,
        "published": lambda: [published(sample.image) for sample in samples],
        "bare": lambda: [bare(sample.image) for sample in samples],
        "floor": lambda: [simplejpeg.decode_jpeg(sample.image) for sample in samples],
    }
    seconds = median_seconds(works, arguments.repeats)
    rate = {name: arguments.images / value for name, value in seconds.items()}
    print_table(
        f"Both views of {arguments.images} photographs, one thread, median of {arguments.repeats}",
        ["", "images/s", "ms an image"],
        [[name, f"{rate[name]:.0f}", f"{1000 / rate[name]:.2f}"] for name in works],
        f"{sum(len(s.image) for s in samples) / len(samples) / 1000:.0f} kB an image",
    )
    ratio = rate["ours"] / rate["published"]
    bars = [
        at_least(
            "both views, images/s a core", ratio, BAR, ours=rate["ours"], rival=rate["published"], floor=rate["floor"]
        )
    ]
    print_bars(bars, as_json=arguments.json)
    return 0 if all(bar.holds for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
