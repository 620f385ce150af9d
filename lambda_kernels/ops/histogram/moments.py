"""Count, mean, spread, smallest and largest value of many rows at once, mergeable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference


@dataclass(frozen=True)
class Moments:
    """What is known of each row's finite values.

    Attributes:
        count: int64 [K]: how many there are.
        mean: float64 [K]; 0 where there is none.
        m2: float64 [K]: Σ (x − mean)². Not finite where squares overflow: of float64 values beyond ±2^500.
        mean_low: float64 [K]: what float64 rounds off the mean. With it parts are merged without a loss that grows with
            the mean over the standard deviation.
        m2_low: float64 [K]: what it rounds off M2. With it no loss grows with the number of parts.
        minimum: float64 [K]; NaN where there is none.
        maximum: float64 [K], likewise.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    mean_low: Tensor
    m2_low: Tensor
    minimum: Tensor
    maximum: Tensor

    @classmethod
    def unpack(cls, packed: Tensor) -> Moments:
        """From the operator's float64 [K, 7]."""
        count, *rest = packed.unbind(1)
        return cls(count.long(), *rest)

    def packed(self) -> Tensor:
        """As the operator gives them: float64 [K, 7]."""
        low = (self.mean_low, self.m2_low)
        return torch.stack((self.count.double(), self.mean, self.m2, *low, self.minimum, self.maximum), dim=1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together, by the formula of Chan, Golub and LeVeque (1979).

        Raises:
            ValueError: The parts have different numbers of rows.
        """
        if self.count.shape != other.count.shape:
            raise ValueError(f"moments of {self.count.numel()} and {other.count.numel()} rows cannot be merged")
        return Moments.unpack(reference.merge_moments(self.packed(), other.packed()))

    @property
    def std(self) -> Tensor:
        """float64 [K]: the sample standard deviation (n − 1); NaN where there are fewer than two values."""
        degrees = (self.count - 1).double()
        return (self.m2 / degrees.masked_fill(degrees < 1, math.nan)).sqrt()
