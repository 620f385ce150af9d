"""Tokens inside paths, cached from one pass over the batches to the next: a path starts at the longest prefix it shares.

A path is the set of blocks whose attention is skipped. Which tokens enter a block depends on the skipped blocks before it
alone, so paths that agree up to a block share them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

SkippedBlocks = frozenset[int]

FULL: SkippedBlocks = frozenset()


class Prefix(NamedTuple):
    """What determines the tokens that enter a block: the block, and the blocks before it whose attention is skipped."""

    block: int
    skipped: SkippedBlocks

    @classmethod
    def of(cls, path: SkippedBlocks, block: int) -> Prefix:
        """Return the prefix of `path` up to `block`."""
        return cls(block, frozenset(index for index in path if index < block))


class PrefixCache:
    """Caches prefixes that the next round will share, as densely as the memory allows."""

    def __init__(self, depth: int) -> None:
        self.blocks: tuple[int, ...] = ()  # the blocks before which tokens were cached when the cache was largest
        self.bytes = 0  # its size then
        self._depth = depth
        self._prefix_bytes, self._budget = 1, 0
        self._wanted: frozenset[Prefix] = frozenset()
        self._tokens: dict[tuple[int, Prefix], Tensor] = {}

    def set_budget(self, prefix_bytes: int, budget: int) -> None:
        """Limit the cache to `budget` bytes; the tokens of all images at one prefix take `prefix_bytes`."""
        self._prefix_bytes, self._budget = prefix_bytes, budget

    def announce(self, paths: Collection[SkippedBlocks]) -> None:
        """Evict all but the prefixes of `paths`, and cache those that fit from now on."""
        blocks = choose_blocks(paths, self._depth, self._budget // self._prefix_bytes)
        wanted = list_prefixes(paths, blocks)
        if wanted == self._wanted:
            return
        self._wanted = wanted
        self._tokens = {key: x for key, x in self._tokens.items() if key[1] in wanted}
        size = len(self._wanted) * self._prefix_bytes
        if size > self.bytes:
            self.blocks, self.bytes = blocks, size

    def find(self, batch: int, prefix: Prefix) -> Tensor | None:
        """Return the tokens of batch number `batch` at `prefix`; None if they are not cached."""
        return self._tokens.get((batch, prefix))

    def offer(self, batch: int, prefix: Prefix, x: Tensor) -> None:
        """Cache `x` if a path that was announced has this prefix."""
        if prefix in self._wanted:
            self._tokens[batch, prefix] = x

    def clear(self) -> None:
        """Evict everything."""
        self._tokens.clear()


def choose_blocks(paths: Collection[SkippedBlocks], depth: int, most: int) -> tuple[int, ...]:
    """Return the blocks before which at most `most` prefixes fit: all, or every second, third …; () if none fit."""
    for stride in range(1, depth):
        blocks = tuple(range(stride, depth, stride))
        if len(list_prefixes(paths, blocks)) <= most:
            return blocks
    return ()


def list_prefixes(paths: Collection[SkippedBlocks], blocks: Collection[int]) -> frozenset[Prefix]:
    """Return the different prefixes that `paths` have up to `blocks`."""
    return frozenset(Prefix.of(path, block) for path in paths for block in blocks)
