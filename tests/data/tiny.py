"""A tiny long-tailed data set as IDX files, and helpers to write and to damage files."""

from pathlib import Path

import cv2
import numpy as np
import torch

from paco_ds.data.stream.batches import MicroBatch

TINY_COUNTS = {"train": (30, 12, 5), "test": (4, 4, 4)}
TINY_CARD = """
name: tiny
license: MIT
source: idx
root: images
classes: [cat, dog, eel]
mean: [0.5, 0.5, 0.5]
std: [0.25, 0.25, 0.25]
shots: {many: 20, few: 10}
splits:
  train: {images: train-images, labels: train-labels}
  test: {images: test-images, labels: test-labels}
"""


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 ``array`` as an IDX file."""
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


def flip_byte(path: Path, position: int) -> None:
    """Invert one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def same_views(a: MicroBatch, b: MicroBatch) -> bool:
    """Both views of two batches are equal, byte for byte."""
    assert a.key is not None
    assert b.key is not None
    return torch.equal(a.query, b.query) and torch.equal(a.key, b.key)


def encoded(kind: str = ".jpg", side: int = 8, seed: int = 0) -> bytes:
    """A small image of noise as an encoded file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return bytes(cv2.imencode(kind, pixels)[1])
