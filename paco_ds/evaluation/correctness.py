"""Which images of a split were classified right, as a few bytes of metrics.json: a bit for each image, by its id."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from paco_ds.errors import DataError

KEY = "correct"  # of metrics.json


def packed(correct_N: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """`{images, bits}`: bits in base64, the first image in the highest bit of the first byte."""
    return {"images": len(correct_N), "bits": base64.b64encode(np.packbits(correct_N).tobytes()).decode()}


def unpacked(figures: Mapping[str, Any], place: str) -> npt.NDArray[np.bool_]:
    """Bool [N] of a metrics.json; `place` names it in an error.

    Raises:
        DataError: it has none, being of an earlier version, or a damaged one.
    """
    kept = figures.get(KEY)
    try:
        data = np.frombuffer(base64.b64decode(kept["bits"], validate=True), np.uint8)  # type: ignore[index]
        images = int(kept["images"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError, binascii.Error):
        data, images = np.empty(0, np.uint8), -1
    if images < 0 or len(data) != -(-images // 8):
        raise DataError(f"{place} does not say which images were classified right: evaluate the run again")
    return np.unpackbits(data, count=images).astype(bool)
