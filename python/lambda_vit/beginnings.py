"""Tokens inside paths, kept between the rounds of a search: candidates of one round begin as those of the last one did.

A round measures the layers picked so far and one more. Up to the block of the layer that the last round picked, its paths
are that round's paths.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from .paths import Node, Path, node


def positions(paths: Collection[Path], depth: int, each: int, budget: int) -> tuple[int, ...]:
    """Before which blocks to keep tokens: every block, or every second, third …, as the budget allows; () for none.

    Args:
        paths: Of the round.
        depth: Number of blocks.
        each: Bytes of the tokens of all images, at one place of one path.
        budget: Bytes for all that is kept.
    """
    for stride in range(1, depth):
        chosen = tuple(range(stride, depth, stride))
        if nodes(paths, chosen) * each <= budget:
            return chosen
    return ()


def nodes(paths: Collection[Path], chosen: Collection[int]) -> int:
    """How many different beginnings `paths` have up to the blocks `chosen`."""
    return len({node(path, at) for path in paths for at in chosen})


class Beginnings:
    """Of one batch. What it holds never exceeds what the paths that were announced last have as beginnings."""

    def __init__(self) -> None:
        self._wanted: frozenset[Node] = frozenset()
        self._tokens: dict[Node, Tensor] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def announce(self, paths: Collection[Path], chosen: Collection[int]) -> None:
        """Keep from now on what `paths` begin with up to the blocks `chosen`, and drop all else."""
        self._wanted = frozenset(node(path, at) for path in paths for at in chosen)
        self._tokens = {key: x for key, x in self._tokens.items() if key in self._wanted}

    def find(self, key: Node) -> Tensor | None:
        """The tokens that go into block `key[0]`, if they are kept."""
        return self._tokens.get(key)

    def offer(self, key: Node, x: Tensor) -> None:
        """Keep `x`, if it is wanted."""
        if key in self._wanted:
            self._tokens[key] = x
