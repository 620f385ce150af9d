"""Before anything is trained: what removing attention layers saves, and what the training costs in memory and hours.

Three networks are looked at, each as `finetune` would train it: the full model, the one under dilution (attention beside
its identity twin), and the one whose attention is gone. The caller's model is never changed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lambda_kernels.blocks.mlp_block import MlpBlockBase
from lambda_kernels.blocks.structure import inspect_model
from lambda_kernels.convert.checks import check_indices
from lambda_kernels.ops.checks import dtype_name, require_int

from ...measure.cost import cost
from ...measure.dtype_speed import warn_if_slow
from ...measure.latency import Latency
from ...models.properties import input_shape, one_device, one_dtype
from ...runtime.formatting import format_size
from ...runtime.memory import free_memory
from ...runtime.progress import task
from ..dilution import finish_dilution, prepare, set_lambda
from ..loop.objective import check_teacher
from ..recipe import RESIDUAL_SCALES, Recipe
from .step_timing import Loading, measure_loading, saved_bytes, time_steps, training_images

if TYPE_CHECKING:
    from ...selection.result import Selection

# The paper's schedule: λ goes from 1 to 0 in the first, and the network trains on without attention in the second.
DILUTION_EPOCHS, RECOVERY_EPOCHS = 300, 100

COUNTED_AT = (2, 4)  # images: what autograd saves is a fixed part and a part per image, so two batches tell both
_MOMENTS = 2 * 4  # bytes of AdamW's two float32 per parameter


@dataclasses.dataclass(frozen=True)
class NetworkPlan:
    """What one of the three networks takes to keep, to run and to train."""

    parameters: int
    trainable: int
    flops: int  # per image, forward; two per multiply-add
    weight_bytes: int
    saved_bytes_fixed: int  # saved by autograd for the backward, whatever the batch
    saved_bytes_per_image: int
    gradient_bytes: int
    optimizer_bytes: int
    step_bytes: int  # weights, also a teacher's, gradients, optimizer state and what is saved for `batch_size` images
    recomputed: tuple[str, ...] = ()  # what the backward recomputes of each block's MLP half: "none", "act" or "all"
    peak_bytes: int | None = None  # the same of a real step on CUDA, by PyTorch's own counter
    step: Latency | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of the training. Hours are those of the steps alone: medians, then quartiles."""

    epochs: int
    steps: int
    hours: float
    low_hours: float
    high_hours: float
    hours_with_loading: float | None  # None where loading was not measured


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole of it; `networks` are "full", "diluting" and "final", `phases` "dilution" and "recovery"."""

    removed: tuple[int, ...]
    depth: int
    images: int
    batch_size: int
    devices: int
    device: str
    dtype: str
    input_shape: tuple[int, int, int]
    recompute: str | None  # as requested
    networks: dict[str, NetworkPlan]
    phases: dict[str, Phase]
    loading: Loading | None = None
    teacher_bytes: int | None = None  # weights of the teacher, which each step runs; None without a teacher

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self) | {"removed": list(self.removed), "input_shape": list(self.input_shape)}

    @property
    def limited_by(self) -> str | None:
        """What takes longer in the phase that trains faster: "loading" or "training"; None where loading was not measured."""
        if self.loading is None:
            return None
        fastest = max(self.images_per_second(name) for name, network in self.networks.items() if network.step)
        return "loading" if self.loading.images_per_second < fastest else "training"

    def images_per_second(self, network: str) -> float:
        """Training throughput of one device."""
        step = self.networks[network].step
        if step is None:
            raise ValueError(f"network={network!r}: its steps were not timed")
        return self.batch_size / step.median_ms * 1000


def split_epochs(
    epochs: int | None = None, dilution_epochs: int | None = None, recovery_epochs: int | None = None
) -> tuple[int, int]:
    """Epochs of dilution and of recovery.

    Of `epochs` alone none is dilution, as in `finetune`, which removes attention at once; with one part the rest is the other.
    Without `epochs`, a part that is not given is the paper's (300 and 100).

    Raises:
        ValueError: A number below 0, none at all, or numbers that do not add up.
    """
    given = {"epochs": epochs, "dilution_epochs": dilution_epochs, "recovery_epochs": recovery_epochs}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        require_int(name, value, 0 if name != "epochs" else 1, strict=True)
    if epochs is None:
        dilution = DILUTION_EPOCHS if dilution_epochs is None else dilution_epochs
        recovery = RECOVERY_EPOCHS if recovery_epochs is None else recovery_epochs
        if dilution + recovery < 1:
            raise ValueError("dilution_epochs=0 and recovery_epochs=0 leave nothing to train: pass at least one epoch")
        return dilution, recovery
    if dilution_epochs is None:
        dilution_epochs = 0 if recovery_epochs is None else epochs - recovery_epochs
    if recovery_epochs is None:
        recovery_epochs = epochs - dilution_epochs
    if min(dilution_epochs, recovery_epochs) < 0 or dilution_epochs + recovery_epochs != epochs:
        parts = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{parts} do not add up: epochs = dilution_epochs + recovery_epochs. Leave one of them out")
    return dilution_epochs, recovery_epochs


def plan_training(
    model: nn.Module,
    layers: Sequence[int] | Selection,
    *,
    images: int,
    dilution_epochs: int = DILUTION_EPOCHS,
    recovery_epochs: int = RECOVERY_EPOCHS,
    batch_size: int = 64,
    devices: int = 1,
    seconds: float = 60.0,
    device: torch.device | str | None = None,
    loader: Iterable[Any] | None = None,
    recompute: str | None = None,
    teacher: nn.Module | None = None,
) -> Plan:
    """Measure what `finetune` with these layers will take: memory, step time, hours. Trains copies on random images only.

    What autograd saves is counted on real forwards in training mode, each storage once, without parameters and buffers.
    Scratch memory that lives inside one operator of the forward or backward is not in it; on CUDA the real peak is
    measured beside it.

    Args:
        model: A timm vision transformer with all its attention.
        layers: Blocks whose attention is to go, or a `Selection`.
        images: Of one epoch.
        dilution_epochs: Epochs with the diluting network.
        recovery_epochs: Epochs after that, with the attention gone.
        batch_size: Images per step and device.
        devices: How many share the images; taken to speed training up by that factor.
        seconds: A budget for all timing, shared evenly; no measurement takes fewer than six steps.
        device: Where to measure; None is where the model is.
        loader: Yields batches (images, …), to measure how fast they can be loaded; None omits that.
        teacher: Of the distillation, such as `model` itself: steps include its forward, memory its weights; None: no teacher.
        recompute: As for `finetune`, for the two networks that are trained. The full one is looked at as it is.

    Returns:
        What the full, the diluting and the final network take, in parameters, FLOPs, bytes and seconds of a step, and the
        hours of both phases.

    Raises:
        ValueError: An argument is out of range, the layers cannot be removed, or a batch does not fit into memory.
        UnsupportedModelError: The model cannot be changed block by block.
    """
    for name, value in (("images", images), ("batch_size", batch_size), ("devices", devices)):
        require_int(name, value, 1, strict=True)
    dilution_epochs, recovery_epochs = split_epochs(None, dilution_epochs, recovery_epochs)
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds!r}: expected a positive number of seconds to measure for")
    structure = inspect_model(model)
    dtype = one_dtype(model)
    chosen = check_indices(layers, structure.depth, "layers")
    if not chosen:
        raise ValueError("layers is empty: there is nothing to plan. Name the blocks that lose their attention")
    if getattr(model, "grad_checkpointing", False):
        raise ValueError(
            "the model recomputes activations (grad_checkpointing), so that what is saved cannot be counted: call "
            "model.set_grad_checkpointing(False) first"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("every parameter of the model is frozen: set requires_grad on those that are to be trained")
    scale = RESIDUAL_SCALES["dilute" if dilution_epochs else "drop"]
    fading = prepare(
        model, chosen, residual_scale=scale, recompute=recompute
    )  # refuses what cannot be removed, before anything is measured
    set_lambda(fading, 0.5)
    where = torch.empty(0, device=one_device(model) if device is None else device).device
    warn_if_slow(dtype, where, "cast the model with model.float()", stacklevel=2)
    if teacher is not None:
        check_teacher(teacher, model, Recipe(distillation="soft"))
    weights = None if teacher is None else sum(t.nbytes for t in (*teacher.parameters(), *teacher.buffers()))
    guide = None if teacher is None else copy.deepcopy(teacher).eval()
    epochs = {"full": 0, "diluting": dilution_epochs, "final": recovery_epochs}
    timed = [name for name, count in epochs.items() if count]
    share = seconds / (len(timed) + (loader is not None))
    networks = {"full": copy.deepcopy(model), "diluting": copy.deepcopy(fading)}
    set_lambda(fading, 0.0)
    networks["final"] = finish_dilution(fading)
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(0)
        plans = {name: _count(name, network, where, batch_size, weights or 0) for name, network in networks.items()}
        guide = None if guide is None else guide.to(where)
        # A CPU is shared with other programs, so they take turns there. On a GPU each has the memory to itself, as it will
        # have in training, and the full one runs for its peak.
        for group in [timed] if where.type == "cpu" else [[name] for name in epochs]:
            budget = share * len(group) if group != ["full"] else 0.0
            turns = {name: networks.pop(name).to(where).train() for name in group}
            for name, (step, passing) in _time(turns, plans, batch_size, budget, guide).items():
                images_bytes = batch_size * math.prod(input_shape(model)) * dtype.itemsize
                peak = None if passing is None else _constant(plans[name]) + images_bytes + passing
                plans[name] = dataclasses.replace(plans[name], step=step if name in timed else None, peak_bytes=peak)
            del turns
    loading = None if loader is None else measure_loading(loader, share)
    steps = math.ceil(images / (batch_size * devices))
    return Plan(
        removed=chosen,
        depth=structure.depth,
        images=images,
        batch_size=batch_size,
        devices=devices,
        device=str(where),
        dtype=dtype_name(dtype),
        input_shape=input_shape(model),
        recompute=recompute,
        networks=plans,
        phases={
            phase: _phase(plans[name].step, epochs[name], steps, batch_size, loading)
            for phase, name in (("dilution", "diluting"), ("recovery", "final"))
            if epochs[name]
        },
        loading=loading,
        teacher_bytes=weights,
    )


def _phase(step: Latency | None, epochs: int, steps: int, batch_size: int, loading: Loading | None) -> Phase:
    assert step is not None, "what is trained is timed"
    total = epochs * steps
    low, median, high = (total * ms / 3.6e6 for ms in (step.low_ms, step.median_ms, step.high_ms))
    with_loading = None
    if loading is not None:
        load_hours = total * batch_size / loading.images_per_second / 3600
        # Workers load the next batches meanwhile; without them the training waits for every one.
        with_loading = max(median, load_hours) if loading.workers else median + load_hours
    return Phase(epochs, total, median, low, high, with_loading)


def _count(name: str, network: nn.Module, device: torch.device, batch_size: int, teacher_bytes: int) -> NetworkPlan:
    """What of a network can be counted; it is back on the CPU afterwards."""
    with task(f"Count what the {name} network takes", 1) as advance:
        counted = cost(network)
        with _memory_explained(batch_size, device, None):
            network.to(device).train()
            counts = [saved_bytes(network, training_images(network, number)) for number in COUNTED_AT]
            place = device, one_dtype(network)
            recomputed = tuple(
                block.recomputed(*place).level if isinstance(block, MlpBlockBase) else "none"
                for block in network.blocks
            )
        network.to("cpu")
        advance()
    few, more = COUNTED_AT
    per_image = round((counts[1] - counts[0]) / (more - few))
    fixed = counts[0] - few * per_image
    trainable = [p for p in network.parameters() if p.requires_grad]
    gradients, numbers = sum(p.nbytes for p in trainable), sum(p.numel() for p in trainable)
    return NetworkPlan(
        parameters=counted.parameters,
        trainable=numbers,
        flops=counted.flops,
        weight_bytes=counted.weight_bytes,
        saved_bytes_fixed=fixed,
        saved_bytes_per_image=per_image,
        gradient_bytes=gradients,
        optimizer_bytes=numbers * _MOMENTS,
        step_bytes=counted.weight_bytes
        + gradients
        + numbers * _MOMENTS
        + fixed
        + batch_size * per_image
        + teacher_bytes,
        recomputed=recomputed,
    )


def _time(
    networks: dict[str, nn.Module],
    plans: dict[str, NetworkPlan],
    batch_size: int,
    seconds: float,
    teacher: nn.Module | None,
) -> dict[str, tuple[Latency, int | None]]:
    device = one_device(next(iter(networks.values())))
    largest = max((plans[name] for name in networks), key=lambda plan: plan.step_bytes)
    there = free_memory() if device.type == "cpu" else None
    if there is not None and largest.step_bytes > there:  # no error would come, the system would end the process
        raise ValueError(_does_not_fit(largest, batch_size, device, there))
    with _memory_explained(batch_size, device, largest):
        return time_steps(networks, batch_size, seconds, teacher)


def _constant(plan: NetworkPlan) -> int:
    return plan.weight_bytes + plan.gradient_bytes + plan.optimizer_bytes


@contextlib.contextmanager
def _memory_explained(batch_size: int, device: torch.device, plan: NetworkPlan | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Only CUDA's allocator has a class of its own for it.
        words = ("out of memory", "allocate memory")
        if not isinstance(error, torch.OutOfMemoryError) and not any(word in str(error) for word in words):
            raise
        there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else free_memory()
        raise ValueError(_does_not_fit(plan, batch_size, device, there)) from error


def _does_not_fit(plan: NetworkPlan | None, batch_size: int, device: torch.device, there: int | None) -> str:
    room = "" if there is None else f", {format_size(there)} are there"
    if plan is None:
        images = max(COUNTED_AT)
        return f"not even {images} images of this model fit into the memory of {device}{room}: use another device"
    text = f"batch_size={batch_size}: a training step of that many images does not fit into the memory of {device}"
    text += f" (it takes at least {format_size(plan.step_bytes)}{room})."
    most = None
    if there is not None:
        most = (there - _constant(plan) - plan.saved_bytes_fixed) // max(plan.saved_bytes_per_image, 1)
        if most >= batch_size:  # the rest went to what the count leaves out, or to other programs
            most = batch_size // 2
    if most is None or most >= 1:
        return f"{text} Pass a smaller one{'' if most is None else f', at most about {most}'}, and accumulate gradients"
    return f"{text} Not even one image does: use a device with more memory"
