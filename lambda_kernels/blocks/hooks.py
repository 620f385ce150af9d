"""Hooks and replaced forwards: what a call of a module runs besides the forward of its class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` runs hooks registered on it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether a call of any module runs hooks."""
    # PyTorch checks the same at each call of a module.
    every = nn.modules.module
    return bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def is_altered(module: nn.Module | None) -> bool:
    """Whether a call of `module` runs hooks registered on it, or another forward than that of its class."""
    # Some libraries replace `forward` on the instance (accelerate does, for offloading), which the type does not show.
    return module is not None and (has_hooks(module) or "forward" in module.__dict__)


_get_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def any_altered(*modules: nn.Module | None) -> bool:
    """Whether `is_altered` is true of any, in a third of the time; no compiler can trace this."""
    for module in modules:
        if module is not None:
            own = module.__dict__
            if "forward" in own or any(_get_hooks(own)):
                return True
    return False


@contextmanager
def no_hooks(model: nn.Module) -> Iterator[None]:
    """Inside it, calls of `model` and its submodules run no hooks around their forward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    places = [(vars(module), kind) for module in model.modules() for kind in kinds]
    every = vars(nn.modules.module)
    places += [(every, f"_global{kind}") for kind in kinds]
    kept = [(place, name, place[name]) for place, name in places if place[name]]
    try:
        for place, name, _ in kept:
            place[name] = OrderedDict()
        yield
    finally:
        for place, name, hooks in kept:
            place[name] = hooks
