"""Stateless randomness: every draw is seeded by its purpose, and the caller's generators stay unchanged."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def mixed_seed(purpose: str, *numbers: int) -> int:
    """A non-negative seed of 63 bits made of `purpose` and `numbers`, such as a seed, an epoch and a step."""
    # The purpose goes first: a SeedSequence ignores trailing zeros.
    words = (int.from_bytes(purpose.encode(), "big"), *numbers)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def seed_all(seed: int) -> None:
    """Seed `random`, NumPy's global generator and PyTorch's CPU generator; those of other devices stay unchanged."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """A context that restores the three generators of `seed_all` afterwards, as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
