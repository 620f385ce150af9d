"""Batched histograms, moments and extrema of many tensors in one read."""

from .function import (
    BACKENDS,
    PER,
    Histogram,
    HistogramFallbackWarning,
    extrema,
    histogram,
    histogram_backend,
    moments,
    rows_of,
)
from .grids import MAX_BINS, CodeGrid, Grid, bfloat16_codes, dyadic_grid, regrid, regrid_codes, uniform_grid
from .moments import Moments

__all__ = [
    "BACKENDS",
    "MAX_BINS",
    "PER",
    "CodeGrid",
    "Grid",
    "Histogram",
    "HistogramFallbackWarning",
    "Moments",
    "bfloat16_codes",
    "dyadic_grid",
    "extrema",
    "histogram",
    "histogram_backend",
    "moments",
    "regrid",
    "regrid_codes",
    "rows_of",
    "uniform_grid",
]
