"""From an encoded image to its views."""

from paco_ds.data.stream.views.device import render
from paco_ds.data.stream.views.named import make_view
from paco_ds.data.stream.views.pair import MakeViews
from paco_ds.data.stream.views.raw import MakeRawViews, RawBatch, RawView, concatenated, raw_batch
from paco_ds.data.stream.views.view import Drawn, Operation, Pixels, Sampling, View

__all__ = [
    "Drawn",
    "MakeRawViews",
    "MakeViews",
    "Operation",
    "Pixels",
    "RawBatch",
    "RawView",
    "Sampling",
    "View",
    "concatenated",
    "make_view",
    "raw_batch",
    "render",
]
