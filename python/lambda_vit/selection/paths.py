"""One network with different attention layers passed over, many such paths at once: what paths share is run once.

A path is the set of the blocks whose attention is skipped, each then being x + MLP(LN(x)) (arXiv 2404.05657, section
3.2). Models are never changed: timm's own `forward` runs before the first and behind the last block, on shallow copies of
the model around other blocks, and nothing of it is written again here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lambda_kernels.blocks.attention_free import AttentionFreeBlock
from lambda_kernels.blocks.structure import inspect_model, refuse_merging
from lambda_kernels.errors import UnsupportedModelError

from ..data import batches
from ..data.batches import Images
from ..models.views import _Inject, _without_attention, _without_stem, with_blocks

SkippedBlocks = frozenset[int]

FULL: SkippedBlocks = frozenset()

# What decides about the tokens that go into a block: the block, and what was skipped before it.
Node = tuple[int, SkippedBlocks]


def node(path: SkippedBlocks, at: int) -> Node:
    """Where `path` is when it comes to block `at`."""
    return at, frozenset(block for block in path if block < at)


# What a block is given beyond its tokens: rotary embeddings, position biases, a mask.
BlockKwargs = tuple[tuple[Any, ...], dict[str, Any]]


class Tokens(NamedTuple):
    """What goes into the first block, [N, T, C]; and the images too, where the model needs them behind it."""

    tokens: Tensor
    images: Images | None


class Outputs(NamedTuple):
    """What a path gives for a batch: the tensor that entropies are measured on, and the classifier's output."""

    scored: Tensor
    logits: Tensor


class PrefixStore(Protocol):
    """Tokens at nodes, from an earlier run over the same images; see `prefixes.PrefixCache`."""

    def find(self, key: Node) -> Tensor | None: ...

    def offer(self, key: Node, x: Tensor) -> None: ...


class PathRunner:
    """Runs paths of `model`, in eval mode (the caller's business).

    Args:
        model: A timm vision transformer.
        score: What `Outputs.scored` is: "logits", or "pre_logits" for what goes into the classifier. Distilled models
            average their two heads in eval mode, and average-pooled ones normalise after pooling: timm's own
            `forward_head` does either.

    Attributes:
        why_images: Why images are needed behind the embedding; None where they are not. Known after the first `embed`.

    Raises:
        UnsupportedModelError: The model cannot be changed block by block; from the first `embed`, its forward does not run
            the blocks as timm's does.
    """

    def __init__(self, model: nn.Module, score: str = "logits") -> None:
        self.structure = inspect_model(model)
        refuse_merging(self.structure, "measuring paths")
        self.score = score
        self.why_images: str | None = None
        self._model = model
        self._blocks = list(model.blocks)
        self._free: dict[int, nn.Module] = {}
        self._seen: list[tuple[Tensor, BlockKwargs]] = []
        self._front = with_blocks(model, [InputRecorder(self._seen) for _ in self._blocks])
        self._back: nn.Module | None = None
        self._given: list[BlockKwargs] = []

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    def modules(self) -> list[nn.Module]:
        """All that has to be in eval mode while paths run."""
        return [self._model, *(self._without(i) for i in range(self.depth))]

    def embed(self, images: Images) -> Tokens:
        """Run everything before the first block."""
        if self._back is None:
            self._split(images)
        tokens, given = self._before_blocks(images)
        if self.why_images is None and not _same_given(given, self._given):
            self.why_images = "what its blocks are given beyond tokens differs from batch to batch"
        return Tokens(tokens, None if self.why_images is None else images)

    def outputs(
        self, start: Tokens, paths: Collection[SkippedBlocks], memory: PrefixStore | None = None
    ) -> Iterator[tuple[SkippedBlocks, Outputs]]:
        """The outputs of all `paths`, each once, in an order of their own: prefixes that paths share are run once.

        Args:
            start: What `embed` gave.
            paths: Sets of blocks whose attention is skipped.
            memory: Of the same images. Blocks before what it finds are not run, and it is offered what is run.
        """
        first = PrefixNode(self, self._given_to_blocks(start), 0, FULL, memory, tokens=start.tokens)
        for at, group in self._walk(first, list(dict.fromkeys(paths))):
            found = self._finish(at.tokens(), start.images)
            for path in group:
                yield path, found

    def first_bad_block(self, start: Tokens, path: SkippedBlocks) -> int | None:
        """The first block of a path that gives NaN or infinity; None: it comes behind the last one."""
        x = start.tokens
        for index, given in enumerate(self._given_to_blocks(start)):
            x = self.run(index, index in path, x, given)
            if not torch.isfinite(x).all():
                return index
        return None

    def attention_inputs_and_outputs(self, start: Tokens) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(block, x, x + attention branch), both [N, T, C], along the full path, for blocks that have their attention.

        The branch is what the block adds: LayerScale is in it. Where batches hold padding, both are [M, C], of the tokens
        of the images alone.
        """
        x, valid = start.tokens, batches.valid_tokens(self._model, start.images)
        given = self._given_to_blocks(start)
        for index, (block, (positional, named)) in enumerate(zip(self._blocks, given, strict=True)):
            if isinstance(block, AttentionFreeBlock):
                x = block(x, *positional, **named)
                continue
            seen: list[Tensor] = []
            handle = block.drop_path1.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
            try:
                following = block(x, *positional, **named)
            finally:
                handle.remove()
            after = x + seen[0]
            yield (index, x, after) if valid is None else (index, x[valid], after[valid])
            x = following

    def _without(self, index: int) -> nn.Module:
        if index not in self._free:
            self._free[index] = _without_attention(self._blocks[index])
        return self._free[index]

    def run(self, index: int, skipped: bool, x: Tensor, given: BlockKwargs) -> Tensor:
        """A block, with its attention or without."""
        positional, named = given
        return (self._without(index) if skipped else self._blocks[index])(x, *positional, **named)

    def _walk(self, place: PrefixNode, group: list[SkippedBlocks]) -> Iterator[tuple[PrefixNode, list[SkippedBlocks]]]:
        """Depth first, so that no more tokens are alive than paths have branched off on the way here."""
        for at in range(place.at, self.depth):
            skipping = [path for path in group if at in path]
            if skipping and len(skipping) < len(group):
                group = [path for path in group if at not in path]
                yield from self._walk(place.following(True), skipping)
                skipping = []
            place = place.following(bool(skipping))
        if group:
            yield place, group

    def _given_to_blocks(self, start: Tokens) -> list[BlockKwargs]:
        """What each block is given beyond its tokens for this batch."""
        if start.images is None or not any(positional or named for positional, named in self._given):
            return self._given
        return self._before_blocks(start.images)[1]

    def _before_blocks(self, images: Images) -> tuple[Tensor, list[BlockKwargs]]:
        self._front(images)
        seen = self._seen[:]
        self._seen.clear()
        if len(seen) < self.depth:
            raise UnsupportedModelError(
                f"the forward of this {type(self._model).__name__} does not run the blocks of the model that it is called "
                "on: was it replaced on the instance? Measure the model as timm made it"
            )
        seen = seen[-self.depth :]  # a forward that runs its blocks more than once is found out when it is split
        return seen[0][0], [given for _, given in seen]

    def _finish(self, x: Tensor, images: Images | None) -> Outputs:
        given: Images
        if images is None:
            assert self._back is not None, "a model that was not split needs its images"
            back, given = self._back, x
        else:
            back, given = with_blocks(self._model, [_Inject(x)]), images
        if self.score == "logits":
            logits = back(given)
            return Outputs(logits, logits)
        features = batches.features(back, given)
        # A forward of somebody's own may do more to the logits than `forward_head` does.
        logits = batches.head(back, features) if images is None else back(given)
        return Outputs(batches.head(back, features, pre_logits=True), logits)

    def _split(self, images: Images) -> None:
        """Find out, on a few images, whether what follows the blocks can be run without running what precedes them."""
        few = batches.first(images, 2)
        self._back = _without_stem(self._model)
        wanted = self._model(few)
        x, self._given = self._before_blocks(few)
        for index, given in enumerate(self._given):
            x = self.run(index, False, x, given)
        try:
            found = self._back(x)
        except Exception as error:  # whatever a forward of somebody's own raises over tokens in place of images
            self.why_images = f"its forward cannot take tokens for images ({type(error).__name__})"
        else:
            if _same_numbers(found, wanted):
                return
            self.why_images = "its forward does more than embedding, blocks, norm and head one after the other"
        if not _same_numbers(with_blocks(self._model, [_Inject(x)])(few), wanted):
            raise UnsupportedModelError(
                f"the forward of this {type(self._model).__name__} does not run its blocks once, one after the other, on "
                "what goes into the first: paths through them cannot be measured"
            )


class PrefixNode:
    """The tokens at a node of the paths, run only when somebody asks for them."""

    def __init__(
        self, runner: PathRunner, given: list[BlockKwargs], at: int, skipped: SkippedBlocks, memory: PrefixStore | None, *,
        tokens: Tensor | None = None, before: PrefixNode | None = None,
    ) -> None:  # fmt: skip
        self.at = at
        self._given = given
        self._runner, self._skipped, self._memory = runner, skipped, memory
        self._tokens, self._before = tokens, before

    def following(self, skipped: bool) -> PrefixNode:
        """Behind the next block."""
        path = self._skipped | {self.at} if skipped else self._skipped
        return PrefixNode(self._runner, self._given, self.at + 1, path, self._memory, before=self)

    def tokens(self) -> Tensor:
        """[N, T, C], from memory or by running the blocks behind the last place that is known."""
        if self._tokens is None and self._memory is not None:
            self._tokens = self._memory.find((self.at, self._skipped))
        if self._tokens is None:
            block = self.at - 1
            assert self._before is not None, "tokens of the first place are given"
            before, given = self._before.tokens(), self._given[block]
            self._tokens = self._runner.run(block, block in self._skipped, before, given)
            if self._memory is not None:
                self._memory.offer((self.at, self._skipped), self._tokens)
        self._before = None  # whose tokens need not stay
        return self._tokens


class InputRecorder(nn.Module):
    """Stands for a block: adds to `seen` what would go into it."""

    def __init__(self, seen: list[tuple[Tensor, BlockKwargs]]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor, *positional: object, **named: object) -> Tensor:
        self.seen.append((x, (positional, named)))
        return x


def _same_given(found: Sequence[BlockKwargs], wanted: Sequence[BlockKwargs]) -> bool:
    """Whether blocks are given the same beyond tokens; tensors are compared by value."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a is b or (a.shape == b.shape and torch.equal(a, b))
        return type(a) is type(b) and a == b

    def flat(given: BlockKwargs) -> dict[Any, Any]:
        return {**dict(enumerate(given[0])), **given[1]}

    pairs = [(flat(one), flat(other)) for one, other in zip(found, wanted, strict=True)]
    return all(one.keys() == other.keys() and all(same(one[key], other[key]) for key in one) for one, other in pairs)


def _same_numbers(found: Tensor, wanted: Tensor) -> bool:
    """Whether both come from the same operations on the same numbers: usually not one bit differs."""
    if not torch.isfinite(wanted).all():
        return True  # measuring will tell where that comes from
    # In bfloat16 64 roundings would be half of the largest number.
    tolerance = min(64 * torch.finfo(wanted.dtype).eps, 0.03) * float(wanted.abs().max())
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0.0, atol=tolerance)
