"""Measurements of models: accuracy, cost, latency, layer entropies, frequencies."""
