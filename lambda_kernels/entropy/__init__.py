"""Entropy of activations: the streaming meter, its state, its storage, and its reduction over processes."""

from .meter import EntropyMeter, gaussian_entropy, histogram_entropy, update_together

__all__ = ["EntropyMeter", "gaussian_entropy", "histogram_entropy", "update_together"]
