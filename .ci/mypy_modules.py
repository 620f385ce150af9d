"""mypy plugin: what a `torch.nn.Module` does not declare may be anything.

PyTorch annotates `Module.__getattr__` with `Tensor | Module`, which is not true of the lists, numbers and
records that models carry: `model.blocks`, `norm.eps`, `model.pretrained_cfg`. What a class declares keeps its type.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny

_MODULE = "torch.nn.modules.module.Module"


def _anything(context: AttributeContext) -> Type:
    return AnyType(TypeOfAny.explicit)


class UndeclaredAttributes(Plugin):
    """Gives undeclared attributes of modules the type Any."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """Called where mypy falls back on `__getattr__`, with that method's class and the attribute's name."""
        return _anything if fullname.startswith(f"{_MODULE}.") else None


def plugin(version: str) -> type[Plugin]:
    """What mypy calls."""
    return UndeclaredAttributes
