"""Runs one network with different attention layers skipped, many such paths at once; prefixes they share run once.

A path is the set of blocks whose attention is skipped; such a block computes x + MLP(LN(x)) (arXiv 2404.05657, section
3.2). The model is never changed: shallow copies of it, around other blocks, run timm's own `forward` before the first and
after the last block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lambda_kernels.blocks.attention_free import AttentionFreeBlock
from lambda_kernels.blocks.structure import inspect_model, refuse_merging
from lambda_kernels.errors import UnsupportedModelError

from ..data import batches
from ..data.batches import Images
from ..models.views import InjectTokens, view_without_attention, view_without_stem, with_blocks
from .prefix_cache import FULL, Prefix, PrefixCache, SkippedBlocks

# The arguments of a block besides its tokens: rotary embeddings, position biases, a mask.
BlockKwargs = tuple[tuple[Any, ...], dict[str, Any]]


class Tokens(NamedTuple):
    """The input of the first block, [N, T, C]; and the images, if the model reads them again after its first block."""

    tokens: Tensor
    images: Images | None


class Outputs(NamedTuple):
    """The outputs of a path for a batch: the tensor whose entropy is measured, and the logits."""

    scored: Tensor
    logits: Tensor


class PathRunner:
    """Runs paths of `model`; the caller puts `modules()` into eval mode.

    `score` is the tensor in `Outputs.scored`: "logits", or "pre_logits" for the classifier's input. Distilled models
    average their two heads in eval mode, and average-pooled models normalise after pooling; timm's own `forward_head` does
    both.
    """

    def __init__(self, model: nn.Module, score: str = "logits") -> None:
        refuse_merging(inspect_model(model), "measuring paths")
        self.score = score
        # Why paths require the images again after the embedding; None if they do not. Known after the first `embed`.
        self.why_images: str | None = None
        self.model = model
        self._blocks = list(model.blocks)
        self._free: dict[int, nn.Module] = {}
        self._seen: list[tuple[Tensor, BlockKwargs]] = []
        self._front = with_blocks(model, [InputRecorder(self._seen) for _ in self._blocks])
        self._back: nn.Module | None = None
        self._kwargs: list[BlockKwargs] = []

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    def modules(self) -> list[nn.Module]:
        """Return the modules that must be in eval mode while paths run."""
        return [self.model, *(self.half(i) for i in range(self.depth))]

    def half(self, index: int) -> nn.Module:
        """Return the block that runs where attention is skipped; it shares the model's MLP half, or `use_halves` set it."""
        if index not in self._free:
            self._free[index] = view_without_attention(self._blocks[index])
        return self._free[index]

    def use_halves(self, halves: Mapping[int, nn.Module]) -> None:
        """Run these modules from now on where the attention of a block is skipped; cached prefixes no longer hold."""
        self._free |= halves

    def embed(self, images: Images) -> Tokens:
        """Run what precedes the first block."""
        if self._back is None:
            self._split(images)
        tokens, kwargs = self._before_blocks(images)
        if self.why_images is None and not _same_kwargs(kwargs, self._kwargs):
            self.why_images = "the arguments of its blocks besides the tokens differ from batch to batch"
        return Tokens(tokens, None if self.why_images is None else images)

    def outputs(
        self, start: Tokens, paths: Collection[SkippedBlocks], prefixes: PrefixCache | None = None, batch: int = 0
    ) -> Iterator[tuple[SkippedBlocks, Outputs]]:
        """Yield the outputs of every path once, in any order; prefixes that paths share run once.

        Blocks before a prefix that `prefixes` holds for this batch do not run, and it is offered the prefixes that do.
        """
        run = _BatchRun(self, self.block_kwargs(start), prefixes, batch)
        first = PrefixNode(run, Prefix(0, FULL), start.tokens)
        for at, group in self._walk(first, list(dict.fromkeys(paths))):
            found = self._finish(at.tokens(), start.images)
            for path in group:
                yield path, found

    def first_bad_block(self, start: Tokens, path: SkippedBlocks) -> int | None:
        """Return the first block of a path whose output holds NaN or infinity; None if every block's is finite."""
        x = start.tokens
        for index, kwargs in enumerate(self.block_kwargs(start)):
            x = self.run(index, index in path, x, kwargs)
            if not torch.isfinite(x).all():
                return index
        return None

    def attention_inputs_and_outputs(self, start: Tokens) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (block, x, x + attention branch), both [N, T, C], along the full path, for blocks that have attention.

        The branch is what the block adds, after LayerScale. If batches hold padding, both tensors are [M, C] and omit it.
        """
        x, valid = start.tokens, batches.valid_tokens(self.model, start.images)
        kwargs = self.block_kwargs(start)
        for index, (block, (positional, named)) in enumerate(zip(self._blocks, kwargs, strict=True)):
            if isinstance(block, AttentionFreeBlock):
                x = block(x, *positional, **named)
                continue
            seen: list[Tensor] = []
            with block.drop_path1.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output)):
                following = block(x, *positional, **named)
            after = x + seen[0]
            yield (index, x, after) if valid is None else (index, x[valid], after[valid])
            x = following

    def run(self, index: int, skipped: bool, x: Tensor, kwargs: BlockKwargs) -> Tensor:
        """Run a block, with its attention or without."""
        positional, named = kwargs
        return (self.half(index) if skipped else self._blocks[index])(x, *positional, **named)

    def _walk(self, node: PrefixNode, group: list[SkippedBlocks]) -> Iterator[tuple[PrefixNode, list[SkippedBlocks]]]:
        # Depth first: only the tokens at which other paths branch off stay alive.
        for block in range(node.prefix.block, self.depth):
            skipping = [path for path in group if block in path]
            if skipping and len(skipping) < len(group):
                group = [path for path in group if block not in path]
                yield from self._walk(node.following(True), skipping)
                skipping = []
            node = node.following(bool(skipping))
        if group:
            yield node, group

    def block_kwargs(self, start: Tokens) -> list[BlockKwargs]:
        """Return the arguments of each block besides its tokens, for this batch."""
        if start.images is None or not any(positional or named for positional, named in self._kwargs):
            return self._kwargs
        return self._before_blocks(start.images)[1]

    def _before_blocks(self, images: Images) -> tuple[Tensor, list[BlockKwargs]]:
        self._front(images)
        seen = self._seen[:]
        self._seen.clear()
        if len(seen) < self.depth:
            raise UnsupportedModelError(
                f"the forward of this {type(self.model).__name__} does not run the blocks of the model that it is called "
                "on: was it replaced on the instance? Measure the model as timm made it"
            )
        seen = seen[-self.depth :]  # `_split` refuses a forward that runs its blocks more than once
        return seen[0][0], [kwargs for _, kwargs in seen]

    def _finish(self, x: Tensor, images: Images | None) -> Outputs:
        argument: Images
        if images is None:
            assert self._back is not None, "a model that was not split needs its images"
            back, argument = self._back, x
        else:
            back, argument = with_blocks(self.model, [InjectTokens(x)]), images
        if self.score == "logits":
            logits = back(argument)
            return Outputs(logits, logits)
        features = batches.features(back, argument)
        # A custom forward may do more to the logits than `forward_head` does.
        logits = batches.head(back, features) if images is None else back(argument)
        return Outputs(batches.head(back, features, pre_logits=True), logits)

    def _split(self, images: Images) -> None:
        """Find out on a few images whether the model's end can run without its beginning."""
        few = batches.first(images, 2)
        self._back = view_without_stem(self.model)
        wanted = self.model(few)
        x, self._kwargs = self._before_blocks(few)
        for index, kwargs in enumerate(self._kwargs):
            x = self.run(index, False, x, kwargs)
        try:
            found = self._back(x)
        except Exception as error:  # a custom forward that gets tokens instead of images can raise anything
            self.why_images = f"its forward does not accept tokens instead of images ({type(error).__name__})"
        else:
            if _same_numbers(found, wanted):
                return
            self.why_images = "its forward does more than embedding, blocks, norm and head one after the other"
        if not _same_numbers(with_blocks(self.model, [InjectTokens(x)])(few), wanted):
            raise UnsupportedModelError(
                f"the forward of this {type(self.model).__name__} does not run its blocks once, one after the other, on "
                "what goes into the first: paths through them cannot be measured"
            )


class _BatchRun(NamedTuple):
    """What all prefixes of a batch share while paths run."""

    runner: PathRunner
    block_kwargs: list[BlockKwargs]
    prefixes: PrefixCache | None
    batch: int


class PrefixNode:
    """The tokens at a prefix, computed when they are first read."""

    def __init__(
        self, run: _BatchRun, prefix: Prefix, tokens: Tensor | None = None, before: PrefixNode | None = None
    ) -> None:
        self.prefix = prefix
        self._run, self._tokens, self._before = run, tokens, before

    def following(self, skipped: bool) -> PrefixNode:
        """Return the node after the next block."""
        block, path = self.prefix
        return PrefixNode(self._run, Prefix(block + 1, path | {block} if skipped else path), before=self)

    def tokens(self) -> Tensor:
        """[N, T, C], from the cache, or computed from the last node whose tokens are known."""
        prefixes, batch = self._run.prefixes, self._run.batch
        if self._tokens is None and prefixes is not None:
            self._tokens = prefixes.find(batch, self.prefix)
        if self._tokens is None:
            block = self.prefix.block - 1
            assert self._before is not None, "the first node has its tokens"
            before, kwargs = self._before.tokens(), self._run.block_kwargs[block]
            self._tokens = self._run.runner.run(block, block in self.prefix.skipped, before, kwargs)
            if prefixes is not None:
                prefixes.offer(batch, self.prefix, self._tokens)
        self._before = None  # frees its tokens
        return self._tokens


class InputRecorder(nn.Module):
    """Replaces a block, and appends the block's input to `seen`."""

    def __init__(self, seen: list[tuple[Tensor, BlockKwargs]]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor, *positional: object, **named: object) -> Tensor:
        self.seen.append((x, (positional, named)))
        return x


def _same_kwargs(found: Sequence[BlockKwargs], wanted: Sequence[BlockKwargs]) -> bool:
    """Whether blocks get the same arguments besides tokens; tensors are compared by value."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a is b or (a.shape == b.shape and torch.equal(a, b))
        return type(a) is type(b) and a == b

    def flat(kwargs: BlockKwargs) -> dict[Any, Any]:
        return {**dict(enumerate(kwargs[0])), **kwargs[1]}

    pairs = [(flat(one), flat(other)) for one, other in zip(found, wanted, strict=True)]
    return all(one.keys() == other.keys() and all(same(one[key], other[key]) for key in one) for one, other in pairs)


def _same_numbers(found: Tensor, wanted: Tensor) -> bool:
    """Whether both result from the same operations on the same numbers; usually they are equal to the bit."""
    if not torch.isfinite(wanted).all():
        return True  # measuring reports where the NaN or infinity arises
    # In bfloat16, 64 roundings amount to half of the largest number.
    tolerance = min(64 * torch.finfo(wanted.dtype).eps, 0.03) * float(wanted.abs().max())
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0.0, atol=tolerance)
