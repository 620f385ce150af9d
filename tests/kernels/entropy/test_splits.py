"""Gaussian entropies and moments against exact rational arithmetic, however data comes and however large its mean."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from histogram_support import both_backends, counting_with, values_by_row
from torch import Tensor

from lambda_kernels import EntropyMeter
from lambda_kernels.ops import histogram as ops
from lambda_kernels.ops.histogram import reference

ROWS, CHANNELS = 200, 2
SIGMA = 3.0  # whose logarithm is not near 0, so that the relative error of an entropy says something


def normal(dtype: torch.dtype, ratio: float) -> Tensor:
    """Values with a mean of `ratio` standard deviations, before they are rounded to `dtype`."""
    generator = torch.Generator().manual_seed(int(math.log10(ratio + 1)))
    x = torch.randn(ROWS, CHANNELS, generator=generator, dtype=torch.float64)
    x[:, 1] *= 1.7
    return (SIGMA * (x + ratio)).to(dtype)


def all_but_constant(dtype: torch.dtype, value: float) -> Tensor:
    """A few neighbours of `value` beside it: the largest mean over σ that `dtype` holds at this length."""
    x = torch.full((ROWS, CHANNELS), value, dtype=dtype)
    x[[5, 77, 130]] = torch.nextafter(x[:3], torch.full_like(x[:3], math.inf))
    x[171, 1] = torch.nextafter(x[0, 0], x.new_tensor(0.0))
    return x


def periodic() -> Tensor:
    """Few values on a coarse grid, whose squares round alike."""
    return (1000 + torch.arange(ROWS * CHANNELS).reshape(ROWS, CHANNELS) % 7 / 8).float()


def outlier_first() -> Tensor:
    """What a shift by the first value, and a mean so far that is far off, would suffer from."""
    x = normal(torch.float32, 1e4)
    x[0] *= -3
    return x


DATA: dict[str, Callable[[], Tensor]] = {
    **{f"float32, {ratio:g}": lambda ratio=ratio: normal(torch.float32, ratio) for ratio in (0, 1e2, 1e4, 1e6, 1e7)},
    **{f"float64, {ratio:g}": lambda ratio=ratio: normal(torch.float64, ratio) for ratio in (1e6, 1e9, 1e14)},
    **{f"bfloat16, {ratio:g}": lambda ratio=ratio: normal(torch.bfloat16, ratio) for ratio in (0, 20)},
    "float16, 20": lambda: normal(torch.float16, 20),
    "float32, all but constant": lambda: all_but_constant(torch.float32, 3e8),
    "float16, all but constant": lambda: all_but_constant(torch.float16, -4e4),
    "bfloat16, all but constant": lambda: all_but_constant(torch.bfloat16, 1e30),
    "float64, all but constant": lambda: all_but_constant(torch.float64, -1e17),
    "periodic": periodic,
    "outlier first": outlier_first,
}


def fed(batches: list[Tensor], per: str) -> EntropyMeter:
    meter = EntropyMeter(per=per)
    for batch in batches:
        meter.update(batch)
    return meter


def as_a_tree(batches: list[Tensor], per: str) -> EntropyMeter:
    meters = [fed([batch], per) for batch in batches]
    while len(meters) > 1:
        pairs = zip(meters[::2], [*meters[1::2], EntropyMeter(per=per)], strict=False)
        meters = [left.merge(right) for left, right in pairs]
    return meters[0]


def cut(x: Tensor, seed: int) -> list[Tensor]:
    """Batches of random lengths, from none to half of the rows, in random order."""
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(x)) for _ in range(rng.choice((2, 20, 100))))
    batches = [x[a:b] for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True)]
    rng.shuffle(batches)
    return batches


SPLITS: dict[str, Callable[[Tensor, str], EntropyMeter]] = {
    "whole": lambda x, per: fed([x], per),
    "one by one": lambda x, per: fed(list(x.split(1)), per),
    "reversed": lambda x, per: fed(list(x.flip(0).split(7)), per),
    "random": lambda x, per: fed(cut(x, 1), per),
    "random again": lambda x, per: fed(cut(x, 2), per),
    "tree": lambda x, per: as_a_tree(list(x.split(1)), per),
    "tree of random ones": lambda x, per: as_a_tree(cut(x, 3), per),
    "small into large": lambda x, per: fed([x[3:]], per).merge(fed([x[:3]], per)),
    "large into small": lambda x, per: fed([x[:3]], per).merge(fed([x[3:]], per)),
}


def exactly(values: list[float]) -> tuple[Fraction, Fraction]:
    """Mean and M2."""
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    return mean, sum((value - mean) ** 2 for value in exact)


def error_of(moments: ops.Moments, row: int, mean: Fraction, m2: Fraction) -> tuple[float, float]:
    """Of the mean, over σ; and of M2, over M2."""
    got = [Fraction(getattr(moments, name)[row].item()) for name in ("mean", "mean_low", "m2", "m2_low")]
    of_mean = float(abs(got[0] + got[1] - mean)) / math.sqrt(m2 / int(moments.count[row]))
    return of_mean, float(abs(got[2] + got[3] - m2) / m2)


@both_backends
@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize("name", DATA)
def test_no_split_changes_an_entropy(name: str, per: str, backend: str) -> None:
    x = DATA[name]()
    rows = [values.tolist() for values in values_by_row(x, per)]
    known = [exactly(values) for values in rows]
    with counting_with(backend):
        meters = {split: make(x, per) for split, make in SPLITS.items()}
    entropies = torch.stack([meter.compute() for meter in meters.values()])
    degrees = len(rows[0]) - 1
    exact = torch.tensor([math.log2(m2 / degrees) / 2 for _, m2 in known], dtype=torch.float64)
    assert ((entropies.amax(0) - entropies.amin(0)) <= 1e-12 * exact.abs()).all()
    torch.testing.assert_close(entropies, exact.expand_as(entropies), rtol=1e-12, atol=0)
    for split, meter in meters.items():
        found = meter.moments()
        for row, (mean, m2) in enumerate(known):
            of_mean, of_m2 = error_of(found, row, mean, m2)
            assert of_mean <= 1e-14, split
            assert of_m2 <= 1e-13, split


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per", ["channel", "layer"])
def test_moments_of_long_columns_are_exact_to_their_digits(per: str, dtype: torch.dtype, backend: str) -> None:
    """Long enough for sums that go on around another shift, for a mean of 10^2 σ on a coarse grid and one of 10^7 σ."""
    for ratio in (1e2, 1e7):
        generator = torch.Generator().manual_seed(0)
        x = (torch.randn(9000, 1, generator=generator, dtype=torch.float64) + ratio).float().to(dtype)
        of_mean, of_m2 = error_of(ops.moments(x, per=per, backend=backend), 0, *exactly(x.flatten().tolist()))
        assert of_mean <= 1e-15
        assert of_m2 <= 2e-14


def test_no_number_of_parts_adds_up_to_an_error() -> None:
    """The same batch again and again: M2 in one float64 would round the same way at every addition."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    batch = ops.moments(x, backend="torch")
    packed = batch.packed()
    total = packed
    for _ in range(9999):
        total = reference.merge_moments(total, packed)
    torch.testing.assert_close(total[:, 2], 10_000 * batch.m2, rtol=1e-15, atol=0)
    assert torch.equal(total[:, 1], batch.mean)


@both_backends
@pytest.mark.parametrize("times", [1, 40], ids=["few", "many"])
def test_an_overflow_does_not_look_like_no_spread(times: int, backend: str) -> None:
    x = torch.tensor([[1e200], [-1e200], [4e200]], dtype=torch.float64).repeat(times, 1)
    found = ops.moments(x, backend=backend)
    assert found.mean.item() == pytest.approx(4e200 / 3)
    assert (found.m2.item(), found.m2_low.item(), found.std.item()) == (math.inf, 0.0, math.inf)


def test_what_overflows_is_infinite_and_leaves_no_nan_behind() -> None:
    x = torch.tensor([[1e200], [-1e200], [4e200]], dtype=torch.float64)
    total, *rest = (ops.moments(row, backend="torch") for row in x.split(1))
    for part in rest:
        total = total.merge(part)
    assert total.mean.item() == pytest.approx(4e200 / 3)
    assert (total.m2.item(), total.m2_low.item()) == (math.inf, 0.0)
