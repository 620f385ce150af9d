"""Batched histograms, moments and extrema of many tensors in one read."""

from .function import histogram
from .grids import uniform_grid

__all__ = ["histogram", "uniform_grid"]
