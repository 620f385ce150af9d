"""Radial spectra by plain loops, which the tests compare with."""

from __future__ import annotations

import math

import numpy as np


def bin_of(i: int, j: int, height: int, width: int) -> int:
    """The bin of coefficient (i, j), by the sentence that defines it."""
    down, across = 2 * math.pi * min(i, height - i) / height, 2 * math.pi * min(j, width - j) / width
    ring = 2 * math.pi / min(height, width)
    if i == j == 0:
        return 0
    return max(1, math.floor(math.hypot(down, across) / ring + 0.5 + 1e-9))  # a half goes up, whatever it is rounded to


def spectra_by_loops(maps: np.ndarray) -> dict[str, np.ndarray]:
    """[N, H, W, C] in float64, a coefficient at a time."""
    images, height, width, _ = maps.shape
    values: dict[tuple[int, int], list[np.ndarray]] = {}
    for i in range(height):
        for j in range(width):
            rows, columns = np.arange(height)[:, None], np.arange(width)
            wave = np.exp(-2j * np.pi * (i * rows / height + j * columns / width)) / (height * width)
            amplitude = np.abs((maps * wave[None, :, :, None]).sum((1, 2)))
            for n in range(images):
                values.setdefault((n, bin_of(i, j, height, width)), []).append(amplitude[n])
    count = 1 + max(k for _, k in values)
    found = {name: np.zeros((images, count)) for name in ("log_amplitude", "amplitude", "power")}
    for (n, k), amplitudes in values.items():
        found["log_amplitude"][n, k] = np.log(np.maximum(amplitudes, 2.0**-24)).mean()
        found["amplitude"][n, k] = np.mean(amplitudes)
        found["power"][n, k] = np.square(amplitudes).mean()
    return found
