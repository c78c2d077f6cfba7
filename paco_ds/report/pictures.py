"""Thumbnails that stand in a page, and those of the images that a run misclassified."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from paco_ds.config.load import load_recipe
from paco_ds.config.parse import one_line
from paco_ds.data.manifest import open_data
from paco_ds.data.pack.image_bytes import BadImage, ending_of, opened
from paco_ds.data.shard import BadSample, ShardReader
from paco_ds.errors import DataError, UserError

SIDE = 96  # pixels
MAX_PIXELS = 100_000_000  # of a picture; larger ones have no thumbnail


def thumbnail(read: Callable[[], bytes]) -> str | None:
    """JPEG in base64 of at most `SIDE` pixels, some 3 KB; None for what cannot be read."""
    try:
        data = read()
        picture = opened(data, ending_of(data))
        if picture.width * picture.height > MAX_PIXELS:
            return None
        with warnings.catch_warnings(action="ignore"):
            picture.draft("RGB", (2 * SIDE, 2 * SIDE))
            small = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, UserError, BadSample, BadImage):
        return None
    small.thumbnail((SIDE, SIDE))
    output = io.BytesIO()
    small.save(output, "JPEG", quality=75)
    return base64.b64encode(output.getvalue()).decode()


@dataclass(frozen=True)
class Pictures:
    """Of the misclassified images of a run.

    Attributes:
        of: thumbnail by id of the sample; none of what cannot be read.
        names: key of the sample in its shards, by id.
        missing: why there are none, in words; empty if there are.
    """

    of: Mapping[int, str] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    missing: str = ""


def pictures_of_mistakes(run: Path, final: Mapping[str, Any]) -> Pictures:
    """Read from the run's shards the images that metrics.json lists as mistakes.

    Args:
        final: the content of metrics.json.
    """
    mistakes = final.get("mistakes") or {"confused": [], "tail": []}
    wanted = sorted({each["image"] for group in (*mistakes["confused"], mistakes["tail"]) for each in group})
    if not wanted:
        return Pictures()
    try:
        manifest = open_data(load_recipe(run / "recipe.yaml").data, [final["split"]])
        if manifest.sha256 != final.get("manifest_sha256"):
            raise DataError(f"{manifest.storage.url} holds other shards than those that were evaluated")
        with ShardReader(manifest.storage, manifest.split(final["split"])) as reader:
            found = {image: thumbnail(partial(_encoded, reader, image)) for image in wanted}
            names = {image: reader.key_of(image) for image in wanted}
    except (UserError, OSError, IndexError, KeyError) as error:
        return Pictures(missing=one_line(error))
    return Pictures({image: jpeg for image, jpeg in found.items() if jpeg}, names)


def _encoded(reader: ShardReader, sample: int) -> bytes:
    return reader.read(sample).image
