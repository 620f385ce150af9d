"""Repairs MLP halves: copies of them learn to give the output of the whole block without its attention.

Let x be the input of a block of the full model, and o_T its output. A copy of the block's norm2, MLP and LayerScale maps x
to o_S, and learns to minimize MSE(o_S, o_T) / MSE(o_T, 0): the block-local distillation of Puzzle (arXiv 2411.19146). Layers
are then compared by the damage that remains after this repair, as PRACTISE compares blocks by their recoverability (arXiv
2202.07861). One forward pass of the full model on the images gives x and o_T of all blocks; the model is never changed.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lambda_kernels.errors import NonFiniteActivationError

from ..data import batches
from ..data.batches import Images
from ..runtime.processes import Processes
from ..runtime.progress import task
from .paths import PathRunner


@dataclass(frozen=True)
class RepairSettings:
    """How long a repair is, and on how many images.

    Measured on a DeiT-Tiny at 224 pixels and one at 64: the error on other images is lowest at rates from 1e-3 to 2e-3.
    """

    images: int = 256  # at most, of all processes together
    batch: int = 8  # images per step, about
    passes: int = 4  # over these images; a fixed number of steps would be many rounds of a search on few images
    rate: float = 1e-3  # Adam's at the first step; it falls linearly to zero


SETTINGS = RepairSettings()


class PoolImage(NamedTuple):
    """An image of the pool, on the CPU."""

    digest: bytes
    rank: int
    batch: int  # number of its batch in that process
    tensors: dict[str, Tensor]  # of `batches.tensors`, for one image

    @property
    def place(self) -> tuple[int, int]:
        """Rank and batch."""
        return self.rank, self.batch

    @property
    def shapes(self) -> tuple[object, ...]:
        """What images must have in common to be in one batch."""
        return tuple((name, tensor.shape) for name, tensor in self.tensors.items())


class ImagePool:
    """The images with the smallest keyed digests of their pixels.

    Hence the pool depends on the images and the seed alone: not on which process reads an image, nor on their order.
    """

    def __init__(self, seed: int, rank: int = 0, most: int = SETTINGS.images) -> None:
        self._key, self._rank, self._most = str(seed).encode()[:64], rank, most
        self._held: list[PoolImage] = []

    def add(self, number: int, images: Images) -> None:
        """Add the images of batch `number`."""
        tensors = {name: tensor.cpu() for name, tensor in batches.tensors(images).items()}
        limit = self._held[-1].digest if len(self._held) == self._most else None
        found = list(self._held)
        for n in range(batches.count(images)):
            own = {name: tensor[n : n + 1] for name, tensor in tensors.items()}
            digest = _digest(own.values(), self._key)
            if limit is None or digest < limit:
                # Copies: a view would keep the whole batch in memory.
                found.append(
                    PoolImage(digest, self._rank, number, {name: tensor.clone() for name, tensor in own.items()})
                )
        self._held = sorted(found, key=lambda image: image.digest)[: self._most]

    def merge(self, processes: Processes) -> list[PoolImage]:
        """Return the pool of all processes, in the order of the digests, the same on each."""
        digests = processes.gather([image.digest for image in self._held])
        kept = sorted(digest for one in digests for digest in one)[: self._most]
        shared = processes.gather([image for image in self._held if kept and image.digest <= kept[-1]])
        return sorted((image for one in shared for image in one), key=lambda image: image.digest)[: self._most]


@dataclass(frozen=True)
class Repaired:
    """An MLP half after its repair, in the dtypes of the original."""

    half: nn.Module
    before: float  # MSE(o_S, o_T) / MSE(o_T, 0) on the pool with the original half
    after: float  # the same with this one


def repair_blocks(
    runner: PathRunner,
    pool: Sequence[PoolImage],
    blocks: Collection[int],
    processes: Processes,
    device: torch.device,
    settings: RepairSettings = SETTINGS,
    description: str = "Repair",
) -> dict[int, Repaired]:
    """Repair the MLP halves of `blocks`; modules are in eval mode.

    Each process repairs some blocks on all images of the pool, and shares the result: it is the same for any number of
    processes.

    Raises:
        NonFiniteActivationError: A block of the full model gives NaN or infinity.
    """
    chosen = sorted(blocks)
    mine, own = set(chosen[processes.rank :: processes.size]), {}
    # A caller may be in inference mode, in which nothing can be trained.
    with (
        processes.all_or_none(description),
        torch.inference_mode(False),
        torch.no_grad(),
        task(description, len(mine)) as advance,
    ):
        chunks = _make_chunks(pool, settings.batch)
        # Each process embeds the images itself: the arguments of its blocks may be others than where they were read.
        images = [_images(chunk, device) for chunk in chunks]
        starts = [runner.embed(some) for some in images]
        arguments = [runner.block_kwargs(start) for start in starts]
        valid = [batches.valid_tokens(runner.model, some) for some in images]
        tokens = [start.tokens for start in starts]
        for index in range(max(mine, default=-1) + 1):
            following = [
                runner.run(index, False, x, kwargs[index]) for x, kwargs in zip(tokens, arguments, strict=True)
            ]
            _check_finite(index, following, chunks, processes)
            if index in mine:
                own[index] = _repair_half(runner.half(index), tokens, following, valid, settings)
                advance()
            tokens = following
    found = {}
    for first in range(0, len(chosen), processes.size):  # a few blocks at a time bound the memory
        row = chosen[first : first + processes.size]
        index = row[processes.rank] if processes.rank < len(row) else None
        for other, (state, before, after) in zip(row, processes.gather(_packed(own.get(index))), strict=False):
            half = copy.deepcopy(runner.half(other))
            half.load_state_dict(state)
            found[other] = Repaired(half, before, after)
    return found


def _packed(repaired: Repaired | None) -> tuple[dict[str, Tensor], float, float]:
    if repaired is None:
        return {}, 0.0, 0.0
    state = {name: tensor.cpu() for name, tensor in repaired.half.state_dict().items()}
    return state, repaired.before, repaired.after


def _repair_half(
    half: nn.Module,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    valid: Sequence[Tensor | None],
    settings: RepairSettings,
) -> Repaired:
    """Train a copy of `half` to map each of `inputs` to that of `outputs`; half precision is trained in float32."""
    before = _mean_error(half, inputs, outputs, valid)
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    student = copy.deepcopy(half).to(dtype)
    parameters = [p.requires_grad_() for p in student.parameters() if p.is_floating_point()]
    if not parameters:
        return Repaired(half, before, before)
    # The loss is relative to the residual stream, which can be large: gradients are small, and the usual 1e-8 would not be.
    optimizer = torch.optim.Adam(parameters, settings.rate, eps=1e-12)
    steps = settings.passes * len(inputs)
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        for step in range(steps):
            n = step % len(inputs)
            optimizer.param_groups[0]["lr"] = settings.rate * (1 - step / steps)
            optimizer.zero_grad()
            _error(student(inputs[n].to(dtype)), outputs[n].to(dtype), valid[n]).backward()
            optimizer.step()
    repaired = copy.deepcopy(half)
    repaired.load_state_dict(student.state_dict())
    after = _mean_error(repaired, inputs, outputs, valid)
    # Also false for NaN: where training has diverged, the original remains.
    return Repaired(repaired, before, after) if after < before else Repaired(half, before, before)


def _error(found: Tensor, wanted: Tensor, valid: Tensor | None) -> Tensor:
    """MSE(found, wanted) / MSE(wanted, 0) of tokens [N, T, C] that are not padding."""
    if valid is not None:
        found, wanted = found[valid], wanted[valid]
    return (found - wanted).square().mean() / wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)


def _mean_error(
    half: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor], valid: Sequence[Tensor | None]
) -> float:
    errors = [
        float(_error(half(x).float(), o.float(), mask)) for x, o, mask in zip(inputs, outputs, valid, strict=True)
    ]
    return sum(errors) / len(errors)


def _make_chunks(pool: Sequence[PoolImage], batch: int) -> list[list[PoolImage]]:
    """Divide the pool into batches of about one size, of images of one shape."""
    groups: dict[tuple[object, ...], list[PoolImage]] = {}
    for image in pool:
        groups.setdefault(image.shapes, []).append(image)
    chunks = []
    for group in groups.values():
        number = -(-len(group) // batch)
        chunks += [group[len(group) * n // number : len(group) * (n + 1) // number] for n in range(number)]
    return chunks


def _images(chunk: Sequence[PoolImage], device: torch.device) -> Images:
    names = chunk[0].tensors
    images = batches.from_tensors({name: torch.cat([one.tensors[name] for one in chunk]).to(device) for name in names})
    assert images is not None, "a batch has images"
    return images


def _check_finite(
    index: int, following: Sequence[Tensor], chunks: Sequence[Sequence[PoolImage]], processes: Processes
) -> None:
    bad = [
        image.place
        for x, chunk in zip(following, chunks, strict=True)
        for image, is_finite in zip(chunk, torch.isfinite(x).flatten(1).all(1).tolist(), strict=True)
        if not is_finite
    ]
    if bad:
        rank, batch = min(bad)
        where = f"batch {batch} of rank {rank}" if processes.size > 1 else f"batch {batch}"
        dtype = str(following[0].dtype).removeprefix("torch.")
        raise NonFiniteActivationError(f"block {index} gave NaN or infinity in {where} ({dtype})")


def _digest(tensors: Iterable[Tensor], key: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=16, key=key)
    for tensor in tensors:  # bytes, because NumPy has no bfloat16
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.digest()
