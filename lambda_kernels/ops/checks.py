"""Argument checks shared by the operators: they run before anything is allocated and name argument and value."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for devices of this type; those that know none, as "meta", included."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


@torch.compiler.assume_constant_result  # which torch.compile of PyTorch 2.11 cannot look into
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def as_int(value: object) -> int | None:
    """`value` as a Python integer, NumPy's and 0-dim tensors included; None for anything else, such as a bool or 2.0."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    if isinstance(value, int):  # a symbolic size of torch.compile must not be made a constant
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]  # which is what the error is for
    except TypeError:
        return None


def require_int(
    name: str,
    value: object,
    minimum: int | None = None,
    maximum: int | None = None,
    *,
    more: str = "",
    wrong_type: type[Exception] = ValueError,
    strict: bool = False,
) -> int:
    """`value` as a Python integer.

    Args:
        name: The argument's name for the message.
        value: What was passed.
        minimum: Lowest allowed value; None: any.
        maximum: Highest allowed value, with a minimum; None: any.
        more: What else the message says is allowed, such as " or None".
        wrong_type: The exception for a value that is no integer.
        strict: Refuse what only converts to an int, for callers that go on with `value` itself.

    Raises:
        ValueError: `value` is no integer, or outside the bounds.
    """
    number = None if strict and not isinstance(value, int) else as_int(value)
    if number is None or (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        bounds = (
            "" if minimum is None else f" of at least {minimum}" if maximum is None else f" from {minimum} to {maximum}"
        )
        raise (wrong_type if number is None else ValueError)(f"{name} must be an integer{bounds}{more}; got {value!r}")
    return number


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a floating-point tensor of a supported dtype."""
    if isinstance(value, torch.fx.Proxy):
        raise TypeError(
            f"torch.fx.symbolic_trace cannot follow this operator ({name} is a Proxy): convert the model with fuse='none'"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got a nested one, use the tensors that {name}.unbind() gives")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    if value.dtype not in FLOATING:
        names = ", ".join(map(dtype_name, FLOATING))
        raise TypeError(f"{name} must have one of the dtypes {names}; got {value.dtype}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Raise ValueError unless `value` has exactly `shape`; `letters` says where the sizes come from."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}; got {list(value.shape)}")


def check_same_device(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError listing every tensor's device unless they all live on one."""
    if len({t.device for t in tensors.values()}) > 1:
        listed = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"all tensors must be on one device; got {listed}. Move them with .to(device) first")


def check_same_dtype(tensors: dict[str, Tensor]) -> None:
    """Raise TypeError listing every tensor's dtype unless they are the same or autocast is on for their device."""
    if len({t.dtype for t in tensors.values()}) > 1:
        device_type = next(iter(tensors.values())).device.type
        if autocast_enabled(device_type):
            return
        listed = ", ".join(f"{name} {dtype_name(t.dtype)}" for name, t in tensors.items())
        raise TypeError(f"all tensors must have one dtype outside autocast; got {listed}. Cast them, or use autocast")
