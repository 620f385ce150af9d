"""Batched histograms, moments and extrema of many tensors in one read."""
