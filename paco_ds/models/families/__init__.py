"""Families of backbones, one file each; a new family is a new file here with a `FAMILY`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from paco_ds.models.families.base import USUAL_SIZES, Family, ImageSizes, Network

__all__ = ["USUAL_SIZES", "Family", "ImageSizes", "Network", "families"]


def families() -> Iterator[Family]:
    """Every family of the package."""
    for name in sorted({info.name for info in pkgutil.iter_modules(__path__)} - {"base"}):
        yield importlib.import_module(f"{__name__}.{name}").FAMILY
