"""What a model costs: parameters, FLOPs and memory."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker

from lambda_kernels.ops.checks import require_int

from ..models.properties import eval_mode, input_shape
from .runner import Figures, ModelRunner, tensors_of


@dataclasses.dataclass(frozen=True)
class Cost(Figures):
    """Size of a model, and cost of running it."""

    parameters: int
    weight_bytes: int  # parameters and persistent buffers, which a checkpoint holds
    flops: int  # per image, two per multiply-add, matrix products and convolutions only
    peak_memory_bytes: int  # one forward of `batch_size` images, weights and images included
    peak_memory_method: str
    batch_size: int
    input_shape: tuple[int, int, int]


def cost(model: nn.Module, image_size: int | tuple[int, int, int] | None = None, batch_size: int = 1) -> Cost:
    """Count parameters, bytes, FLOPs and peak memory of a forward in eval mode, on the model's device.

    Args:
        model: A classifier, or any module of images [N, C, H, W].
        image_size: (channels, height, width), or pixels a side. Default: the size that the model was built for.
        batch_size: Batch size of the forward whose memory is measured. FLOPs are always per image.
    """
    require_int("batch_size", batch_size, 1, strict=True)
    shape = input_shape(model, image_size)
    runner = ModelRunner(model)
    parameters = sum(p.numel() for p in model.parameters())
    saved = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    with eval_mode(model), torch.inference_mode(False), torch.no_grad():
        flops = count_flops(model, runner.images(1, shape))
        measure = _cuda_peak if runner.device.type == "cuda" else _traced_peak
        peak, method = measure(model, runner.images(batch_size, shape))
    resident = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(model)}
    return Cost(
        parameters=parameters,
        weight_bytes=sum(t.numel() * t.element_size() for t in saved.values()),
        flops=flops,
        peak_memory_bytes=sum(resident.values()) + peak,
        peak_memory_method=method,
        batch_size=batch_size,
        input_shape=shape,
    )


class _Trace(TorchDispatchMode):
    """Records which operators run, and the lifetime of the storages that they return. Memory that an operator allocates
    and frees internally is not seen."""

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
        # PyTorch keeps one Python object per storage while the storage lives, so that both end together.
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._bytes -= size


class _NoTracker(ModuleTracker):
    """Follows no modules. The counter's own tracker registers gradient hooks on their inputs, which fails under `no_grad`
    where an input is a view of a parameter, as the queries of attention pooling are."""

    def __enter__(self) -> _NoTracker:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def count_flops(model: nn.Module, images: Tensor) -> int:
    """Count the FLOPs of a forward of `images`, two per multiply-add, in the model's current mode."""
    # The math backend runs attention as matrix products, which every version of the counter knows.
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoTracker()
    with sdpa_kernel(SDPBackend.MATH), _Trace() as trace, counter:
        model(images)
    own = {"aten", "prim", "prims"}
    unknown = sorted(str(op) for op in trace.operators - set(flop_registry) if str(op).split(".")[0] not in own)
    if unknown:
        warnings.warn(f"FLOPs omit {', '.join(unknown)}: no formula is registered", stacklevel=3)
    return counter.get_total_flops()


def _traced_peak(model: nn.Module, images: Tensor) -> tuple[int, str]:
    mode = _Trace(tensors_of(model))
    mode.follow(images.untyped_storage())
    with mode:
        model(images)
    return mode.peak, "live tensors between operators"


def _cuda_peak(model: nn.Module, images: Tensor) -> tuple[int, str]:
    device = images.device
    model(images)  # allocates the workspaces that stay, which are not part of this forward
    torch.cuda.synchronize(device)
    others = torch.cuda.memory_allocated(device) - images.nbytes
    torch.cuda.reset_peak_memory_stats(device)
    model(images)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - others, "torch.cuda.max_memory_allocated"
