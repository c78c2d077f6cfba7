"""paco-predict: images a second from JPEG files, against decoding alone and the model alone.

    python tools/bench/predict.py [--images N] [--recipe NAME] [--batch N] [--wait MS] [--rounds N] [--json]

ours      `Predictor.stream` over paths, what paco-predict runs: read, decode, resize, crop, model, names of the top 5
decoding  the same views by the same threads, without a model
forward   the same batches through the model, from views that are ready

The three take turns in one process. Files are smooth random images of 500 x 375 pixels, JPEG of quality 90, 4:2:0.
Decoding is overlapped with the model, so ours should be as fast as the slower of the two; on a CPU, where both use the
same cores, no order of work is faster than their times added, which is the floor there. With --wait the model is a wait
of so many milliseconds an image, which takes no core, as an accelerator does: the overlap is measured without one.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from report import at_least, median_seconds, print_bars, print_table
from torch import Tensor

from paco_ds.config.load import load_recipe
from paco_ds.evaluation.predictor import Predictor, View
from paco_ds.training.build import Classes, build_model

BAR = 0.85
CLASSES = 1000


def write_images(folder: Path, number: int) -> list[Path]:
    """Smooth random images: noise of 20 x 15 scaled up, with a little fine noise, as photographs have."""
    generator, paths = np.random.default_rng(0), []
    for index in range(number):
        small = Image.fromarray(generator.integers(0, 256, (15, 20, 3), np.uint8))
        smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + generator.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noisy).save(encoded, "JPEG", quality=90, subsampling="4:2:0")
        paths.append(folder / f"{index}.jpg")
        paths[-1].write_bytes(encoded.getvalue())
    return paths


class Waiting(Predictor):
    """A model that takes time, and no core."""

    seconds = 0.0

    def _probabilities(self, views: Sequence[View]) -> Tensor:
        time.sleep(self.seconds * len(views))
        return torch.full((len(views), CLASSES), 1 / CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if the bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="files of one measurement")
    parser.add_argument("--recipe", default="imagenet_lt_resnet50", help="whose network, view and batch are used")
    parser.add_argument("--batch", type=int, help="images of a batch; the recipe's evaluation.batch by default")
    parser.add_argument("--wait", type=float, default=0.0, metavar="MS", help="milliseconds an image, without a model")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, in turn")
    parser.add_argument("--json", action="store_true", help="end with a JSON line for the bar")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(Path(__file__).resolve().parents[2] / "ds_configs/recipes" / f"{arguments.recipe}.yaml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (Waiting if arguments.wait else Predictor)(
        build_model(recipe, Classes((1,) * CLASSES, ())),
        recipe.model.backbone,
        [f"class {c}" for c in range(CLASSES)],
        recipe.views.evaluation,
        recipe.data.max_pixels,
        arguments.batch or recipe.evaluation.batch,
        autocast=False,
    ).to(device)
    Waiting.seconds = arguments.wait / 1000
    with TemporaryDirectory() as folder:
        paths = write_images(Path(folder), arguments.images)
        ready = [[view for view, _ in batch if isinstance(view, np.ndarray)] for batch in model._views(paths)]
        assert sum(map(len, ready)) == len(paths)

        def ours() -> int:
            return sum(isinstance(answer, tuple) for answer in model.stream(paths, 5))

        def decoding() -> int:
            return sum(map(len, model._views(paths)))

        def forward() -> list[int]:
            def of(views: list[View]) -> int:
                return len(model._named(model._probabilities(views), 5))

            return list(map(of, ready))

        works = {"ours": ours, "decoding": decoding, "forward": forward}
        seconds = median_seconds(works, arguments.rounds, warm_up=device == "cuda")
    slower, added = max(seconds["decoding"], seconds["forward"]), seconds["decoding"] + seconds["forward"]
    print_table(
        f"{arguments.images} JPEG files of 500 x 375, batches of {model.batch}, {device}, "
        f"{f'{arguments.wait} ms an image' if arguments.wait else recipe.model.backbone}, "
        f"{torch.get_num_threads()} threads, median of {arguments.rounds}",
        ["", "s", "images/s", "ours / this"],
        [
            [name, f"{value:.2f}", f"{arguments.images / value:.0f}", f"{value / seconds['ours']:.2f}"]
            for name, value in [*seconds.items(), ("slower of both", slower), ("both added", added)]
        ],
    )
    shares_cores = device == "cpu" and not arguments.wait
    floor = added if shares_cores else slower
    name = f"paco-predict / {'decoding and forward added' if shares_cores else 'slower of decoding and forward'}"
    bars = [at_least(name, floor / seconds["ours"], BAR, ours=seconds["ours"], floor=floor)]
    print_bars(bars, as_json=arguments.json)
    return 0 if all(bar.holds for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
