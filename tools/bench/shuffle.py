"""Owns the bench of shuffling: how well an epoch is mixed, beside a true permutation of the same images.

    python tools/bench/shuffle.py [--plot FILE.png] [--json]

437,513 images of 8,142 classes in the sizes of a long tail, 300 shards, batches of 128, in two builds: one in drawn
order, as `build_shards.py` writes it, and one sorted by class, the worst there is. Three figures of each order:

classes in a batch      more is better; a permutation shows what is possible
seen again              median number of steps after which an image's class comes again, in steps of a permutation
copies within 64 steps  of class-balanced sampling: share of images that come again within 64 steps (a queue of 8192)

Bar: at least 0.97 of the classes that a permutation has in a batch, on the build sorted by class.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import at_least, print_bars, print_table

from paco_ds.data.stream.order import EpochOrder
from paco_ds.data.stream.sampler import ClassSampler

IMAGES, CLASSES, SHARDS, BATCH = 437_513, 8_142, 300, 128
BAR = 0.97
QUEUE_STEPS = 64


class Build:
    """Labels of a build, by id, and its shards."""

    def __init__(self, labels: np.ndarray) -> None:
        self._labels = labels.astype(np.int32)
        self.counts = tuple(len(part) for part in np.array_split(labels, SHARDS))

    def labels(self) -> np.ndarray:
        """Labels by id, int32."""
        return self._labels


def long_tail() -> np.ndarray:
    """Images of each class: the largest 1,000, the smallest 2, as in iNaturalist 2018."""
    counts = np.maximum(1000 * (np.arange(CLASSES) + 1.0) ** -0.35, 2)
    for _ in range(50):
        counts = np.clip(counts * IMAGES / counts.sum(), 2, 1000)
    whole = np.floor(counts).astype(int)
    whole[: IMAGES - whole.sum()] += 1
    return whole


def epoch_of(build: Build, counts: np.ndarray, sampler: str) -> np.ndarray:
    """Ids of all batches of the third of ten epochs: int64 [steps, BATCH]."""
    sequence = None
    if sampler != "instance_balanced":
        sequence = ClassSampler(sampler, build.counts, build, tuple(counts), seed=1, epochs=10).sequence(2)  # type: ignore[arg-type]
    order = EpochOrder(build.counts, BATCH, seed=1, epoch=2, window=64, sequence=sequence)
    windows = range(-(-order.steps // order.window))
    return np.concatenate([order.window_ids(number, range(BATCH)).T for number in windows])


def permuted(ids: np.ndarray) -> np.ndarray:
    """The same images in an order drawn of all orders."""
    return np.random.default_rng(0).permutation(ids.ravel()).reshape(ids.shape)


def classes_in_batches(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Different classes of each batch."""
    of_batch = np.sort(labels[ids], axis=1)
    return 1 + (np.diff(of_batch, axis=1) != 0).sum(axis=1)


def steps_until_again(what: np.ndarray) -> np.ndarray:
    """Steps from each image (or class) to its next one: int64, of all that come again."""
    flat = what.ravel()
    step = np.arange(len(flat)) // what.shape[1]
    by_kind = np.lexsort((step, flat))
    same = np.diff(flat[by_kind]) == 0
    return np.diff(step[by_kind])[same]


def main() -> int:
    """Entry point; 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="write the distribution of classes in a batch as a picture")
    parser.add_argument("--json", action="store_true", help="end with a JSON line for each bar")
    arguments = parser.parse_args()
    counts = long_tail()
    in_order = np.repeat(np.arange(CLASSES), counts)
    builds = {
        "normal build": Build(np.random.default_rng(3).permutation(in_order)),
        "sorted by class": Build(in_order),
    }
    rows, found = [], {}
    for sampler in ("instance_balanced", "square_root", "class_balanced"):
        for name, build in builds.items():
            ours = epoch_of(build, counts, sampler)
            for kind, ids in (("ours", ours), ("permutation", permuted(ours))):
                mixed = classes_in_batches(build.labels(), ids)
                found[sampler, name, kind] = mixed
                again = steps_until_again(ids)
                near = (again < QUEUE_STEPS).sum() / ids.size
                row = [f"{sampler}, {name}, {kind}", f"{mixed.mean():.2f}", f"{np.percentile(mixed, 1):.0f}"]
                class_again = steps_until_again(build.labels()[ids])
                rows.append([*row, f"{np.median(class_again):.0f}", f"{100 * near:.2f} %"])
    print_table(
        f"An epoch of {IMAGES} images of {CLASSES} classes, {SHARDS} shards, batches of {BATCH}",
        ["", "classes in a batch", "1 % have at most", "class again after", f"image again in {QUEUE_STEPS} steps"],
        rows,
        "steps; medians, and means of the classes",
    )
    if arguments.plot:
        plot(found, arguments.plot)
    mean = {key: float(values.mean()) for key, values in found.items()}
    bars = [
        at_least(
            f"classes in a batch, {sampler}, {name}",
            mean[sampler, name, "ours"] / mean[sampler, name, "permutation"],
            BAR,
            ours=mean[sampler, name, "ours"],
            rival=mean[sampler, name, "permutation"],
        )
        for sampler, name, kind in found
        if kind == "ours"
    ]
    print_bars(bars, as_json=arguments.json)
    return 0 if all(bar.holds for bar in bars) else 1


def plot(found: dict[tuple[str, str, str], np.ndarray], path: Path) -> None:
    """Distribution of the classes in a batch for the default sampler."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for (sampler, name, kind), mixed in found.items():
        if sampler == "instance_balanced":
            values, times = np.unique(mixed, return_counts=True)
            style = {"marker": "o", "markersize": 3} if kind == "ours" else {"linestyle": "--"}
            axes.plot(values, 100 * times / len(mixed), label=f"{name}, {kind}", **style)
    axes.set_xlabel(f"classes in a batch of {BATCH}")
    axes.set_ylabel("batches, %")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
