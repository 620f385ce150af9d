"""One training step, measured: what autograd keeps for it, how long it takes, how fast its images come."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.batches import count, images_of, random_images
from ...measure.latency import Latency, interleaved_timing
from ...models.properties import input_shape, one_device, one_dtype
from ...runtime.progress import task

_ROUNDS, _WARMUP = 30, 2


@dataclasses.dataclass(frozen=True)
class Loading:
    """How fast the loader yields images while nothing trains on them."""

    images_per_second: float
    images: int  # that were timed
    workers: int


def saved_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that autograd holds after the forward and the loss of `images`, for the backward to use.

    Every storage counts once and whole, however many operators saved a view of it, the images included; parameters and
    buffers do not count.
    """
    weights = {t.untyped_storage()._cdata for t in itertools.chain(network.parameters(), network.buffers())}
    found: dict[int, torch.UntypedStorage] = {}  # kept alive until the end, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(network, images)
    total = sum(storage.nbytes() for storage in found.values())
    del loss
    return total


def time_steps(
    networks: Mapping[str, nn.Module], batch_size: int, seconds: float, teacher: nn.Module | None = None
) -> dict[str, tuple[Latency, int | None]]:
    """Train networks, in training mode, on random images in turns: forward, a forward of `teacher` without gradients, loss,
    backward, clipping and AdamW.

    `seconds` is a budget for all; it cuts the warm-up to one step each and the timed ones to no fewer than six.

    Returns:
        For each the time of a step, and on CUDA the largest number of bytes that a step allocates above what remains
        between steps (weights, gradients, optimizer state, images, workspaces and anything else on the device).
    """
    from timm.optim import create_optimizer_v2

    # So small a rate changes no time and keeps the weights from growing over it.
    optimizers = {name: create_optimizer_v2(n, "adamw", lr=1e-8, weight_decay=0.05) for name, n in networks.items()}
    images = {name: training_images(network, batch_size) for name, network in networks.items()}
    device = next(iter(images.values())).device
    peaks: dict[str, int | None] = dict.fromkeys(networks)

    @contextlib.contextmanager
    def watch_memory(name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(device)
        resting = torch.cuda.memory_allocated(device)
        yield
        peaks[name] = max(peaks[name] or 0, torch.cuda.max_memory_allocated(device) - resting)

    with torch.enable_grad():
        times = interleaved_timing(
            {
                name: partial(_step, network, images[name], optimizers[name], teacher)
                for name, network in networks.items()
            },
            device,
            f"Time steps of {batch_size} images",
            _ROUNDS,
            _WARMUP,
            seconds,
            seconds / 4,
            watch_memory if device.type == "cuda" else contextlib.nullcontext,
        )
    return {name: (times[name], peaks[name]) for name in networks}


def measure_loading(loader: Iterable[Any], seconds: float) -> Loading:
    """Pass over `loader` for `seconds`, or once. What its workers had ready before the clock started is not timed."""
    workers = getattr(loader, "workers", getattr(loader, "num_workers", 0))
    batches = len(loader) if isinstance(loader, Sized) else None
    ready = 1 + 2 * workers  # PyTorch's workers are two batches ahead each
    if batches is not None and batches <= 2 * ready:
        ready = 0  # too few to leave any out: the start of the workers is in the time
    counted = 0
    with task("Load images", batches) as advance:
        started = time.perf_counter()
        for number, batch in enumerate(loader, 1):
            advance()
            if number <= ready:
                started = time.perf_counter()
                continue
            counted += count(images_of(batch))
            if time.perf_counter() - started > seconds:
                break
        taken = time.perf_counter() - started
    if not counted:
        raise ValueError("the loader gave no images: there is nothing to train on")
    return Loading(counted / taken, counted, workers)


def _step(network: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer, teacher: nn.Module | None) -> None:
    loss = _loss(network, images)
    if teacher is not None:
        with torch.no_grad():
            teacher(images)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def _loss(network: nn.Module, images: Tensor) -> Tensor:
    return F.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long, device=images.device))


def training_images(network: nn.Module, number: int) -> Tensor:
    """Random images of the size that the network was built for, on its device and in its dtype."""
    return random_images((number, *input_shape(network)), one_device(network), one_dtype(network))
