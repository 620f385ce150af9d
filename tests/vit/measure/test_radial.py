"""Radial spectra of token maps: signals whose spectrum is known, Parseval's theorem, and plain loops as an oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from spectra import bin_of, spectra_by_loops

from lambda_vit.measure import radial
from lambda_vit.measure.radial import AMPLITUDE_FLOOR, radial_bins, radial_spectra

SHAPES = [(2, 2), (14, 14), (7, 7), (3, 5), (4, 8), (8, 4), (2, 9), (6, 10), (5, 37), (37, 37)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_coefficient_is_in_the_bin_of_its_distance(shape):
    height, width = shape
    bins = radial_bins(height, width)
    counts = [0] * len(bins.coefficients)
    for i in range(height):
        for j in range(width):
            counts[bin_of(i, j, height, width)] += 1
    assert list(bins.coefficients) == counts
    assert sum(counts) == height * width
    assert min(counts) > 0
    assert counts[0] == 1
    side = min(shape)
    assert bins.frequencies == tuple(2 * k / side for k in range(len(counts)))
    assert bins.highest == side // 2
    assert bins.frequencies[bins.highest] == (1 if side % 2 == 0 else (side - 1) / side)
    assert bins.frequencies[-1] <= math.sqrt(2) + 1 / side
    assert [tuple(bin_of(i, j, height, width) for j in range(width // 2 + 1)) for i in range(height)] == list(
        bins.indices
    )


def test_what_lies_on_the_edge_of_a_ring_goes_outwards():
    """On a 4 × 8 map a step across is half a ring: every second one lies on an edge."""
    bins = radial_bins(4, 8)
    assert bins.indices[0] == (0, 1, 1, 2, 2)
    assert radial_bins(4, 40).indices[0][:16] == (0, *[1] * 14, 2)


@pytest.mark.parametrize("shape", SHAPES[:8])
def test_spectra_are_what_loops_give(shape):
    maps = noise(3, *shape, 5) + 0.7
    maps[1] *= 100
    found = radial_spectra(maps)
    for name, expected in spectra_by_loops(maps.numpy()).items():
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, rtol=1e-10, atol=1e-12)
    assert found.floored.tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_parseval(shape):
    maps = noise(4, *shape, 3) - 0.2
    total = radial_spectra(maps).power @ torch.tensor(radial_bins(*shape).coefficients, dtype=torch.float64)
    torch.testing.assert_close(total, maps.square().mean((1, 2, 3)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("i", "j", "expected"), [(3, 0, 3), (0, 3, 3), (2, 2, 3), (7, 0, 7), (0, 7, 7), (7, 7, 10), (1, 1, 1)]
)
def test_a_sinusoid_lands_in_its_bin(i, j, expected):
    rows, columns = torch.arange(14, dtype=torch.float64)[:, None], torch.arange(14, dtype=torch.float64)
    phase = 2 * math.pi * (i * rows + j * columns) / 14
    # at π a sine of these points is zero everywhere
    maps = 3 * torch.cos(phase + (0 if 7 in (i, j) else 0.4))[None, :, :, None]
    power = radial_spectra(maps).power[0]
    bins = radial_bins(14, 14)
    assert power[expected] * bins.coefficients[expected] == pytest.approx(float(maps.square().mean()), rel=1e-12)
    assert power.sum() == pytest.approx(float(power[expected]), rel=1e-12)
    # a cosine is two waves of half its size, and at π in each direction it is one wave
    waves, each = (1, 3.0) if {i, j} <= {0, 7} else (2, 1.5)
    amplitude = radial_spectra(maps).amplitude[0]
    assert float(amplitude[expected]) == pytest.approx(waves * each / bins.coefficients[expected], rel=1e-12)


def test_a_constant_map_has_its_mean_alone():
    maps = torch.full((2, 14, 14, 3), -2.5)
    found = radial_spectra(maps)
    assert found.amplitude[:, 0].tolist() == pytest.approx([2.5, 2.5], rel=1e-14)
    assert float(found.amplitude[:, 1:].max()) < 1e-14
    assert found.log_amplitude[:, 0].tolist() == pytest.approx([math.log(2.5)] * 2)
    assert found.log_amplitude[:, 1:].flatten().tolist() == pytest.approx([-24 * math.log(2)] * 20)
    assert found.floored.tolist() == [3 * 195] * 2
    assert radial_spectra(torch.zeros(1, 4, 6, 2)).floored.tolist() == [2 * 24]


def test_white_noise_is_flat():
    """Its power is the same in every bin. Its mean logarithm is too, but at zero it is ½ ln 2 lower: F is real there."""
    found = radial_spectra(noise(400, 14, 14, 16))
    count = torch.tensor(radial_bins(14, 14).coefficients) * 400 * 16
    # of |F|² in units of its mean the standard deviation is 1, and √2 where F is real
    wrong = (found.power.mean(0) * 196 - 1) / (math.sqrt(2) / count.sqrt())
    assert float(wrong.abs().max()) < 4
    relative = found.log_amplitude.mean(0) - found.log_amplitude[:, 0].mean()
    # ln |F| has the standard deviation π/√24 = 0.64, and π/√8 = 1.11 where F is real
    error = 1.11 / math.sqrt(count[0]) + 1.11 / count.sqrt()
    real = torch.zeros(len(count))
    real[0], real[7], real[10] = 1, 2 / 30, 1  # zero; the two of the thirty at π that alternate one way; both ways
    expected = 0.5 * math.log(2) * (1 - real)
    assert float(((relative - expected) / error).abs().max()) < 4


def test_any_dtype_and_layout_is_transformed_in_float64():
    maps = noise(2, 4, 6, 8)
    half = maps.bfloat16()
    assert radial_spectra(half).power.dtype == torch.float64
    assert torch.equal(radial_spectra(half).power, radial_spectra(half.double()).power)
    tokens = torch.cat((torch.full((2, 2, 8), 99.0), maps.flatten(1, 2)), 1)
    view = tokens[:, 2:].unflatten(1, (4, 6))
    assert not view.is_contiguous()
    torch.testing.assert_close(radial_spectra(view).log_amplitude, radial_spectra(maps).log_amplitude)


def test_many_maps_are_transformed_in_parts(monkeypatch):
    maps = noise(7, 4, 6, 8)
    whole = radial_spectra(maps)
    sizes = []
    split = radial._spectra
    monkeypatch.setattr(radial, "_spectra", lambda part, *rest: sizes.append(len(part)) or split(part, *rest))
    monkeypatch.setattr(radial, "BYTES_AT_ONCE", 3 * 8 * 4 * 6 * 8)
    parts = radial_spectra(maps)
    assert sizes == [3, 3, 1]
    for name in ("log_amplitude", "amplitude", "power"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-13, atol=0)
    assert radial_spectra(maps[:0]).power.shape == (0, len(radial_bins(4, 6).coefficients))


def test_what_is_no_map_is_refused():
    with pytest.raises(
        ValueError, match=r"token map of 1 × 8 has no radial frequencies.*two or more tokens on each side"
    ):
        radial_spectra(noise(2, 1, 8, 3))
    for shape in ((2, 8, 3), (2, 4, 4, 0)):
        with pytest.raises(ValueError, match=r"\[N, H, W, C\].*got shape"):
            radial_spectra(noise(*shape))
    assert AMPLITUDE_FLOOR == 2.0**-24
