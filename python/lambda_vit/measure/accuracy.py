"""What a model is worth and what it costs: accuracy, agreement with another model, size, FLOPs, memory, latency."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lambda_kernels.errors import NonFiniteActivationError

from . import progress
from .placement import eval_mode, one_device

MINIMUM_ROUNDS = 5  # fewer give no quartiles worth printing


@dataclasses.dataclass(frozen=True)
class _Figures:
    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Evaluation(_Figures):
    """Accuracy over a data set. Percentages run from 0 to 100."""

    count: int
    top1: float
    top5: float | None  # None with five classes or fewer, where it says nothing
    top1_interval: tuple[float, float]  # Wilson's, at 95 %
    images_per_second: float  # transfer and forward of this model alone, the first of several batches left out
    agreement: float | None = None  # images on which the reference predicts the same class, percent
    kl: float | None = None  # mean KL(reference ‖ model) of the class probabilities, bits
    skipped: int = 0  # unreadable images that the loader left out


@dataclasses.dataclass(frozen=True)
class Cost(_Figures):
    """What a model takes to keep and to run."""

    parameters: int
    weight_bytes: int  # parameters and persistent buffers: what a checkpoint holds
    flops: int  # per image, two per multiply-add, matrix products and convolutions only
    peak_memory_bytes: int  # one forward of `batch_size` images, weights and images included
    peak_memory_method: str
    batch_size: int
    input_shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Latency(_Figures):
    """Time of one forward of a whole batch, in milliseconds, over `rounds` repetitions."""

    median_ms: float
    low_ms: float  # lower quartile
    high_ms: float  # upper quartile
    rounds: int


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as fractions `(low, high)` in 0…1.

    Unlike the normal approximation it stays inside 0…1 and keeps a width at 0 % and 100 %.
    Source: E. B. Wilson, Probable inference, JASA 22 (1927).
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"correct={correct}, total={total}: expected 0 <= correct <= total and total >= 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a fraction between 0 and 1, such as 0.95")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Rounding must not push the ends past what was seen.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: nn.Module | None = None,
    device: torch.device | str | None = None,
    description: str = "Evaluate",
) -> Evaluation:
    """Measure a classifier's accuracy and, beside a reference, how far it has moved from it.

    Args:
        model: Maps images [N, C, H, W] to logits [N, classes]. It runs where its parameters are and in their dtype, in
            eval mode; afterwards every module is back in the mode it had. A tuple of logits (a distilled model's two
            heads) is averaged.
        loader: Batches of images and class indices [N].
        reference: Another classifier with the same classes, run on the same batches.
        device: Where the images go for a model without any parameter or buffer. Default: the CPU.
        description: Of the progress bar.

    Raises:
        ValueError: An empty loader, labels that do not fit the outputs, a model spread over several devices.
        NonFiniteActivationError: NaN or infinity among the logits; names the batch.
    """
    runners = [_Runner(m, device) for m in (model, reference) if m is not None]
    count = hits1 = hits5 = same = 0
    divergence, classes, times = 0.0, 0, []
    with contextlib.ExitStack() as stack:
        for runner in runners:
            stack.enter_context(eval_mode(runner.model))
        for batch, (images, labels) in enumerate(progress.track(loader, description)):
            started = time.perf_counter()
            logits = runners[0].logits(images, f"batch {batch}")
            times.append((len(images), time.perf_counter() - started))
            labels = torch.as_tensor(labels).cpu()
            classes = logits.shape[1]
            _check_labels(labels, logits, batch)
            ranked = logits.topk(min(5, classes)).indices
            count += len(labels)
            hits1 += int((ranked[:, 0] == labels).sum())
            hits5 += int((ranked == labels[:, None]).sum())
            if reference is not None:
                wanted = runners[1].logits(images, f"batch {batch} of the reference")
                if wanted.shape != logits.shape:
                    raise ValueError(
                        f"reference has {wanted.shape[1]} classes and the model {classes}: they must be the same"
                    )
                same += int((wanted.argmax(1) == ranked[:, 0]).sum())
                log_p, log_q = wanted.log_softmax(1), logits.log_softmax(1)
                divergence += float((log_p.exp() * (log_p - log_q)).sum()) / math.log(2)
    if not count:
        raise ValueError("the loader gave no images: there is nothing to evaluate")
    low, high = wilson_interval(hits1, count)
    # The first batch pays for kernel selection and compilation.
    timed = times[1:] or times
    return Evaluation(
        count=count,
        top1=100 * hits1 / count,
        top5=100 * hits5 / count if classes > 5 else None,
        top1_interval=(100 * low, 100 * high),
        images_per_second=sum(n for n, _ in timed) / sum(t for _, t in timed),
        agreement=None if reference is None else 100 * same / count,
        kl=None if reference is None else divergence / count,
        skipped=len(getattr(loader, "bad", ())),
    )


def input_shape(model: nn.Module, image_size: int | tuple[int, int, int] | None = None) -> tuple[int, int, int]:
    """The (channels, height, width) a model takes: what it was built for, or `image_size`.

    The patch embedding is asked first, because timm's `pretrained_cfg` keeps the published sizes when the model is
    built with an `img_size` or `in_chans` of its own.

    Raises:
        ValueError: `image_size` is not one or three positive integers, or is None and the model does not say.
    """
    if isinstance(image_size, (tuple, list)):
        if len(image_size) != 3 or any(not isinstance(n, int) or n < 1 for n in image_size):
            raise ValueError(f"image_size={image_size!r}: expected (channels, height, width), all at least 1")
        channels, height, width = image_size
        return channels, height, width
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size={image_size!r}: expected pixels, or (channels, height, width)")
    model = _unwrapped(model)
    published = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else published and published[0]
    sides = (image_size,) * 2 if image_size else getattr(getattr(model, "patch_embed", None), "img_size", None)
    sides = sides or (published and published[1:])
    if not channels or not sides:
        raise ValueError(
            f"{type(model).__name__} does not say its input size: pass image_size=(channels, height, width)"
        )
    return (channels, *sides)


def cost(model: nn.Module, image_size: int | tuple[int, int, int] | None = None, batch_size: int = 1) -> Cost:
    """Count parameters, bytes, FLOPs and peak memory of a forward in eval mode, where the model is.

    Args:
        model: A classifier, or any module of images [N, C, H, W].
        image_size: (channels, height, width), or pixels a side. Default: what the model was built for.
        batch_size: Of the forward whose memory is measured. FLOPs are always per image.
    """
    _check_positive("batch_size", batch_size)
    shape = input_shape(model, image_size)
    runner = _Runner(model, None)
    parameters = sum(p.numel() for p in model.parameters())
    saved = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    with eval_mode(model), torch.inference_mode(False), torch.no_grad():
        flops = count_flops(model, runner.images(1, shape))
        measure = _cuda_peak if runner.device.type == "cuda" else _traced_peak
        peak, method = measure(model, runner.images(batch_size, shape))
    resident = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _weights(model)}
    return Cost(
        parameters=parameters,
        weight_bytes=sum(t.numel() * t.element_size() for t in saved.values()),
        flops=flops,
        peak_memory_bytes=sum(resident.values()) + peak,
        peak_memory_method=method,
        batch_size=batch_size,
        input_shape=shape,
    )


def compare_latency(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int] = (1, 64),
    *,
    rounds: int = 30,
    warmup: int = 3,
    seconds: float | None = None,
    image_size: int | tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, dict[int, Latency]]:
    """Time models against each other, taking turns in one process so that a change of clock or load hits all alike.

    Args:
        models: By name. All on one device; each gets inputs of its own size and dtype.
        batch_sizes: Images per forward.
        rounds: Repetitions per model and batch size; the order of the models rotates from one to the next.
        warmup: Untimed repetitions before them.
        seconds: A budget for all of it. It cuts the warm-up to one and the rounds to no fewer than five.
        image_size: (channels, height, width), or pixels a side. Default: what each model was built for.
        device: Where the models are expected to be; None takes whatever device they share.

    Returns:
        `result[name][batch_size]`.

    Raises:
        ValueError: No models, models on different devices or not on `device`, or a number out of range.
    """
    if not models:
        raise ValueError("models is empty: pass at least one, such as {'model': model}")
    for name, value in (("rounds", rounds), *(("batch_sizes", size) for size in batch_sizes)):
        _check_positive(name, value)
    runners = {name: _Runner(model, device) for name, model in models.items()}
    devices = {name: runner.device for name, runner in runners.items()}
    expected = next(iter(devices.values())) if device is None else _resolved(device)
    if any(found != expected for found in devices.values()):
        found = ", ".join(f"{name} on {where}" for name, where in devices.items())
        raise ValueError(f"latency is compared on one device ({expected}), got {found}: move the models there first")
    result: dict[str, dict[int, Latency]] = {name: {} for name in models}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        advance = stack.enter_context(progress.task("Measure latency", len(batch_sizes) * rounds))
        for size in batch_sizes:
            inputs = {name: r.images(size, input_shape(r.model, image_size)) for name, r in runners.items()}
            budget = math.inf if seconds is None else seconds / len(batch_sizes)
            times = _take_turns(models, inputs, expected, rounds, warmup, budget, advance)
            for name, taken in times.items():
                low, median, high = torch.tensor(taken, dtype=torch.float64).quantile(
                    torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
                )
                result[name][size] = Latency(float(median), float(low), float(high), len(taken))
    return result


class _Runner:
    """A model with the one device and dtype that its inputs need."""

    def __init__(self, model: nn.Module, device: torch.device | str | None) -> None:
        self.model = model
        weightless = not _weights(model)
        self.device = _resolved(device or "cpu") if weightless else one_device(model)
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        # With mixed dtypes the model has a policy of its own (autocast, a cast inside): leave the images as they are.
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def images(self, count: int, shape: tuple[int, int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, *shape, generator=generator).to(self.device, self.dtype)

    @torch.inference_mode()
    def logits(self, images: Tensor, where: str) -> Tensor:
        """Logits [N, classes] in float64 on the CPU, checked; the copy also waits for the device."""
        output = self.model(
            images.to(self.device, self.dtype if images.is_floating_point() else None, non_blocking=True)
        )
        if isinstance(output, (tuple, list)):
            if self.model.training:
                raise ValueError(
                    f"{type(self.model).__name__} gives {len(output)} outputs and ignores eval(): fix its mode"
                )
            output = torch.stack(tuple(output)).mean(0)
        if not isinstance(output, Tensor) or output.ndim != 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{type(self.model).__name__} must give logits [N, classes], got {got}")
        output = output.cpu().double()
        if not output.isfinite().all():
            raise NonFiniteActivationError(
                f"logits of {where} of {type(self.model).__name__} hold NaN or infinity (dtype {self.dtype}): "
                "check the weights, or evaluate in float32 or bfloat16"
            )
        return output


class _Trace(TorchDispatchMode):
    """Notes which operators run, and follows the storages they return from birth to release. What an operator allocates
    and frees inside itself is not seen."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._live = {t.untyped_storage()._cdata for t in known}
        self._bytes = self.peak = 0
        self.operators: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(func._overloadpacket)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.follow(leaf.untyped_storage())
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live.add(key)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        # PyTorch keeps one Python object per storage for as long as the storage lives, so its end is the storage's end.
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._bytes -= size


def count_flops(model: nn.Module, images: Tensor) -> int:
    """FLOPs of a forward of `images`, two per multiply-add; in the mode that `model` is in."""
    # The math path spells attention out as matrix products, which every version of the counter knows.
    with sdpa_kernel(SDPBackend.MATH), _Trace() as trace, FlopCounterMode(display=False) as counter:
        model(images)
    own = {"aten", "prim", "prims"}
    unknown = sorted(str(op) for op in trace.operators - set(flop_registry) if str(op).split(".")[0] not in own)
    if unknown:
        warnings.warn(f"FLOPs leave out {', '.join(unknown)}: no formula is registered for it", stacklevel=3)
    return counter.get_total_flops()


def _traced_peak(model: nn.Module, images: Tensor) -> tuple[int, str]:
    mode = _Trace(_weights(model))
    mode.follow(images.untyped_storage())
    with mode:
        model(images)
    return mode.peak, "live tensors between operators"


def _cuda_peak(model: nn.Module, images: Tensor) -> tuple[int, str]:
    device = images.device
    model(images)  # workspaces that stay allocated are not this forward's
    torch.cuda.synchronize(device)
    others = torch.cuda.memory_allocated(device) - images.nbytes
    torch.cuda.reset_peak_memory_stats(device)
    model(images)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - others, "torch.cuda.max_memory_allocated"


def _weights(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _take_turns(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    device: torch.device,
    rounds: int,
    warmup: int,
    budget: float,
    advance: Callable[..., None],
) -> dict[str, list[float]]:
    """Milliseconds per model and round."""
    started = time.perf_counter()
    names = list(models)
    for done in range(warmup):
        if done and time.perf_counter() - started > budget:
            break
        for name in names:
            models[name](inputs[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn >= MINIMUM_ROUNDS and time.perf_counter() - started > budget:
            advance(rounds - turn)
            break
        first = turn % len(names)
        for name in itertools.chain(names[first:], names[:first]):
            _synchronize(device)
            begun = time.perf_counter()
            models[name](inputs[name])
            _synchronize(device)
            times[name].append(1000 * (time.perf_counter() - begun))
        advance()
    return times


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _resolved(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors report it."""
    return torch.empty(0, device=device).device


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a compiled, DDP or DataParallel wrapper."""
    for name in ("_orig_mod", "module"):
        if isinstance(getattr(model, name, None), nn.Module):
            return _unwrapped(getattr(model, name))
    return model


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1")


def _check_labels(labels: Tensor, logits: Tensor, batch: int) -> None:
    count, classes = logits.shape
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"labels of batch {batch} are {labels.dtype} {tuple(labels.shape)}: expected class indices [{count}]"
        )
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"batch {batch} has labels {int(labels.min())}…{int(labels.max())} and the model {classes} outputs: open "
            f"the data with num_classes={classes}, or use a model made for these classes"
        )
