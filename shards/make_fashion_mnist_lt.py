#!/usr/bin/env python3
"""Make shards/fashion-mnist-lt/*.gz from the original Fashion-MNIST files.

The originals are the four files of https://github.com/zalandoresearch/fashion-mnist, in Debian the package
dataset-fashion-mnist (/usr/share/datasets/fashion-mnist). train is long-tailed: class c of 10 has
int(1000 * 100^(-c/9)) images, the exponential profile of Cui et al. 2019 with imbalance factor 100. val is
balanced, from original training images that train does not use; test is balanced, from the original test
images. Prints the mean and std of train's pixels for the card.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np

CLASSES, LARGEST, FACTOR = 10, 1000, 100
VAL_PER_CLASS, TEST_PER_CLASS = 400, 200


def draw(labels: np.ndarray, counts: list[int], rng: np.random.Generator, used: np.ndarray) -> np.ndarray:
    """Draw ``counts[c]`` unused samples of every class c and mark them as used; their positions, ascending."""
    chosen = []
    for label, count in enumerate(counts):
        free = np.flatnonzero((labels == label) & ~used)
        chosen.append(rng.choice(free, count, replace=False))
    positions = np.sort(np.concatenate(chosen))
    used[positions] = True
    return positions


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 ``array`` as gzipped IDX, without a time stamp, so that the bytes are reproducible."""
    header = bytes((0, 0, 0x08, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))


def main() -> None:
    """Draw the three splits and write them."""
    parser = argparse.ArgumentParser(description="Make the long-tailed Fashion-MNIST that ships with paco_ds.")
    parser.add_argument("originals", type=Path, help="folder with the four original .gz files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "fashion-mnist-lt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    tail = [int(LARGEST * FACTOR ** (-c / (CLASSES - 1))) for c in range(CLASSES)]
    plans = {
        "train": {"train": tail, "val": [VAL_PER_CLASS] * CLASSES},
        "t10k": {"test": [TEST_PER_CLASS] * CLASSES},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for original, splits in plans.items():
        images = read_idx(arguments.originals / f"{original}-images-idx3-ubyte.gz")
        labels = read_idx(arguments.originals / f"{original}-labels-idx1-ubyte.gz")
        used = np.zeros(len(labels), bool)
        for split, counts in splits.items():
            positions = draw(labels, counts, rng, used)
            write_idx(arguments.output / f"{split}-images-idx3-ubyte.gz", images[positions])
            write_idx(arguments.output / f"{split}-labels-idx1-ubyte.gz", labels[positions])
            if split == "train":
                pixels = images[positions] / 255
                print(f"mean {pixels.mean():.4f} std {pixels.std():.4f} of {len(positions)} images: {tail}")


if __name__ == "__main__":
    # The checkout need not be installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from paco_ds.data.pack.sources.idx import read_idx

    main()
