"""Owns the bench of views: both training views of the ResNet-50 recipe from encoded photographs, one thread.

    python tools/bench/views.py [--images N] [--repeats N] [--device cpu|cuda] [--dry] [--json]

ours       `MakeViews` of ds_configs/recipes/imagenet_lt_resnet50.yaml: randcls and sim from one decoded image
published  the same views as the paper's code makes them: PIL, torchvision's transforms and timm's RandAugment,
           the image decoded once for both, ToTensor and Normalize as there
bare       published without ToTensor and Normalize: what is left if those ran on the device, as ours do
raw        what is left for the loader process with `views.device: accelerator`: decode, draw, cut out
floor      libjpeg-turbo's decoding of the whole image alone, which no view from whole images goes without

raw is measured on these photographs and on the same as `--resize-short 256` stores them, beside ours. `handed over` is
both with the copy into memory shared with the rank, for 32 images at a time. With --device, the rest of raw's work runs
there, and with a GPU torchvision's decoding of a batch of files on it (`on_device`, `decode_cuda`).

Photographs are scikit-learn's two (CC-BY), cropped and scaled to longer sides of 500 to 800 pixels and re-encoded as
JPEG with qualities of 85 to 95 and 4:2:0, as cameras and sites write them.
"""

import argparse
import io
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import at_least, median_seconds, print_bars, print_table

from paco_ds.config.load import load_recipe
from paco_ds.data.pack.image_bytes import resized
from paco_ds.data.shard import RawSample
from paco_ds.data.stream.load import Loaded, collate
from paco_ds.data.stream.partition import Planned
from paco_ds.data.stream.views import MakeRawViews, MakeViews, RawView, make_view, raw_batch, render
from paco_ds.randomness import DrawPurpose, generator

RECIPE = Path(__file__).resolve().parents[2] / "ds_configs/recipes/imagenet_lt_resnet50.yaml"
BAR, RAW_BAR, RAW_SMALL_BAR = 3.0, 1.9, 3.0
PART, SHORT = 32, 256


def photographs(count: int, seed: int = 0) -> list[RawSample]:
    """Encoded parts of the sample photographs, none like another."""
    from sklearn.datasets import load_sample_images  # seconds of a core, for who wants photographs

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


def noise(count: int, side: int = 64) -> list[RawSample]:
    """Small encoded images of blurred noise, where nothing is measured."""
    rng = np.random.default_rng(0)
    images = [
        cv2.GaussianBlur(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), (0, 0), 1.5) for _ in range(count)
    ]
    return [
        RawSample(f"noise-{n}", 0, "none", cv2.imencode(".jpg", each)[1].tobytes()) for n, each in enumerate(images)
    ]


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


def smaller(samples: list[RawSample]) -> list[RawSample]:
    """As `paco-build-shards build --resize-short 256` stores them."""
    return [replace(sample, image=bytes(resized(sample.image, "jpg", SHORT, 90)[0])) for sample in samples]


Maker = MakeViews | MakeRawViews


def makers() -> tuple[MakeViews, MakeRawViews]:
    """Whole and raw views of the recipe."""
    recipe = load_recipe(RECIPE)
    views = tuple(map(make_view, (recipe.views.query, recipe.views.key)))
    return MakeViews(views, recipe.data.max_pixels), MakeRawViews(
        views, recipe.data.max_pixels, recipe.views.query.size
    )


_POSITIONS = iter(range(10**9))  # other draws in each repeat


def made(maker: Maker, sample: RawSample) -> Any:
    """Both views of a sample, with draws of their own."""
    place = next(_POSITIONS)
    return maker(sample, *(generator(view, 1, 0, place) for view in (DrawPurpose.QUERY_VIEW, DrawPurpose.KEY_VIEW)))


def each(maker: Maker, samples: list[RawSample]) -> None:
    """Views of all samples, dropped at once."""
    for sample in samples:
        made(maker, sample)


def handed_over(maker: Maker, samples: list[RawSample]) -> None:
    """Views of all samples, as parts of 32 in shared memory."""
    for first in range(0, len(samples), PART):
        some = samples[first : first + PART]
        part = collate([Loaded(Planned(0, 0, n), made(maker, sample), 0) for n, sample in enumerate(some)])
        for pixels in [part.views] if part.views is not None else [pixels for pixels, _ in part.raw]:
            pixels.share_memory_()


def decoded(samples: list[RawSample]) -> None:
    """All images whole, dropped at once."""
    for sample in samples:
        simplejpeg.decode_jpeg(sample.image)


def on_device(device: torch.device, *, dry: bool = False) -> dict[str, float]:
    """The device's part: images/s whose two views it renders, and ms of the host for a micro-batch of 32."""
    _, maker = makers()
    count, repeats = (4, 1) if dry else (32, 30)
    pairs = [made(maker, sample) for sample in (noise if dry else photographs)(count)]
    views: list[RawView] = [pair[number] for number in range(2) for pair in pairs]
    pixels = torch.from_numpy(np.concatenate([view.patch.pixels.ravel() for view in views]))
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels
    batch = raw_batch(views)
    host: list[float] = []

    def work(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            before = time.perf_counter()
            render(pixels, batch, maker.size, device)
            host.append(time.perf_counter() - before)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    work(1 if dry else 3)
    host.clear()
    seconds = work(repeats)
    return {"images_per_second": count * repeats / seconds, "host_ms": 1000 * float(np.median(host))}


def decode_cuda(device: torch.device, *, dry: bool = False) -> dict[str, float | str]:
    """torchvision's `decode_jpeg` of a batch of files on a GPU, images/s, beside one core's; says why if it cannot."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {"skipped": "decode_jpeg(device='cuda') needs a GPU"}
    from torchvision.io import ImageReadMode, decode_jpeg

    samples = photographs(4 if dry else 128)
    files = [torch.frombuffer(bytearray(sample.image), dtype=torch.uint8) for sample in samples]

    def on_gpu() -> None:
        decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
        torch.cuda.synchronize(device)

    try:
        seconds = median_seconds({"gpu": on_gpu, "core": lambda: decoded(samples)}, 1 if dry else 9)
    except RuntimeError as error:  # a torchvision without nvJPEG
        return {"skipped": str(error).splitlines()[0]}
    return {"images_per_second": len(files) / seconds["gpu"], "of_a_core": len(files) / seconds["core"]}


def main() -> int:
    """Entry point; a bar that does not hold is printed as such and is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="photographs of one measurement")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each, in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="also render raw views there, and decode on a GPU")
    parser.add_argument("--dry", action="store_true", help="a few images once: no figures")
    parser.add_argument("--json", action="store_true", help="end with a JSON line for each bar")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, repeats = (4, 1) if arguments.dry else (arguments.images, arguments.repeats)
    samples = photographs(images)
    small = smaller(samples)
    ours, raw = makers()
    published, bare = published_views(on_device=False), published_views(on_device=True)
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: each(ours, samples),
        "published": lambda: [published(sample.image) for sample in samples],
        "bare": lambda: [bare(sample.image) for sample in samples],
        "raw": lambda: each(raw, samples),
        "floor": lambda: decoded(samples),
        f"ours, {SHORT}": lambda: each(ours, small),
        f"raw, {SHORT}": lambda: each(raw, small),
        f"floor, {SHORT}": lambda: decoded(small),
        "ours, handed over": lambda: handed_over(ours, samples),
        "raw, handed over": lambda: handed_over(raw, samples),
        f"ours, {SHORT}, handed over": lambda: handed_over(ours, small),
        f"raw, {SHORT}, handed over": lambda: handed_over(raw, small),
    }
    seconds = median_seconds(works, repeats)
    rate = {name: images / value for name, value in seconds.items()}
    print_table(
        f"Both views of {images} photographs, one thread, median of {repeats}",
        ["", "images/s", "ms an image"],
        [[name, f"{rate[name]:.0f}", f"{1000 / rate[name]:.2f}"] for name in works],
        f"{sum(len(s.image) for s in samples) / len(samples) / 1000:.0f} kB an image",
    )
    rows = (
        ("both views, images/s a core", "ours", "published", "floor", BAR),
        ("left for a core with views on the device, images/s", "raw", "ours", "floor", RAW_BAR),
        (
            f"left for a core, shards of --resize-short {SHORT}, images/s",
            f"raw, {SHORT}",
            f"ours, {SHORT}",
            f"floor, {SHORT}",
            RAW_SMALL_BAR,
        ),
    )
    bars = [
        at_least(name, rate[one] / rate[rival], limit, ours=rate[one], rival=rate[rival], floor=rate[floor])
        for name, one, rival, floor, limit in rows
    ]
    print_bars(bars, as_json=arguments.json)
    if arguments.device:
        device = torch.device(arguments.device)
        torch.set_num_threads(threads)
        rendered, files = on_device(device, dry=arguments.dry), decode_cuda(device, dry=arguments.dry)
        print(json.dumps({"device": arguments.device, "both views on the device": rendered, "CUDA decode": files}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
