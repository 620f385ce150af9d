"""Randomness without a state: every draw is seeded by what it is for, and the caller's generators stay as they are."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def mixed_seed(purpose: str, *numbers: int) -> int:
    """A seed of 63 bits, from 0, that depends on all of `purpose` and `numbers`, such as a seed, an epoch and a step."""
    # The purpose goes first: a SeedSequence takes trailing zeros for nothing.
    words = (int.from_bytes(purpose.encode(), "big"), *numbers)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def seed_all(seed: int) -> None:
    """Seed `random`, NumPy's global generator and PyTorch's on the CPU; those of other devices are left alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Around random work: the three generators that `seed_all` seeds go on afterwards as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
