"""The amplitude of token maps by radial frequency, binned from a discrete Fourier transform.

Pure functions of tensors that know no model.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lambda_kernels.entropy.state import STD_FLOOR

# Logarithms replace smaller amplitudes by this one, 2^-24: zero has no logarithm, and rounding errors mean nothing.
AMPLITUDE_FLOOR = STD_FLOOR

# As many maps are transformed at once as fit into this many bytes of float64.
BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class RadialBins:
    """The bins of the coefficients of an H × W map, by their distance from frequency zero.

    Coefficient (i, j) has the frequency ω = (2π·i'/H, 2π·j'/W), where i' = min(i, H−i) and j' = min(j, W−j), and lies at
    the distance ρ = |ω|: 0 for the mean, π for what alternates from row to row, up to √2·π where it does so both ways.
    With m = min(H, W), bin k is the ring of width 2π/m around 2π·k/m: k = ⌊ρ·m/2π + ½⌋, decided in whole numbers. Bin 0
    holds the frequency zero alone: whatever else lies within half a ring of it (there is some where H ≠ W) is in bin 1.
    """

    height: int  # H
    width: int  # W
    frequencies: tuple[
        float, ...
    ]  # 2k/m, the middle of each ring in units of π; the last ones exceed 1, in the corners
    coefficients: tuple[int, ...]  # how many of the H·W coefficients each bin holds
    highest: int  # ⌊m/2⌋, the bin at π, or the last one below it where m is odd
    indices: tuple[
        tuple[int, ...], ...
    ]  # bin of coefficient (i, j) of a transform of real numbers, H rows of ⌊W/2⌋ + 1
    multiplicities: tuple[
        int, ...
    ]  # how many of the whole transform's coefficients (·, j) of that half stands for, 1 or 2

    def averaging(self, device: torch.device) -> Tensor:
        """float64 [bins, H·(⌊W/2⌋ + 1)]: times values of the half transform it gives their mean in each bin."""
        index = torch.tensor(self.indices, device=device).flatten()
        weights = torch.tensor(self.multiplicities, dtype=torch.float64, device=device).repeat(self.height)
        sizes = torch.tensor(self.coefficients, dtype=torch.float64, device=device)
        rows = torch.arange(len(sizes), device=device)[:, None]
        return torch.where(index == rows, weights, 0.0) / sizes[:, None]


@functools.lru_cache(maxsize=64)
def radial_bins(height: int, width: int) -> RadialBins:
    """The bins of a map of `height` × `width` tokens."""
    if min(height, width) < 2:
        raise ValueError(
            f"a token map of {height} × {width} has no radial frequencies: it takes two or more tokens on each side"
        )
    side = min(height, width)
    half = width // 2 + 1
    mirrored = tuple(1 if 2 * j in (0, width) else 2 for j in range(half))
    rows = []
    for i in range(height):
        down = min(i, height - i)
        # ρ·m/2π is the square root of the fraction `square` / (H·W)²; its rounding is exact in whole numbers.
        squares = [(side * down * width) ** 2 + (side * j * height) ** 2 for j in range(half)]
        rows.append(tuple(_rounded_root(square, (height * width) ** 2) for square in squares))
    counts = [0] * (1 + max(map(max, rows)))
    for row in rows:
        for index, number in zip(row, mirrored, strict=True):
            counts[index] += number
    return RadialBins(
        height, width, tuple(2 * k / side for k in range(len(counts))), tuple(counts), side // 2, tuple(rows), mirrored
    )


def _rounded_root(numerator: int, denominator: int) -> int:
    """⌊√(numerator/denominator) + ½⌋, and 1 where that is 0 although the numerator is not."""
    return max((math.isqrt(4 * numerator // denominator) + 1) // 2, min(numerator, 1))


@dataclass(frozen=True)
class RadialSpectra:
    """Means over the channels and the coefficients of each bin, float64 `[N, bins]` for N maps, in the maps' units.

    A = |F|/(H·W), where F is the discrete Fourier transform; at zero A is |mean|. By Parseval's theorem the sum over the
    bins of `coefficients` times `power` is the mean square of a map.
    """

    log_amplitude: Tensor  # of ln A
    amplitude: Tensor  # of A
    power: Tensor  # of A²
    floored: Tensor  # int64 [N]: how many of a map's C·H·W amplitudes were below `AMPLITUDE_FLOOR` when ln A was taken


def radial_spectra(maps: Tensor) -> RadialSpectra:
    """The spectra of `maps`, [N, H, W, C] of any floating-point dtype, in float64 whatever that is."""
    if maps.dim() != 4 or maps.shape[-1] == 0:
        raise ValueError(f"maps must be [N, H, W, C] with one or more channels; got shape {tuple(maps.shape)}")
    bins = radial_bins(*maps.shape[1:3])
    if maps.device.type == "mps":  # has no float64
        maps = maps.cpu()
    if len(maps) == 0:  # which the transform refuses
        none = maps.new_zeros((0, len(bins.frequencies)), dtype=torch.float64)
        return RadialSpectra(none, none, none, torch.zeros(0, dtype=torch.int64, device=maps.device))
    averaging = bins.averaging(maps.device)
    multiplicities = torch.tensor(bins.multiplicities, device=maps.device)
    at_once = max(1, BYTES_AT_ONCE // (8 * maps[0].numel()))
    parts = [_spectra(part.double(), averaging, multiplicities) for part in maps.split(at_once)]
    return RadialSpectra(*map(torch.cat, zip(*parts, strict=True)))


def _spectra(maps: Tensor, averaging: Tensor, multiplicities: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    amplitude = torch.fft.rfft2(maps, dim=(1, 2), norm="forward").abs()
    floored = ((amplitude < AMPLITUDE_FLOOR) * multiplicities[:, None]).sum((1, 2, 3))
    means = (
        values.mean(-1).flatten(1) @ averaging.T
        for values in (amplitude.clamp(min=AMPLITUDE_FLOOR).log(), amplitude, amplitude.square())
    )
    return *means, floored
