"""What was settled about a call of `ln_mlp`, for later calls like it: checked arguments, the backend, launches.

A call is like another one if their keys are equal. A key holds everything that checks and choices depend on, read anew at each
call; values and addresses of tensors are not among that, and no plan holds a tensor. What only PyTorch's dispatcher can
follow has no key: compilers and exporters, transforms, modes, subclasses of tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .arguments import Options, Parameters

_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (int, float)

# Calls of more kinds than this, such as of images of any size, begin anew.
_MOST = 1024


class Plan:
    """How calls with one key are computed."""

    __slots__ = ("backend", "compute", "is_usual", "level", "options", "save", "steps")

    def __init__(
        self, backend: str, options: Options, compute: torch.dtype, level: str, save: str, is_usual: bool = False
    ) -> None:
        self.backend = backend  # "triton", "onednn" or "torch"
        self.options = options
        self.compute = compute  # the dtype of both products
        self.level = level  # what is recomputed: "none", "act" or "all"
        self.save = save  # as `level`, or `SAVE_NOTHING` where autograd does not record the call
        # Whether the kernels use the tensors as they are: tokens contiguous, parameters too and of one dtype, no factors.
        self.is_usual = is_usual
        # Of the kernels: launches of the forward and of backwards, by what those depend on besides.
        self.steps: dict[object, Any] = {}


_known: dict[tuple[object, ...], Plan] = {}


def find(key: tuple[object, ...]) -> Plan | None:
    """The plan for this key."""
    return _known.get(key)


def remember(key: tuple[object, ...], plan: Plan) -> None:
    """Have `find` find this plan."""
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = plan


def clear() -> None:
    """Forget all plans."""
    _known.clear()


def make_key(
    x: Tensor, p: Parameters, eps: float, residual_scale: float, approximate: str, recompute: str, backend: str
) -> tuple[object, ...] | None:
    """What the plan of a call depends on; None for a call that needs PyTorch's dispatcher, or whose arguments are wrong."""
    if (
        type(x) not in _PLAIN
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        # Zeros of either sign are equal, and so is a bool to a number.
        or not residual_scale
        or type(residual_scale) not in _NUMBERS
        or type(eps) not in _NUMBERS
        or not (type(approximate) is type(recompute) is type(backend) is str)
    ):
        return None
    try:
        return _describe(x, p, eps, residual_scale, approximate, recompute, backend)
    except (AttributeError, RuntimeError):  # no dense tensor, or a device that knows no autocast
        return None


def _describe(x: Tensor, p: Parameters, *options: Any) -> tuple[object, ...] | None:
    device, backend = x.device, options[-1]
    is_recording = torch.is_grad_enabled()
    is_recorded = is_recording and x.requires_grad
    key: list[object] = [x.dtype, x.shape, x.stride(), device]
    for t in p:
        if t is None:
            key.append(None)
            continue
        if type(t) not in _PLAIN or t.device != device or t.layout is not torch.strided:
            return None
        is_recorded = is_recorded or (is_recording and t.requires_grad)
        key += (t.dtype, t.shape, t.is_contiguous())
    *_, branch_scale = p
    if branch_scale is not None and branch_scale.requires_grad:
        return None
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    key += (
        is_recorded,
        autocast,
        *options,
        *map(type, options[:2]),
    )  # 2 and 2.0 are equal, and not the same to a kernel
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        # Kernels read memory: that which holds other values than the tensor's is the dispatcher's.
        for t in (x, *p):
            if t is not None:
                address = t.data_ptr()
                if t.is_neg() or not address:
                    return None
                key.append(address & 15)
        key.append(device.type == "cpu" and dispatch.in_interpreter())
    elif backend == "onednn":
        key.append(torch._C._get_mkldnn_enabled())
    return tuple(key)
