"""The one predicate that chooses how `ln_mlp` runs and gives the reason.

The operator calls `choose`, and `model.lambda_kernels_info` and `lambda-vit doctor` print its answer, so a report cannot
drift from what runs. A backend requested by name never falls back.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch

from ...errors import BackendUnavailableError
from ..checks import autocast_enabled, check_choice, dtype_name
from . import onednn

BACKENDS = ("auto", "triton", "onednn", "torch")

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_EXPORTED = "the model is being exported, and an exported model has to run without this library"

# The widest tokens whose kernels `auto` uses inside a compiled model. Above, products decide, and the compiler has the
# library's and fuses around them.
COMPILED_CHANNELS = 256

# Compute capability from which the kernels' products run on bfloat16 tensor cores.
_OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, in words for people."""

    backend: str
    reason: str


@torch.compiler.assume_constant_result
def in_interpreter() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: slow, exact, for tests."""
    if not _TRITON_INSTALLED:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int] | None:
    # None without a CUDA device, as when a model for one is traced without data; that may change.
    return _known_capability(index) if torch.cuda.is_available() else None


@functools.lru_cache
def _known_capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _device_obstacles(device: torch.device) -> list[str]:
    if torch.version.hip is not None:
        return ["the device is driven by ROCm, and the kernels were written for CUDA"]
    capability = _capability(device.index)
    if capability is not None and capability < _OLDEST_CAPABILITY:
        oldest = ".".join(map(str, _OLDEST_CAPABILITY))
        return [f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need {oldest}"]
    return []


def active_transforms() -> list[str]:
    """The active transforms of PyTorch that a custom operator does not support; some of them would silently skip it."""
    if torch.compiler.is_compiling():
        return []
    found = []
    if torch._C._are_functorch_transforms_active():
        found.append("a torch.func transform (grad, vmap, jvp …) is active, which only PyTorch's own operators support")
    if torch.autograd.forward_ad._current_level >= 0:
        found.append("forward-mode differentiation is active, which the kernels have no formula for")
    return found


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export`, `torch.onnx.export` or `torch.jit.trace` records what is being computed.

    What they record must run where this library is not installed.
    """
    # Asked here and not by the traced code, for which some versions of dynamo say yes in a torch.compile too.
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def triton_obstacles(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Everything that keeps the Triton kernels from running on `device` with `dtype`; empty when they can."""
    obstacles = []
    if not _TRITON_INSTALLED:
        obstacles.append("triton is not installed")
    elif device.type == "cuda":
        obstacles += _device_obstacles(device)
    elif not (device.type == "cpu" and in_interpreter()):
        obstacles.append(f"the tensors are on {device.type}, not on a CUDA device")
    if is_exporting():
        obstacles.append(_EXPORTED)
    obstacles += active_transforms()
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        obstacles.append(f"dtype {dtype_name(dtype)} is not one of float32, bfloat16, float16")
    return obstacles


def onednn_obstacles(device: torch.device, dtype: torch.dtype, *, is_inference: bool = True) -> list[str]:
    """Everything that keeps oneDNN's products from running on `device` with `dtype`; empty when they can.

    Where `is_inference` is False, PyTorch's operators compute the call (see `inference_obstacles`). What these products can do
    with its dtype on this processor is no obstacle then, nor is a dtype that autocast chose: models train and export on all
    processors.
    """
    obstacles = list(_why_no_onednn(is_inference and dtype == torch.bfloat16))
    if device.type != "cpu":
        obstacles.append(f"the tensors are on {device.type}, not on the CPU")
    by_autocast = not is_inference and autocast_enabled(device.type) and dtype == torch.get_autocast_dtype(device.type)
    if dtype not in (torch.float32, torch.bfloat16) and not by_autocast:
        obstacles.append(f"dtype {dtype_name(dtype)} is not one of float32, bfloat16")
    return obstacles


@torch.compiler.assume_constant_result
def _why_no_onednn(bfloat16: bool) -> tuple[str, ...]:
    if onednn.missing_operators():
        return onednn.missing_operators()
    if not torch._C._get_mkldnn_enabled() and not is_exporting():  # torch.export switches it off for itself
        return ("oneDNN is switched off (torch.backends.mkldnn)",)
    if bfloat16 and not onednn.supports_bfloat16():
        return ("oneDNN computes nothing in bfloat16 on this processor",)
    return ()


def inference_obstacles(device: torch.device, recording: bool = False, subclass: bool = False) -> list[str]:
    """Why a call is not one of inference, which oneDNN's products are for: PyTorch's operators then compute it.

    `recording`: autograd records the call; `subclass`: a tensor is of a subclass of `torch.Tensor`.
    """
    if torch.compiler.is_compiling():
        # Asked for alone: a graph that is compiled can follow none of the other questions, and none of them matters there.
        if is_exporting():
            return [_EXPORTED]
        return ["the model is being compiled, and the compiler fuses PyTorch's operators itself"]
    found = active_transforms()
    if is_exporting():
        found.append(_EXPORTED)
    if recording:
        found.append(
            "autograd records the call, and oneDNN's products have no gradient; torch.inference_mode() records none"
        )
    if autocast_enabled(device.type):
        once = "" if _why_no_onednn(True) else "; model.to(torch.bfloat16) does it once"
        found.append(f"autocast is on, and would cast the weights at every call{once}")
    if subclass or torch._C._len_torch_dispatch_stack() > 0:
        found.append(
            "a tensor subclass or a dispatch mode is active, which may support only PyTorch's public operators"
        )
    return found


def choose(
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    *,
    channels: int = 0,
    recording: bool = False,
    subclass: bool = False,
) -> Choice:
    """Choose the backend of `ln_mlp` for tokens on `device` with `dtype` and `channels` values each.

    Inside a model that is being compiled, "auto" leaves tokens of more than `COMPILED_CHANNELS` values to the compiler.

    "onednn" is a choice for inference: where it could run, but the call is another one (see `inference_obstacles`, which gets
    `recording` and `subclass`), that is no error, since a model is trained and exported as well; the reason says so. Such calls
    do not need a processor on which oneDNN knows bfloat16.

    Raises:
        ValueError: `backend` is not one of "auto", "triton", "onednn", "torch".
        BackendUnavailableError: "triton" or "onednn" was requested by name and cannot run; every reason is listed.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return Choice("torch", "requested by name")
    if backend == "onednn":
        others = inference_obstacles(device, recording, subclass)
        obstacles = onednn_obstacles(device, dtype, is_inference=not others)
        if obstacles:
            raise BackendUnavailableError(
                f"backend='onednn' cannot run ln_mlp: {'; '.join(obstacles)}. Use backend='auto' or 'torch'"
            )
        if others:
            return Choice("torch", f"backend='onednn' is for inference, but {'; '.join(others)}")
        return Choice("onednn", "requested by name; calls that autograd records use PyTorch's operators")
    obstacles = triton_obstacles(device, dtype)
    if backend == "auto" and not obstacles and device.type == "cpu":
        return Choice("torch", "Triton's interpreter is only used when backend='triton' asks for it")
    if backend == "auto" and not obstacles and channels > COMPILED_CHANNELS and torch.compiler.is_compiling():
        return Choice(
            "torch",
            f"the model is being compiled, and above a width of {COMPILED_CHANNELS} its compiler is expected to be as fast",
        )
    if not obstacles:
        reason = "requested by name" if backend == "triton" else "a fused kernel serves this case"
        if backend == "auto" and channels > COMPILED_CHANNELS:
            reason += "; inside torch.compile, PyTorch's operators do"
        return Choice("triton", reason)
    if backend == "triton":
        raise BackendUnavailableError(
            f"backend='triton' cannot run ln_mlp: {'; '.join(obstacles)}. Use backend='auto' or 'torch'"
        )
    return Choice("torch", "; ".join(obstacles))
