"""From an encoded image to its views."""

from paco_ds.data.stream.views.named import make_view
from paco_ds.data.stream.views.pair import MakeViews
from paco_ds.data.stream.views.view import Drawn, Operation, Pixels, Sampling, View

__all__ = ["Drawn", "MakeViews", "Operation", "Pixels", "Sampling", "View", "make_view"]
